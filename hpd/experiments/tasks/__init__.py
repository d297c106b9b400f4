"""Tasks for experiments, small enough for hundreds of runs on one machine: each is the `base` of a file."""

from hpd.experiments.tasks.chains import chains, gym_chains
from hpd.experiments.tasks.inits import chain_inits, foreign_chains
from hpd.experiments.tasks.short import ValidAnswers, short_answers

__all__ = ["ValidAnswers", "chain_inits", "chains", "foreign_chains", "gym_chains", "short_answers"]
