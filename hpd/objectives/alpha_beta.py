r"""The alpha-beta divergence and its limits.

Axes and notation: see `hpd.objectives.objective`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpd.objectives.objective import LogProbs, Objective, Weighed, Weights, Whole, check_number

__all__ = ["abkd"]

# Nats. exp(30) is about 1e13: sums over a vocabulary, and squares of those, are still finite in float32.
_MAX_EXPONENT = 30.0
# Below it, dividing by alpha or beta would leave the value (not the weights) to rounding in float32.
_SMALLEST_EXPONENT = 1e-3
_LARGEST_EXPONENT = 10.0
# Nats. ABKD's code raises q to 1e-12 before the logarithm of the limit beta = 0.
_LIMIT_FLOOR = math.log(1e-12)


def _saturated_exp(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_MAX_EXPONENT).exp()


def _exp_difference(x: Tensor, y: Tensor, difference: Tensor) -> Tensor:
    """exp(x) - exp(y), the larger term saturated; exact near zero when `difference` is x - y before it was
    rounded."""
    return _saturated_exp(torch.maximum(x, y)) * torch.copysign(torch.expm1(-difference.abs()), difference)


def abkd(alpha: float, beta: float) -> Objective:
    r"""Alpha-beta divergence: alpha sets how far the gradient follows the ratio p/q, beta how far it follows
    q.

    .. math:: D = \frac{c}{\alpha \beta} \sum_v \Big( \frac{\alpha\, p_v^{\alpha + \beta}
                  + \beta\, q_v^{\alpha + \beta}}{\alpha + \beta} - p_v^\alpha q_v^\beta \Big), \qquad
              w_v = c\, q_v^\beta\, \frac{p_v^\alpha - q_v^\alpha}{\alpha}

    with c = 1, and where a denominator vanishes the limit times c:

    * alpha = 0: :math:`w = c\, q^\beta \delta`, c = abs(beta); alpha = 0, beta = 1 is reverse KL;
    * beta = 0: c = abs(alpha); alpha = 1, beta = 0 is forward KL;
    * alpha + beta = 0: c = abs(alpha);
    * alpha = beta = 0: :math:`D = \tfrac{1}{2} \sum_v \delta_v^2`, c = 1.

    The factor c is the normalisation of ABKD's code, which divides these limits by alpha (or beta) once where
    continuity asks for its square: on these lines the divergence jumps by c. The code's own factor is
    negative for a negative alpha, so that it would maximise the divergence; the absolute value is ours.

    Also as in that code, the logarithm of the limit beta = 0 reads q no lower than 1e-12: below, the
    teacher's part has no gradient.

    Every term is non-negative. Powers saturate at exp(30), which only negative exponents reach.

    Args:
        alpha: 0, or between 0.001 and 10 in absolute value.
        beta: the same.

    Raises:
        ValueError: alpha or beta outside these.

    Reference:
        Wang et al., ABKD, 2025, arXiv 2505.04560; limits: Cichocki, Cruces and Amari, 2011, Entropy 13(1).
    """
    for name, given in (("alpha", alpha), ("beta", beta)):
        check_number(f"abkd: {name}", given, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        if 0 < abs(given) < _SMALLEST_EXPONENT:
            raise ValueError(
                f"abkd: {name} = {given!r} is too near zero: give 0 or at least {_SMALLEST_EXPONENT}."
            )
    total = alpha + beta
    scale = max(abs(alpha), abs(beta)) or 1.0 if 0 in (alpha, beta, total) else 1.0

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_ratio = teacher_logprobs - student_logprobs
        if alpha == 0:
            return scale * _saturated_exp(beta * student_logprobs) * log_ratio
        if beta == 0:
            # The teacher's part of the weight is the derivative of the floored logarithm.
            teacher_part = _saturated_exp(alpha * teacher_logprobs) * (student_logprobs >= _LIMIT_FLOOR)
            return scale / alpha * (teacher_part - _saturated_exp(alpha * student_logprobs))
        mixed = alpha * teacher_logprobs + beta * student_logprobs
        return scale / alpha * _exp_difference(mixed, total * student_logprobs, alpha * log_ratio)

    # With E(c) = (r**c - 1) / c, w = q**total * E(alpha) and D = (q**total * E(total) - w) / beta, a divided
    # difference of E; its limit at beta = 0 is the derivative of E.
    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_ratio = teacher_logprobs - student_logprobs
        if alpha == 0 and beta == 0:
            return 0.5 * log_ratio.square()
        if beta == 0:
            teacher_part, student_part = (
                _saturated_exp(alpha * x) for x in (teacher_logprobs, student_logprobs)
            )
            floored_ratio = teacher_logprobs - student_logprobs.clamp_min(_LIMIT_FLOOR)
            return scale * (teacher_part * floored_ratio - (teacher_part - student_part) / alpha) / alpha
        own = weights(teacher_logprobs, student_logprobs)
        if total == 0:
            return (scale * log_ratio - own) / beta
        gain = _exp_difference(total * teacher_logprobs, total * student_logprobs, total * log_ratio) / total
        return (scale * gain - own) / beta

    def fused(whole: Whole) -> Weighed:
        # Powers of numbers up to one, so nothing saturates; p**total is a product of two.
        teacher_alpha = torch.mul(whole.teacher_logprobs, alpha).exp_()
        teacher_total = whole.teacher_logprobs.mul_(total).exp_()
        student_beta = torch.mul(whole.student_logprobs, beta).exp_()
        student_alpha = whole.student_logprobs.mul_(alpha).exp_()
        teacher_alpha.sub_(student_alpha).mul_(student_beta)  # alpha w
        student_total = student_alpha.mul_(student_beta)
        own = teacher_alpha.sum(-1) / alpha
        gain = teacher_total.sub_(student_total).sum(-1) / total
        return Weighed(teacher_alpha, (gain - own) / beta, 1.0 / alpha, own)

    return Objective(weights, value, fused=fused if alpha > 0 and beta > 0 else None)
