r"""The `Objective` type and the conventions that every factory of this package follows.

Axes: N label positions, K columns of the support (the vocabulary, or label and draws).
In formulas p is the teacher, q the student, both at one column; :math:`\delta = \log p - \log q`, in nats.

Inputs are finite log-probabilities: the operator floors :math:`-\infty` at -1e5, whose exponential is exactly
zero. Outputs are finite for every input in [-1e5, 0]; a factory whose true value can overflow says where it
saturates. No function looks at another row or branches on data, so all run on tiles of any size and under
torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

__all__ = [
    "LogProbs",
    "Objective",
    "PerPosition",
    "Weights",
    "check_number",
    "check_switch",
]

LogProbs: TypeAlias = Float[Tensor, "N K"]
Weights: TypeAlias = Float[Tensor, "N K"]
PerPosition: TypeAlias = Float[Tensor, "N"]


class Objective(NamedTuple):
    r"""Two pure functions of (teacher_logprobs, student_logprobs), both `[N, K]`.

    The loss at a position is :math:`\sum_k value_k`, and its gradient with respect to the student's logits is

    .. math:: \frac{\partial L}{\partial z_v} = \Big(\sum_u w_u\Big) q_v - w_v, \qquad
              w_v = -q_v \frac{\partial D}{\partial q_v}

    The weight is the exact one, not one of those that differ from it by a multiple of q and agree only on the
    whole vocabulary, so the gradient is right on any support.

    >>> import torch
    >>> from hpd.objectives import reverse_kl
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
    >>> w = reverse_kl().weights(p.log(), q.log())
    >>> w.sum(-1, keepdim=True) * q - w  # gradient: lower the first logit, raise the second
    tensor([[ 0.2218, -0.2218]])
    """

    weights: Callable[[LogProbs, LogProbs], Weights]
    """Weights w, constants for the gradient."""
    value: Callable[[LogProbs, LogProbs], Weights]
    """The columns' parts of the loss, in nats; what the objective holds constant is detached in it."""
    stats: Callable[[LogProbs, LogProbs], dict[str, PerPosition]] | None = None
    """Further metrics, one number per position."""
    domain: Literal["token", "distribution", "label", "label_and_vocabulary"] = "token"
    """token: a column depends on its own (p, q) only, so every support is legal. distribution: the columns
    must be a whole distribution. label: column 0 is the dataset's label, the others are candidate draws of
    the student. label_and_vocabulary: column 0 is the label, the others are every token in order."""
    drop_safe: bool = False
    """True if the tail of the vocabulary may be dropped without a tail rule: the weights do not depend on
    q."""
    support: str | None = None
    """Support of a term that names none, as a recipe writes it; None: the one that `domain` asks for."""
    rule: str = ""
    """Name of the factory of this package that made it, whose second form in `hpd.objectives.fused.FUSED` the
    operator takes on the whole vocabulary. Leave it empty for an objective of your own."""
    arguments: tuple[Any, ...] = ()
    """Arguments of the second form."""
    whole_chunks: bool = False
    """True if between two tokenizers it is defined on the probability of a whole chunk, not on its mean over
    tokens (`train.byte_length: product`)."""


def check_number(
    name: str,
    given: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise ValueError unless `given` is a finite number between `low` and `high` (excluded where open)."""
    if isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given):
        above = given > low if open_low else given >= low
        below = given < high if open_high else given <= high
        if above and below:
            return
    left = "(" if open_low else "["
    right = ")" if open_high or high == math.inf else "]"
    raise ValueError(
        f"{name} = {given!r} is not allowed: give a finite number in {left}{low:g}, {high:g}{right}."
    )


def check_switch(name: str, given: object) -> None:
    """Raise ValueError unless `given` is True or False."""
    if not isinstance(given, bool):
        raise ValueError(f"{name} = {given!r} is not allowed: give true or false.")
