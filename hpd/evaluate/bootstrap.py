"""Confidence intervals by resampling rows.

Axes: S resamples, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "Statistic", "estimate", "ratio", "row_weights"]

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From row weights [S, R] to the figure of each resample [S]."""

_ROW_RESAMPLES = 1000


class Estimate(NamedTuple):
    """A figure and its 95 % interval: the error from having these rows and no others."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | list[float]]:
        return {"value": self.value, "interval": [self.low, self.high]}


def row_weights(num_rows: int, seed: int = 0, resamples: int = _ROW_RESAMPLES) -> Floats:
    """How often each resample drew each row, [S, R]. One matrix for two figures makes their difference a paired one."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=resamples).astype(np.float64)


def ratio(numerator: Floats, denominator: Floats) -> Statistic:
    """Sum over rows / sum over rows: a mean over tokens where the rows hold sums over theirs."""
    return lambda weights: (weights @ numerator) / (weights @ denominator)


def estimate(statistic: Statistic, weights: Floats) -> Estimate:
    """The figure of the rows as they are, and the 2.5 % and 97.5 % quantiles over the resamples.

    Reference:
        Efron, Bootstrap Methods: Another Look at the Jackknife, 1979 (percentile method).
    """
    value = statistic(np.ones((1, weights.shape[1])))[0]
    low, high = np.quantile(statistic(weights), [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
