"""Figures of an evaluation and their errors.

Axes: P problems, N samples per problem; NaN is an answer that was not graded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Comparison",
    "Estimate",
    "Statistic",
    "compare_paired",
    "estimate",
    "majority",
    "mean_interval",
    "mean_over_problems",
    "pass_at_k",
    "ratio",
    "row_weights",
    "sampling_interval",
    "wilson_interval",
]


Floats = NDArray[np.float64]


Interval = tuple[float, float]


_Z_95 = 1.959964  # 97.5 % quantile of the normal distribution


_RESAMPLES = 2000


_SEED = 0  # of the resampling: the same values give the same interval


def wilson_interval(num_correct: int, num_examples: int) -> Interval:
    r"""95 % interval of a proportion k/n; unlike the normal one it stays inside [0, 1] and is not empty at 0
    or 1.

    .. math:: \frac{k + z^2/2 \pm z \sqrt{k (n - k) / n + z^2 / 4}}{n + z^2}

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    centre = num_correct + _Z_95**2 / 2
    margin = _Z_95 * math.sqrt(num_correct * (num_examples - num_correct) / num_examples + _Z_95**2 / 4)
    low, high = ((centre + side) / (num_examples + _Z_95**2) for side in (-margin, margin))
    return max(0.0, low), min(1.0, high)


def mean_over_problems(values: Floats) -> Floats:
    """Mean over the graded samples of each problem, [P'] for the P' problems with at least one graded
    sample."""
    graded = ~np.isnan(values)
    kept = graded.any(axis=1)
    return np.where(graded, values, 0.0)[kept].sum(axis=1) / graded[kept].sum(axis=1)


def mean_interval(values: Floats) -> Interval:
    """95 % interval of the mean: the error from having these problems and these samples of them, and no
    others.

    One 0/1 sample per problem: Wilson's. Else problems are resampled with all their samples, which carries
    both errors (percentile bootstrap; Efron 1979).
    """
    means = mean_over_problems(values)
    if values.shape[1] == 1 and np.isin(means, (0.0, 1.0)).all():
        return wilson_interval(int(means.sum()), len(means))
    return _bootstrap(means)


def sampling_interval(values: Floats) -> Interval:
    """95 % interval of the mean over what another run on the same problems would draw: samples resampled
    within problems."""
    generator = np.random.default_rng(_SEED)
    values = values[~np.isnan(values).any(axis=1)]
    num_problems, num_samples = values.shape
    rows = np.arange(num_problems)[:, None]
    means = [
        values[rows, generator.integers(num_samples, size=values.shape)].mean() for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _bootstrap(means: Floats) -> Interval:
    low, high = np.quantile(_resampled_means(means), [0.025, 0.975])
    return float(low), float(high)


def _resampled_means(values: Floats) -> Floats:
    """Means of resamples with replacement, [_RESAMPLES]."""
    generator = np.random.default_rng(_SEED)
    size = len(values)
    parts = [values[generator.integers(size, size=(_RESAMPLES // 20, size))].mean(axis=1) for _ in range(20)]
    return np.concatenate(parts)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""Unbiased estimate, from n samples of which c are correct, of the chance that one of k samples is.

    .. math:: 1 - \binom{n - c}{k} / \binom{n}{k}

    >>> pass_at_k(10, 3, 1), round(pass_at_k(10, 3, 5), 4)
    (0.3, 0.9167)

    Reference:
        Chen et al., Evaluating Large Language Models Trained on Code, 2021, arXiv 2107.03374, eq. 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples, got k={k} of {num_samples} samples.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(
    answers: Sequence[str | None], correct: Sequence[bool | None], same: Callable[[str, str], bool]
) -> float:
    """Whether the answer that most samples give is right; in a tie, the share of right ones among the most
    frequent.

    Samples without an answer do not vote; without any vote the result is 0.
    """
    groups: list[tuple[str, list[bool]]] = []
    for answer, verdict in zip(answers, correct, strict=True):
        if answer is None or verdict is None:
            continue
        group = next((group for representative, group in groups if same(representative, answer)), None)
        if group is None:
            groups.append((answer, [verdict]))
        else:
            group.append(verdict)
    most = max((len(group) for _, group in groups), default=0)
    # Where the grader is finer than `same`, the representative decides.
    winners = [group[0] for _, group in groups if len(group) == most]
    return sum(winners) / len(winners) if winners else 0.0


class Comparison(NamedTuple):
    """Two models on the same problems."""

    difference: float
    """Second minus first."""
    interval: Interval
    """95 % bootstrap interval of the difference, over problems."""
    p_value: float
    """Two-sided, of no difference."""
    test: str
    """"McNemar" (exact) or "bootstrap"."""
    num_problems: int
    """Problems that are graded for both."""


def compare_paired(first: Floats, second: Floats) -> Comparison:
    """Test whether two models differ, problem by problem.

    Exact McNemar where every problem has one 0/1 value: the two-sided binomial test on the problems that only
    one of them solves. Else a paired bootstrap over problems: twice the smaller share of resamples on one
    side of 0.

    Args:
        first, second: [P, N] of the same problems in the same order; the numbers of samples may differ.

    References:
        McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika
        1947. Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 15 (achieved significance
           level).
    """
    both = ~(np.isnan(first).all(axis=1) | np.isnan(second).all(axis=1))
    one, two = mean_over_problems(first[both]), mean_over_problems(second[both])
    differences = two - one
    resampled = _resampled_means(differences)
    low, high = np.quantile(resampled, [0.025, 0.975])
    single = (
        first.shape[1] == 1
        and second.shape[1] == 1
        and bool(np.isin(np.concatenate([one, two]), (0.0, 1.0)).all())
    )
    if single:
        from scipy.stats import binomtest  # half a second that only comparisons spend

        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        tail = min((resampled <= 0).mean(), (resampled >= 0).mean())
        p_value = float(min(1.0, 2 * (tail * _RESAMPLES + 1) / (_RESAMPLES + 1)))
    test = "McNemar" if single else "bootstrap"
    return Comparison(float(differences.mean()), (float(low), float(high)), p_value, test, len(differences))


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
    """How often each resample drew each row, [S, R]. One matrix for two figures makes their difference a
    paired one."""
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
