"""Sums of what the steps since the last log saw: added on the device, read once, held by checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores
from hpd.losses.operator import loss_by_source
from hpd.losses.tile import sum_dtype
from hpd.methods.terms import Term, as_evaluated, num_uniforms

__all__ = ["MetricSums", "add_sums", "evaluated_names", "input_tokens", "means", "reduce_sums"]

# Sums with a denominator of their own, or that are no metrics.
_SPECIAL = (
    "tokens",
    "metric_tokens",
    "num_tokens",
    "labels_dropped",
    "labels_cut",
    "support_overlap",
    "overlap_rows",
    "aux_loss",
    "aux_batches",
    "clipped",
    "steps",
)

_ON_METRIC_ROWS = (
    "forward_kl",
    "reverse_kl",
    "teacher_entropy",
    "student_entropy",
    "acceptance",
    "top1_agreement",
    "mean_token_accuracy",
)


class MetricSums:
    """Running sums by name, such as those between two logs.

    Args:
        accelerator: knows the processes and their device.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add each value to the sum of its name, on its device."""
        add_sums(self._sums, {name: value.detach() for name, value in values.items()})

    def totals(self, names: Sequence[str]) -> dict[str, float]:
        """The named sums over all processes; they go on."""
        return reduce_sums(self._accelerator, self._sums, names)

    def read(self) -> dict[str, float]:
        """All sums over all processes; they begin again."""
        names = sorted(self._sums)
        if self._accelerator.num_processes > 1:
            # Every process must bring the same names: a rank may have seen no label, and then lacks some.
            names = sorted(set().union(*gather_object([names])))
        totals = self.totals(names)
        self._sums = {}
        return totals

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of this process, in a copy that later steps do not change."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self._sums = dict(state)


def add_sums(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add each value to the sum of its name."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def reduce_sums(
    accelerator: Accelerator, sums: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, float]:
    """The named sums over all processes, as numbers: the one place where statistics leave the device."""
    if not names:
        return {}
    device = accelerator.device
    zero = torch.zeros((), device=device)
    stacked = torch.stack([sums.get(name, zero).to(device, sum_dtype(device)) for name in names])
    return dict(zip(names, cast(Tensor, accelerator.reduce(stacked, "sum")).tolist(), strict=True))


def means(sums: Mapping[str, float], terms: Sequence[Term]) -> dict[str, float]:
    """Sums over tokens to means per token, under the names that are logged."""
    tokens = sums["tokens"]
    metric_tokens = sums.get("metric_tokens", 0.0)
    found = {
        name: value / (metric_tokens if name in _ON_METRIC_ROWS else tokens)
        for name, value in sums.items()
        if not name.startswith(("value/", "gap/")) and name not in _SPECIAL
    }
    if "student_entropy" in found:
        found["entropy"] = found["student_entropy"]  # its name in TRL
    # A term on the student's text alone has no value where a window held none.
    # Positions that are not computed, since they weigh nothing, are labels all the same.
    labels = tokens + sums.get("labels_cut", 0.0)
    values = {term.name: sums.get(f"value/{term.name}", 0.0) / labels for term in terms}
    if sums.get("overlap_rows"):
        found["support_overlap"] = sums["support_overlap"] / sums["overlap_rows"]
    if sums.get("aux_batches"):
        found["aux_loss"] = sums["aux_loss"] / sums["aux_batches"]
    if sums.get("steps"):
        found["clipped_share"] = sums["clipped"] / sums["steps"]
    if len(terms) > 1:
        found.update({f"loss/{name}": value for name, value in values.items()})
    found["value"] = sum(term.weight * values[term.name] for term in terms)
    if sums["labels_dropped"]:
        found["labels_dropped"] = sums["labels_dropped"]
    return found


def input_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of a collated batch, padding left out."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)


def evaluated_names(terms: Sequence[Term], vocab: int, kl_estimator: str) -> set[str]:
    """Names of the metrics that an evaluation logs, found by one of a single position."""
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    batch = TokenBatch(zero, zero, zero, zero[0], by_dataset=zero, by_student=none)
    scores = Scores(torch.zeros(1, vocab), Head(None))
    evaluated = [term._replace(positions=None) for term in as_evaluated(terms)]
    draws = torch.zeros(1, num_uniforms(evaluated), dtype=torch.float64)
    sums = loss_by_source(scores, scores, batch, evaluated, uniforms=draws, kl_estimator=kl_estimator).stats
    numbers = {name: float(value) for name, value in sums.items()}
    return (means({**numbers, "labels_dropped": 0.0}, terms).keys() - {"value"}) | {
        "loss",
        "num_tokens",
        "runtime",
        "samples_per_second",
        "steps_per_second",
        "teacher_mass_outside",
        "teacher_tail_mass",
    }
