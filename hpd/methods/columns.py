"""What a support gives: its columns at each position, and the gradient of the logits from their weights.

Axes: N label positions, K columns of the support, Kt of them tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "EXCLUDED_LOGPROB",
    "LOGPROB_FLOOR",
    "Columns",
    "Draws",
    "LogitGradient",
    "Tail",
    "raise_excluded_",
]

# Log-probabilities of impossible tokens (logit -inf) are raised to this value, in nats: exp() of it is
# exactly 0 in every dtype, and products with it stay finite.
LOGPROB_FLOOR = -1e5
# Below this no finite logit leads: a mask does (-inf, -1e9, the least number of a dtype).
_MASKED = -5e3
EXCLUDED_LOGPROB = -104.0
"""A teacher's log-probability of a token that it excludes, in nats. exp() of it is still exactly 0 in
float32, so p is 0, and log p - log q stays above -104: where the exact weight of a reverse KL is infinite, it
is at most 105 q."""

Tail = Literal["drop", "bucket", "renormalize"]


class LogitGradient(NamedTuple):
    """`mass * q`, plus `at_tokens` at the columns' tokens, plus `beside` elsewhere."""

    mass: Float[Tensor, "N 1"]
    at_tokens: Float[Tensor, "N Kt"]
    beside: Float[Tensor, "N V"] | None


class Columns(NamedTuple):
    """The K columns of a support at N positions."""

    teacher_logprobs: Float[Tensor, "N K"]
    student_logprobs: Float[Tensor, "N K"]
    tokens: Int[Tensor, "N Kt"] | None
    """Their token ids; None when they are the whole vocabulary in order. A bucket is the column after
    the last."""
    coefficients: Float[Tensor, "N K"] | None
    """None when they are all one."""
    tail: Tail = "drop"

    def logit_gradient(
        self, weights: Float[Tensor, "N K"], student_logprobs: Float[Tensor, "N V"]
    ) -> LogitGradient:
        r"""The gradient of :math:`-\sum_k w_k \log q_k` with respect to the logits.

        * drop: :math:`q_v \sum_k w_k - w_v`;
        * bucket (column B is the whole tail): the same at the tokens, :math:`q_v \sum_k w_k - w_B\, q_v /
          q_B` beside them;
        * renormalize (columns are normalized among themselves): :math:`\tilde q_v \sum_k w_k - w_v` at the
          tokens only.

        Args:
            weights: w, one for each column.
            student_logprobs: of the whole vocabulary; the columns were taken from them.
        """
        mass = weights.sum(-1, keepdim=True)
        if self.tail == "renormalize":
            return LogitGradient(torch.zeros_like(mass), self.student_logprobs.exp() * mass - weights, None)
        if self.tail == "bucket":
            assert self.tokens is not None
            # One exponential for q / q_B, and none of it at the tokens: with a tail of 1e-9, a share of q
            # that cancels there would drown them in its rounding.
            beside = torch.exp(student_logprobs - self.student_logprobs[:, -1:]).scatter_(1, self.tokens, 0.0)
            return LogitGradient(mass, -weights[:, :-1], beside.mul_(-weights[:, -1:]))
        return LogitGradient(mass, -weights, None)


class Draws(NamedTuple):
    """Tokens drawn at N positions, n each, and the log-probability (nats) with which each was drawn."""

    tokens: Int[Tensor, "N n"]
    logprobs: Float[Tensor, "N n"]


def raise_excluded_(teacher_logprobs: Tensor) -> Tensor:
    """Give the tokens that a teacher excludes a finite log-probability, `EXCLUDED_LOGPROB`, in place; all
    others keep theirs, NaN too."""
    # One pass like a clamp; comparing and filling take eight times as long, and a mask of the same size.
    return torch.threshold_(teacher_logprobs, _MASKED, EXCLUDED_LOGPROB)
