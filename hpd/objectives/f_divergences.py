r"""Divergences of the form :math:`D = \sum_v q_v f(p_v / q_v)`: total variation, and any f of the user's; and
the logarithm of what total variation leaves.

Axes and notation: see `hpd.objectives.objective`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpd.objectives.objective import LogProbs, Objective, Weights

__all__ = ["acceptance", "f_divergence", "total_variation"]

# Nats. exp(40) squared is still a float32, so an f that grows like the square of the ratio stays finite.
_MAX_LOG_RATIO = 40.0


def total_variation() -> Objective:
    r"""Total variation distance, in [0, 1].

    .. math:: D = \tfrac{1}{2} \sum_v |p_v - q_v|, \qquad w_v = \tfrac{1}{2} q_v \operatorname{sign}(p_v -
        q_v)

    Reference:
        Wen et al., f-distill, 2023, arXiv 2307.15190.
    """

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        student_probs = student_logprobs.exp()
        return 0.5 * student_probs * torch.sign(teacher_logprobs.exp() - student_probs)

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return 0.5 * (teacher_logprobs.exp() - student_logprobs.exp()).abs()

    return Objective(weights, value, rule="total_variation")


def acceptance() -> Objective:
    r"""Minus the logarithm of the acceptance, the mass that both distributions share.

    .. math:: D = -\log \alpha, \quad \alpha = \sum_v \min(p_v, q_v) = 1 - TV(p, q), \qquad
              w_v = \frac{q_v\, 1[q_v < p_v]}{\alpha}

    Alpha is the probability that speculative sampling keeps a token drafted by q for p (Leviathan, Kalman and
    Matias, 2023, arXiv 2211.17192). It is one sum over the whole vocabulary, so the columns must be a
    distribution. With a tail in one bucket alpha is an upper bound, since min(sum p, sum q) is at least the
    sum of the minima. No weight is above 1, however small alpha is.

    Reference:
        Samarin et al., LK Losses, 2026, arXiv 2602.23881.
    """

    def shared(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> tuple[Tensor, Tensor]:
        lower = torch.minimum(teacher_logprobs, student_logprobs)
        return lower, torch.logsumexp(lower, -1, keepdim=True)

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        _, log_alpha = shared(teacher_logprobs, student_logprobs)
        below = student_logprobs < teacher_logprobs
        return torch.where(below, student_logprobs - log_alpha, -torch.inf).exp()

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        lower, log_alpha = shared(teacher_logprobs, student_logprobs)
        # Each column's part is its share of alpha.
        return (lower - log_alpha).exp() * -log_alpha

    return Objective(weights, value, domain="distribution", rule="acceptance")


def f_divergence(f: Callable[[Tensor], Tensor], df: Callable[[Tensor], Tensor]) -> Objective:
    r"""The f-divergence of a convex function given with its derivative.

    .. math:: D = \sum_v q_v f(r_v), \quad r = p / q, \qquad w_v = q_v \big(r_v f'(r_v) - f(r_v)\big)

    The ratio saturates at exp(-40) and exp(40), by raising the smaller of p and q to exp(-40) times the
    larger. Between these f and df must be finite, as r squared and log r are.

    >>> import torch
    >>> teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> chi_squared = f_divergence(lambda r: (r - 1) ** 2, lambda r: 2 * (r - 1))
    >>> round(chi_squared.value(teacher, student).sum().item(), 4)  # 0.4 ** 2 / 0.9 + 0.4 ** 2 / 0.1
    1.7778

    Args:
        f: convex, f(1) = 0, applied to tensors of ratios elementwise.
        df: its derivative.

    Raises:
        ValueError: f or df is not callable.

    Reference:
        Wen et al., f-distill, 2023, arXiv 2307.15190.
    """
    for name, given in (("f", f), ("df", df)):
        if not callable(given):
            raise ValueError(
                f"f_divergence: {name} = {given!r} is not allowed: give a function of a tensor of ratios."
            )

    def ratio_and_student(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> tuple[Tensor, Tensor]:
        teacher_raised = torch.maximum(teacher_logprobs, student_logprobs - _MAX_LOG_RATIO)
        student_raised = torch.maximum(student_logprobs, teacher_logprobs - _MAX_LOG_RATIO)
        return (teacher_raised - student_raised).exp(), student_raised.exp()

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        ratio, student_probs = ratio_and_student(teacher_logprobs, student_logprobs)
        return student_probs * (ratio * df(ratio) - f(ratio))

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        ratio, student_probs = ratio_and_student(teacher_logprobs, student_logprobs)
        return student_probs * f(ratio)

    return Objective(weights, value, rule="f_divergence")
