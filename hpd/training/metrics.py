"""Sums of what the steps since the last log saw: added on the device, read once, held by checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hpd.losses.tile import sum_dtype
from hpd.methods.terms import Term

__all__ = ["MetricSums", "add_sums", "input_tokens", "means", "reduce_sums"]

# Sums with a denominator of their own, or that are no metrics.
_SPECIAL = (
    *("tokens", "metric_tokens", "num_tokens", "labels_dropped", "support_overlap", "overlap_rows"),
    *("clipped", "steps"),
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
        """All sums over all processes; they begin anew."""
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
    on_metric_rows = {"forward_kl", "reverse_kl", "teacher_entropy", "student_entropy", "top1_agreement"}
    found = {
        name: value / (metric_tokens if name in on_metric_rows else tokens)
        for name, value in sums.items()
        if not name.startswith(("value/", "gap/")) and name not in _SPECIAL
    }
    # A term on the student's text alone has no value where a window held none.
    values = {term.name: sums.get(f"value/{term.name}", 0.0) / tokens for term in terms}
    if sums.get("overlap_rows"):
        found["support_overlap"] = sums["support_overlap"] / sums["overlap_rows"]
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
