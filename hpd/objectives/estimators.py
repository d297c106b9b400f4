r"""KL(student || teacher) as a metric, by any of the field's estimators.

Axes: N positions, n draws from the student, V vocabulary. With :math:`r = p(a) / q(a)` at a draw a ~ q:

=============  ==========================================  ==========================================
estimator      per position                                unbiased, variance
=============  ==========================================  ==========================================
exact          :math:`\sum_v q_v (\log q_v - \log p_v)`    exact; one pass over the vocabulary
k1             :math:`-\log r`                             unbiased; high, can be negative
k2             :math:`(\log r)^2 / 2`                      biased; low
k3             :math:`r - 1 - \log r`                      unbiased; low, never negative
rao_blackwell  exact on the likeliest tokens, k1 beyond    unbiased; lower than k1 for the same draws
=============  ==========================================  ==========================================

On student-written prefixes, summing any of them over a sequence estimates the sequence's KL.

Reference:
    Schulman, Approximating KL divergence, 2020 (k1, k2, k3); Amini, Vieira and Cotterell, Better estimation
    of the KL divergence between language models, 2025 (Rao-Blackwellization: the exact expectation in place
    of the draw).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ESTIMATORS", "kl_estimate"]

ESTIMATORS = ("exact", "k1", "k2", "k3", "rao_blackwell")

# Tokens summed exactly by rao_blackwell: they hold nearly all mass of a trained model, at a negligible cost.
_EXACT_TOKENS = 32


def kl_estimate(
    estimator: str,
    teacher_logprobs: Float[Tensor, "N V"],
    student_logprobs: Float[Tensor, "N V"],
    draws: Int[Tensor, "N n"] | None = None,
) -> Float[Tensor, "N"]:
    """KL(student || teacher) at each position, in nats.

    Args:
        estimator: one of ESTIMATORS.
        teacher_logprobs, student_logprobs: normalized, finite.
        draws: tokens drawn from the student; needed by all but `exact`.

    Raises:
        ValueError: unknown estimator, or no draws where they are needed.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"The KL estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
    if estimator == "exact":
        return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)
    if draws is None:
        raise ValueError(
            f"The estimator {estimator} needs tokens drawn from the student; exact does without."
        )
    log_ratio = (teacher_logprobs - student_logprobs).gather(1, draws)  # [N, n]
    if estimator == "k1":
        return -log_ratio.mean(-1)
    if estimator == "k2":
        return 0.5 * log_ratio.square().mean(-1)
    if estimator == "k3":
        return (torch.expm1(log_ratio) - log_ratio).mean(-1)
    head = student_logprobs.topk(min(_EXACT_TOKENS, student_logprobs.shape[1]), -1)
    exact = (head.values.exp() * (head.values - teacher_logprobs.gather(1, head.indices))).sum(-1)
    beyond = (draws[:, :, None] != head.indices[:, None, :]).all(-1)  # [N, n]
    return exact - (log_ratio * beyond).mean(-1)
