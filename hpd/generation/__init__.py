"""A model writes: one engine for rollouts, evaluation and `hpd generate`."""
