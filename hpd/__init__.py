"""Distill language models: every method one row of one table, one fused operator, Hybrid Policy Distillation
exact."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpd.config import Recipe, load_recipe
    from hpd.losses import Head, LossOutput, Scores, reweighted_nll
    from hpd.losses.functional import distillation_loss, fused_distillation_loss
    from hpd.methods import METHODS
    from hpd.methods.supports import Support
    from hpd.methods.terms import Term, TermConfig
    from hpd.objectives import OBJECTIVES, Objective
    from hpd.training.arguments import DistillConfig
    from hpd.training.run import train
    from hpd.training.trainer import DistillTrainer

# Importing hpd loads nothing: torch and transformers take seconds, and `hpd --help` needs neither.
_HOMES = {
    "METHODS": "hpd.methods",
    "OBJECTIVES": "hpd.objectives",
    "DistillConfig": "hpd.training.arguments",
    "DistillTrainer": "hpd.training.trainer",
    "Head": "hpd.losses",
    "LossOutput": "hpd.losses",
    "Objective": "hpd.objectives",
    "Recipe": "hpd.config",
    "Scores": "hpd.losses",
    "Support": "hpd.methods.supports",
    "Term": "hpd.methods.terms",
    "TermConfig": "hpd.methods.terms",
    "distillation_loss": "hpd.losses.functional",
    "fused_distillation_loss": "hpd.losses.functional",
    "load_recipe": "hpd.config",
    "reweighted_nll": "hpd.losses",
    "train": "hpd.training.run",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hpd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
