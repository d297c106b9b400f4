"""The chunked operator with everything between its products in compiled kernels (torch.compile).

The same walk, products and memory as `chunked`; the passes over a chunk's logits are fused by the compiler. It pays where
kernels are fast and memory is slow (GPUs); on CPUs the hand-ordered passes of `chunked` measured faster, which is therefore the
default everywhere until someone measures otherwise on theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.chunked import Plan, chunked_reweighted_nll
from hpd.losses.heads import Scores
from hpd.losses.tile import Sums, TileInputs, tile_gradient_
from hpd.terms import Term

__all__ = ["compiled_reweighted_nll"]


def compiled_reweighted_nll(student: Scores, plan: Plan) -> tuple[Float[Tensor, ""], Sums]:
    """Loss and statistics; see `hpd.losses.reweighted_nll`, whose checks have run.

    The first call with new terms compiles (seconds to a minute); a schedule that changes an objective's parameter makes new
    terms at every step, and is better served by `chunked`.
    """
    return chunked_reweighted_nll(student, plan._replace(tile_gradient=_compiled_tile_gradient_))


def _compiled_tile_gradient_(
    student_logits: Tensor, teacher_logits: Tensor, inputs: TileInputs, terms: Sequence[Term], sums: Sums,
    scale: Tensor, finite: bool = False,
) -> Tensor:  # fmt: skip
    gradient, values = _kernel()(student_logits, teacher_logits, inputs, terms, scale, finite)
    student_logits.copy_(gradient)
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value
    return student_logits


@functools.cache
def _kernel() -> Callable[..., Any]:
    """One compiled function for all terms: the compiler keeps a version for each, guarded by what they hold."""

    def kernel(
        student_logits: Tensor, teacher_logits: Tensor, inputs: TileInputs, terms: Sequence[Term], scale: Tensor, finite: bool
    ) -> tuple[Tensor, Sums]:
        sums: Sums = {}
        gradient = tile_gradient_(student_logits.clone(), teacher_logits.clone(), inputs, terms, sums, scale, finite)
        return gradient, sums

    return torch.compile(kernel, dynamic=True)
