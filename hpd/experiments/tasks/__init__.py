"""Tasks for experiments, small enough for hundreds of runs on one machine: each is the `base` of a file."""

from hpd.experiments.tasks.chains import chains, gym_chains
from hpd.experiments.tasks.short import ValidAnswers, short_answers

__all__ = ["ValidAnswers", "chains", "gym_chains", "short_answers"]
