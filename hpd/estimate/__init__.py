"""Memory and FLOPs of a run, known before a weight is loaded."""
