"""Both KLs on thirds of the validation positions, by the teacher's entropy there.

A method that is slow where the teacher is unsure is behind in the upper third and level in the others.

Axes: N label positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpd.batch import TokenBatch, as_teacher_reads
from hpd.config.schema import Recipe
from hpd.data.rows import validation_sets
from hpd.models.forward import model_inputs
from hpd.training.caching import rows_trainer
from hpd.training.plan import plan

__all__ = ["FIGURES", "TERTILES", "by_entropy", "position_figures", "tertile_metrics"]

TERTILES = ("low", "mid", "high")
FIGURES = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl")


def position_figures(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"]
) -> Float[Tensor, "N 4"]:
    """FIGURES of each position in nats, over the student's vocabulary.

    Raises:
        ValueError: the teacher's vocabulary is the smaller one.
    """
    vocab = student_logits.shape[-1]
    log_q = student_logits.float().log_softmax(-1)
    log_p = teacher_logits[:, :vocab].float().log_softmax(-1)
    if log_p.shape[-1] != vocab:
        raise ValueError(f"Measures of text need equal vocabularies, got {vocab} and {log_p.shape[-1]} rows.")
    p, q = log_p.exp(), log_q.exp()
    ratio = log_p - log_q
    columns = [-(p * log_p).sum(-1), -(q * log_q).sum(-1), (p * ratio).sum(-1), -(q * ratio).sum(-1)]
    return torch.stack(columns, -1).double()


def by_entropy(figures: Float[Tensor, "N 4"]) -> dict[str, float]:
    """Means of both KLs over the thirds of positions where the teacher's entropy is lowest, middle, highest.

    >>> rows = torch.tensor([[0.9, 0.0, 3.0, 6.0], [0.1, 0.0, 1.0, 4.0], [0.5, 0.0, 2.0, 5.0]])
    >>> by_entropy(rows)["forward_kl_high_entropy"]
    3.0
    """
    if len(figures) < len(TERTILES):
        raise ValueError(f"entropy_tertiles needs three or more label positions, got {len(figures)}.")
    order = figures[:, 0].argsort(stable=True)
    found = {}
    for name, part in zip(TERTILES, order.tensor_split(len(TERTILES)), strict=True):
        means = dict(zip(FIGURES, figures[part].mean(0).tolist(), strict=True))
        found |= {f"{kl}_{name}_entropy": round(means[kl], 6) for kl in ("forward_kl", "reverse_kl")}
    return found


@torch.no_grad()
def tertile_metrics(recipe: Recipe, student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """`by_entropy` on the recipe's validation rows, prepared as training does.

    Of several sets each is split by itself, and its figures have its name in front, as in training.

    Raises:
        ValueError: the recipe has no validation rows.
    """
    data = recipe.data
    if data.validation is None:
        raise ValueError("entropy_tertiles needs data.validation.")
    if not isinstance(data.validation, float):
        data = dataclasses.replace(data, limit=1)  # the training rows are not asked for
    trainer: Any = rows_trainer(plan(dataclasses.replace(recipe, data=data)))
    found = {}
    for name, rows in validation_sets(trainer.eval_dataset).items():
        figures = [_figures(dict(batch), student, teacher) for batch in trainer.get_eval_dataloader(rows)]
        prefix = f"{name}_" if name else ""
        found |= {f"{prefix}{key}": value for key, value in by_entropy(torch.cat(figures)).items()}
    return found


def _figures(inputs: dict[str, Any], student: nn.Module, teacher: nn.Module) -> Float[Tensor, "N 4"]:
    """`position_figures` of a batch's label positions."""
    batch = TokenBatch.pop(inputs)
    sides = ((teacher, as_teacher_reads(inputs, batch)), (student, (inputs, batch)))
    logits = [
        model(**model_inputs(given)).logits.flatten(0, 1)[positions.index]
        for model, (given, positions) in sides
    ]
    return position_figures(*logits).cpu()
