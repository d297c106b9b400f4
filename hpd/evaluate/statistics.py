"""Figures of an evaluation and their errors.

Axes: P problems, N samples per problem; NaN is an answer that was not graded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
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
    "sign_flip_test",
    "wilson_interval",
]

Floats = NDArray[np.float64]
Bounds = tuple[float, float]
"""Of a 95 % interval."""
Figure = Callable[[Floats], Floats]
"""From row weights [S, R] to the figure of each resample [S]."""

_Z_95 = 1.959964  # 97.5 % quantile of the normal distribution
_RESAMPLES = 2000
_MAX_EXACT = 16
"""Pairs up to which every one of the 2^n sign patterns is tried."""
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


def wilson_interval(num_correct: float, num_examples: float) -> Bounds:
    r"""95 % interval of a proportion k/n; unlike the normal one it stays inside [0, 1] and is not empty at 0
    or 1. Neither number need be whole: n may be an effective sample size.

    .. math:: \frac{k + z^2/2 \pm z \sqrt{k (n - k) / n + z^2 / 4}}{n + z^2}

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    center = num_correct + _Z_95**2 / 2
    product = num_correct * (num_examples - num_correct) / num_examples
    margin = _Z_95 * math.sqrt(max(0.0, product) + _Z_95**2 / 4)
    low, high = ((center + side) / (num_examples + _Z_95**2) for side in (-margin, margin))
    return max(0.0, low), min(1.0, high)


def mean_over_problems(values: Floats) -> Floats:
    """Mean over the graded samples of each problem, [P'] for the P' problems with at least one graded
    sample."""
    graded = ~np.isnan(values)
    kept = graded.any(axis=1)
    return np.where(graded, values, 0.0)[kept].sum(axis=1) / graded[kept].sum(axis=1)


def mean_interval(values: Floats) -> Bounds:
    r"""95 % interval of the mean: the error from having these problems and these samples of them, and no
    others.

    Values in [0, 1]: Wilson's interval at the effective sample size P / d. The design effect d compares the
    spread of the problems' means :math:`x_i` with that of problems that are all right or all wrong,

    .. math:: d = \frac{u\, \hat d + \min(1, \max_i (x_i - m)^2 / v)}{u + 1}, \qquad
              \hat d = \frac{\sum_i (x_i - m)^2}{(P - 1)\, v}, \qquad v = m (1 - m),

    where u counts the problems that say something: those with a right sample, or those with a wrong one,
    whichever are fewer. The second term is the furthest problem once more, at most one of the all-or-nothing
    kind; where every answer is wrong (or right) nothing is known of d, and it is 1. Of 0/1 samples d is
    at least 1/N, and with one sample each this is Wilson's interval of P answers. docs/evidence/grading.md
    has the simulated coverage. Other values (ratings): Student's interval of the problems' means; NaN for one
    problem.

    Reference:
        Wilson's interval with an effective sample size: Dean and Pagano, Evaluating confidence interval
        methods for binomial proportions in clustered surveys, 2015; Korn and Graubard, 1998. The furthest
        problem once more is this package's.
    """
    means = mean_over_problems(values)
    num_problems, mean = len(means), float(means.mean())
    squares = (means - mean) ** 2
    graded = values[~np.isnan(values)]
    if graded.min() < 0 or graded.max() > 1:
        if num_problems == 1:
            return math.nan, math.nan
        return _student(mean, float(squares.sum() / (num_problems - 1) / num_problems), num_problems - 1)
    spread = mean * (1 - mean)
    if spread < 1e-12 or num_problems == 1:
        return wilson_interval(mean * num_problems, num_problems)
    telling = min((means > 0).sum(), (means < 1).sum())
    observed = squares.sum() / (num_problems - 1) / spread
    effect = (telling * observed + min(1.0, squares.max() / spread)) / (telling + 1)
    whole = bool(np.isin(graded, (0.0, 1.0)).all())
    effect = min(1.0, max(effect, num_problems / len(graded) if whole else 0.0))
    return wilson_interval(mean * num_problems / effect, num_problems / effect)


def sampling_interval(values: Floats) -> Bounds:
    r"""95 % interval of the mean that ever more samples of the same problems would have.

    As `mean_interval`, with the effective sample size P N / d, where d is the samples' spread within their
    problems against m (1 - m), and one more degree of freedom of d = 1. All right or all wrong: Wilson's of
    P N samples.
    """
    values = values[~np.isnan(values).any(axis=1)]
    num_problems, num_samples = values.shape
    mean = float(values.mean())
    within = float(values.var(axis=1, ddof=1).mean())
    freedom = num_problems * (num_samples - 1)
    if values.min() < 0 or values.max() > 1:
        return _student(mean, within / values.size, freedom)
    spread = mean * (1 - mean)
    effect = (freedom * within / spread + 1) / (freedom + 1) if spread >= 1e-12 else 1.0
    size = values.size / min(1.0, effect)
    return wilson_interval(mean * size, size)


def _student(mean: float, variance: float, freedom: int) -> Bounds:
    """Student's 95 % interval, of the variance of a mean."""
    from scipy.special import stdtrit  # scipy.stats would take half a second

    margin = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return mean - margin, mean + margin


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
    """95 % interval of the difference, over problems."""
    p_value: float
    """Two-sided, of no difference."""
    test: str
    """"McNemar" (exact) or "sign flips"."""
    num_problems: int
    """Problems that are graded for both."""


def compare_paired(first: Floats, second: Floats) -> PairedDifference:
    r"""Test whether two models differ, problem by problem.

    Exact McNemar where every problem has one 0/1 value: the two-sided binomial test on the problems that only
    one of them solves. Else the paired permutation test (`sign_flip_test`). Neither finds a difference that
    is not there more often than it says, however few the problems.

    The interval is normal, with the variance of the differences :math:`d_i` taken as if the furthest from 0
    came once more (1 where all are 0, since P equal problems do not prove the next one equal):

    .. math:: \bar d \pm z \sqrt{s^2 / P}, \qquad s^2 = \frac{1}{P} \Big(\sum_i (d_i - \bar d)^2 +
              \max_i d_i^2\Big)

    Args:
        first, second: [P, N] of the same problems in the same order; the numbers of samples may differ.

    References:
        McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika
        1947. Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions
        based on paired data, 2012, whose pseudo-pair this follows.
    """
    both = ~(np.isnan(first).all(axis=1) | np.isnan(second).all(axis=1))
    one = mean_over_problems(first[both])
    two = mean_over_problems(second[both])
    differences = two - one
    single = first.shape[1] == second.shape[1] == 1 and np.isin([one, two], (0.0, 1.0)).all()
    if single:
        from scipy.stats import binomtest  # half a second that only comparisons spend

        better = int((differences > 0).sum())
        worse = int((differences < 0).sum())
        p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        p_value = sign_flip_test(differences)
    mean = float(differences.mean())
    furthest = float(np.square(differences).max()) or 1.0
    variance = (float(np.square(differences - mean).sum()) + furthest) / len(differences)
    margin = _Z_95 * math.sqrt(variance / len(differences))
    test = "McNemar" if single else "sign flips"
    return PairedDifference(mean, (mean - margin, mean + margin), p_value, test, len(differences))


def sign_flip_test(
    differences: Sequence[float] | Floats, num_resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided paired permutation test of a zero mean: every pair could as well have been the other way
    round.

    Exact up to 16 pairs, where the smallest p there can be is 2^(1 - n); above, random signs and the (count +
    1) / (draws + 1) rule. NaN for fewer than two pairs.

    >>> sign_flip_test([1.0, 2.0, 3.0])
    0.25
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < 2 or not np.any(d):
        return 1.0 if len(d) >= 2 else math.nan
    observed = abs(d.sum()) * (1 - 1e-9)  # ties by rounding count as reached
    if len(d) <= _MAX_EXACT:
        return float((np.abs(_all_signs(len(d)) @ d) >= observed).mean())
    generator = np.random.default_rng(seed)
    reached = 0
    for start in range(0, num_resamples, _BLOCK):
        signs = generator.choice((-1.0, 1.0), size=(min(_BLOCK, num_resamples - start), len(d)))
        reached += int((np.abs(signs @ d) >= observed).sum())
    return float((reached + 1) / (num_resamples + 1))


@lru_cache(maxsize=1)
def _all_signs(num_pairs: int) -> Floats:
    return np.array(list(itertools.product((1.0, -1.0), repeat=num_pairs)))
