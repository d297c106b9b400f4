"""Distil language models: every method one row of one table, one fused operator, Hybrid Policy Distillation exact."""

from typing import TYPE_CHECKING, Any

from hpd._version import __version__

if TYPE_CHECKING:
    from hpd.config import Recipe, load_recipe
    from hpd.functional import distillation_loss, fused_distillation_loss
    from hpd.losses import Head, LossOutput, Scores, reweighted_nll
    from hpd.methods import METHODS
    from hpd.objectives import OBJECTIVES, Objective
    from hpd.supports import Support
    from hpd.terms import Term, TermConfig
    from hpd.train import train
    from hpd.trainer import DistillConfig, DistillTrainer

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "DistillConfig",
    "DistillTrainer",
    "Head",
    "LossOutput",
    "Objective",
    "Recipe",
    "Scores",
    "Support",
    "Term",
    "TermConfig",
    "__version__",
    "distillation_loss",
    "fused_distillation_loss",
    "load_recipe",
    "reweighted_nll",
    "train",
]

# Importing hpd loads nothing: torch and transformers take seconds, and `hpd --help` needs neither.
_HOMES = {
    "METHODS": "hpd.methods",
    "OBJECTIVES": "hpd.objectives",
    "DistillConfig": "hpd.trainer",
    "DistillTrainer": "hpd.trainer",
    "Head": "hpd.losses",
    "LossOutput": "hpd.losses",
    "Objective": "hpd.objectives",
    "Recipe": "hpd.config",
    "Scores": "hpd.losses",
    "Support": "hpd.supports",
    "Term": "hpd.terms",
    "TermConfig": "hpd.terms",
    "distillation_loss": "hpd.functional",
    "fused_distillation_loss": "hpd.functional",
    "load_recipe": "hpd.config",
    "reweighted_nll": "hpd.losses",
    "train": "hpd.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hpd' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
