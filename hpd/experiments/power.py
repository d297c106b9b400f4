"""What a paired test over few seeds can find, known before it says that it found nothing."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import optimize, stats

__all__ = ["MAX_EFFECT", "MIN_SEEDS", "can_decide", "needed_effect"]

MIN_SEEDS = 3
"""Below it no verdict is given: with two seeds a sign-flip test cannot go below p = 0.5, and a t-test's
spread comes from one number."""
MAX_EFFECT = 3.0
"""A test that needs a larger effect (in standard deviations of the paired differences) has not searched. At
p < 0.05 four seeds need 2.1 and three need 3.3."""
_POWER = 0.8
_POINTS = 2000


@functools.cache
def needed_effect(num_seeds: int, level: float = 0.05) -> float:
    r"""Mean over standard deviation of paired differences that a t-test finds in 80% of repeats.

    The power at an effect :math:`d` is :math:`E_s\,\Phi(d \sqrt n - t\, s)`, with the critical value
    :math:`t` of :math:`n - 1` degrees of freedom and :math:`s^2 \sim \chi^2_{n-1} / (n - 1)`; the wrong tail
    is left out.

    Args:
        num_seeds: pairs, n; below 2 there is no test and the answer is infinite.
        level: two-sided, after correction: 0.05 / 20 for one of twenty tests.

    Reference:
        Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, section 2.

    >>> round(needed_effect(4), 2), round(needed_effect(8, 0.05 / 68), 2)
    (2.13, 2.48)
    """
    if num_seeds < 2:
        return math.inf
    freedom = num_seeds - 1
    critical = stats.t.ppf(1 - level / 2, freedom)
    quantiles = (np.arange(_POINTS) + 0.5) / _POINTS
    spread = np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)

    def missing(effect: float) -> float:
        return float(stats.norm.cdf(effect * math.sqrt(num_seeds) - critical * spread).mean()) - _POWER

    return float(optimize.brentq(missing, 0.0, 10.0 * critical))  # type: ignore[arg-type]


def can_decide(num_seeds: int) -> bool:
    """True if so many seeds can find an effect of ordinary size, so that finding none means something."""
    return num_seeds >= MIN_SEEDS and needed_effect(num_seeds) <= MAX_EFFECT
