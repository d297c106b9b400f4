r"""The alpha-beta divergence and its limits.

Axes and notation: see `hpd.objectives.objective`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hpd.objectives.objective import LogProbs, Objective, Weights, check_number

__all__ = ["abkd"]

# Nats. exp(30) is about 1e13: sums over a vocabulary, and squares of those, are still finite in float32.
_MAX_EXPONENT = 30.0
# Below it, dividing by alpha or beta would leave the value (not the weights) to rounding in float32.
_SMALLEST_EXPONENT = 1e-3
_LARGEST_EXPONENT = 10.0
# Nats. ABKD's code raises q to 1e-12 before the logarithm of the limit beta = 0.
_LIMIT_FLOOR = math.log(1e-12)


def abkd(alpha: float, beta: float) -> Objective:
    r"""Alpha-beta divergence: alpha sets how far the gradient follows the ratio p/q, beta how far q.

    .. math:: D = \frac{c}{\alpha \beta} \sum_v \Big( \frac{\alpha\, p_v^{\alpha + \beta}
                  + \beta\, q_v^{\alpha + \beta}}{\alpha + \beta} - p_v^\alpha q_v^\beta \Big), \qquad
              w_v = c\, q_v^\beta\, \frac{p_v^\alpha - q_v^\alpha}{\alpha}

    with c = 1, and where a denominator vanishes the limit times c:

    * alpha = 0: :math:`w = c\, q^\beta \delta`, c = abs(beta); alpha = 0, beta = 1 is reverse KL;
    * beta = 0: c = abs(alpha); alpha = 1, beta = 0 is forward KL;
    * alpha + beta = 0: c = abs(alpha);
    * alpha = beta = 0: :math:`D = \tfrac{1}{2} \sum_v \delta_v^2`, c = 1.

    The factor c is the normalization of ABKD's code, which divides these limits by alpha (or beta) once where
    continuity asks for its square: on these lines the divergence jumps by c. The code's own factor is
    negative for a negative alpha, so that it would maximize the divergence; the absolute value is ours.

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
    _check_exponents(alpha, beta)
    total = alpha + beta
    on_a_limit = 0 in (alpha, beta, total)
    scale = (max(abs(alpha), abs(beta)) or 1.0) if on_a_limit else 1.0

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

    # The second form takes powers of numbers up to one, which do not saturate.
    rule = "abkd" if alpha > 0 and beta > 0 else ""
    return Objective(weights, _values(alpha, beta, scale, weights), rule=rule, arguments=(alpha, beta))


def _values(
    alpha: float, beta: float, scale: float, weights: Callable[[LogProbs, LogProbs], Weights]
) -> Callable[[LogProbs, LogProbs], Weights]:
    """The divergence's terms.

    With E(c) = (r**c - 1) / c, w = q**total * E(alpha) and D = (q**total * E(total) - w) / beta, a divided
    difference of E; its limit at beta = 0 is the derivative of E.
    """
    total = alpha + beta

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_ratio = teacher_logprobs - student_logprobs
        if alpha == 0 and beta == 0:
            return 0.5 * log_ratio.square()
        if beta == 0:
            teacher_part = _saturated_exp(alpha * teacher_logprobs)
            student_part = _saturated_exp(alpha * student_logprobs)
            floored_ratio = teacher_logprobs - student_logprobs.clamp_min(_LIMIT_FLOOR)
            return scale * (teacher_part * floored_ratio - (teacher_part - student_part) / alpha) / alpha
        weight = weights(teacher_logprobs, student_logprobs)
        if total == 0:
            return (scale * log_ratio - weight) / beta
        gain = _exp_difference(total * teacher_logprobs, total * student_logprobs, total * log_ratio) / total
        return (scale * gain - weight) / beta

    return value


def _check_exponents(alpha: float, beta: float) -> None:
    for name, given in (("alpha", alpha), ("beta", beta)):
        check_number(f"abkd: {name}", given, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        if 0 < abs(given) < _SMALLEST_EXPONENT:
            raise ValueError(
                f"abkd: {name} = {given!r} is too near zero: give 0 or at least {_SMALLEST_EXPONENT}."
            )


def _saturated_exp(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_MAX_EXPONENT).exp()


def _exp_difference(x: Tensor, y: Tensor, difference: Tensor) -> Tensor:
    """exp(x) - exp(y), the larger saturated; exact near zero if `difference` is x - y before rounding."""
    return _saturated_exp(torch.maximum(x, y)) * torch.copysign(torch.expm1(-difference.abs()), difference)
