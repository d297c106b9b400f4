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
    "Estimate",
    "Figure",
    "PairedDifference",
    "compare_paired",
    "estimate",
    "majority",
    "mean_interval",
    "mean_over_problems",
    "pass_at_k",
    "ratio",
    "resample",
    "sampling_interval",
    "wilson_interval",
]

Floats = NDArray[np.float64]
Bounds = tuple[float, float]
"""Of a 95 % interval."""
Figure = Callable[[Floats], Floats]
"""From row weights [S, R] to the figure of each resample [S]."""

_Z_95 = 1.959964  # 97.5 % quantile of the normal distribution
_RESAMPLES = 2000
_BLOCK = 200
"""Resamples held at once: with R rows they take 1.6 R kilobytes."""


def resample(figure: Callable[..., Floats], *sizes: int, count: int = _RESAMPLES, seed: int = 0) -> Floats:
    """Draw rows with replacement and take a figure of each draw, [count]; equal seeds draw equal rows.

    Not `scipy.stats.bootstrap`, which refuses a single row and gives no weights to figures that need them.

    Args:
        figure: takes how often each resample drew each row, `[S, R]` floats for each of `sizes`; returns
            `[S]`.
        sizes: numbers of rows; what several of them count is drawn independently, such as seeds and examples.
        count: number of resamples.
        seed: of the draws.

    Reference:
        Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.
    """
    generator = np.random.default_rng(seed)
    blocks = [min(_BLOCK, count - start) for start in range(0, count, _BLOCK)]
    return np.concatenate([figure(*(_weights(generator, size, block) for size in sizes)) for block in blocks])


def _weights(generator: np.random.Generator, size: int, block: int) -> Floats:
    return generator.multinomial(size, np.full(size, 1 / size), size=block).astype(np.float64)


def ratio(numerator: Floats, denominator: Floats | float = 1.0) -> Figure:
    """Sum over rows / sum over rows: a mean over tokens where the rows hold sums over theirs; over rows by
    default."""
    whole = np.broadcast_to(denominator, numerator.shape)
    return lambda weights: (weights @ numerator) / (weights @ whole)


def _middle(values: Floats) -> Bounds:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


class Estimate(NamedTuple):
    """A figure and its 95 % interval: the error from having these rows and no others."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | list[float]]:
        return {"value": self.value, "interval": [self.low, self.high]}


def estimate(figure: Figure, num_rows: int, seed: int = 0) -> Estimate:
    """The figure of the rows as they are, and its percentile interval over resampled rows."""
    value = figure(np.ones((1, num_rows)))[0]
    return Estimate(float(value), *_middle(resample(figure, num_rows, seed=seed)))


def wilson_interval(num_correct: int, num_examples: int) -> Bounds:
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


def mean_interval(values: Floats) -> Bounds:
    """95 % interval of the mean: the error from having these problems and these samples of them, and no
    others.

    One 0/1 sample per problem: Wilson's. Else problems are resampled with all their samples, which carries
    both errors (percentile bootstrap; Efron 1979).
    """
    means = mean_over_problems(values)
    if values.shape[1] == 1 and np.isin(means, (0.0, 1.0)).all():
        return wilson_interval(int(means.sum()), len(means))
    return _middle(resample(ratio(means), len(means)))


def sampling_interval(values: Floats) -> Bounds:
    """95 % interval of the mean over what another run on the same problems would draw: samples resampled
    within problems."""
    values = values[~np.isnan(values).any(axis=1)]
    num_problems, num_samples = values.shape

    def mean(*weights: Floats) -> Floats:
        return np.sum([w @ row for w, row in zip(weights, values, strict=True)], axis=0) / values.size

    return _middle(resample(mean, *[num_samples] * num_problems))


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
    """1 if the answer that most samples give is right, else 0; in a tie, the share of right ones among them.

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


class PairedDifference(NamedTuple):
    """Two models on the same problems."""

    difference: float
    """Second minus first."""
    interval: Bounds
    """95 % bootstrap interval of the difference, over problems."""
    p_value: float
    """Two-sided, of no difference."""
    test: str
    """"McNemar" (exact) or "bootstrap"."""
    num_problems: int
    """Problems that are graded for both."""


def compare_paired(first: Floats, second: Floats) -> PairedDifference:
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
    one = mean_over_problems(first[both])
    two = mean_over_problems(second[both])
    differences = two - one
    resampled = resample(ratio(differences), len(differences))
    single = first.shape[1] == second.shape[1] == 1 and np.isin([one, two], (0.0, 1.0)).all()
    if single:
        from scipy.stats import binomtest  # half a second that only comparisons spend

        better = int((differences > 0).sum())
        worse = int((differences < 0).sum())
        p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        tail = min((resampled <= 0).mean(), (resampled >= 0).mean())
        p_value = float(min(1.0, 2 * (tail * _RESAMPLES + 1) / (_RESAMPLES + 1)))
    test = "McNemar" if single else "bootstrap"
    return PairedDifference(float(differences.mean()), _middle(resampled), p_value, test, len(differences))
