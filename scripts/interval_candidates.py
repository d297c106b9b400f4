"""Coverage of published 95 % intervals of a mean, on the cells of tests/evaluate/test_intervals.py.

    python scripts/interval_candidates.py [DRAWS]     # 200 draws a cell by default: minutes of one core

A cell is a number of problems, samples of each, a mean, and the correlation of a problem's samples. Prints,
for each interval, the share of cells that it covers with 0.93 to 0.97, its mean and lowest coverage, the
share of cells below 0.915, and its mean width; then the most that any interval can reach where a problem's
samples are all right or all wrong.

Axes: S simulated evaluations, P problems, N samples per problem.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv, gammaln, ndtr, ndtri, stdtrit
from scipy.stats import binom

Floats = NDArray[np.float64]
Bounds = tuple[Floats, Floats]

SIZES, SAMPLES = (10, 30, 100, 500), (1, 4, 32)
MEANS, CORRELATIONS = (0.02, 0.05, 0.2, 0.5, 0.7, 0.9, 0.98), (0.0, 0.1, 0.5, 1.0)
BAND = (0.93, 0.97)
_Z = 1.959964
_SMALL = 1e-9


class Data(NamedTuple):
    """Simulated evaluations."""

    right: Floats
    """Right samples of each problem, [S, P]."""
    samples: int

    @property
    def mean(self) -> Floats:
        return self.right.mean(1) / self.samples


def cells() -> Iterator[tuple[int, int, float, float]]:
    for size, samples, mean in itertools.product(SIZES, SAMPLES, MEANS):
        yield from ((size, samples, mean, rho) for rho in (CORRELATIONS if samples > 1 else (0.0,)))


def draw(generator: np.random.Generator, cell: tuple[int, int, float, float], draws: int) -> Data:
    size, samples, mean, rho = cell
    if rho in (0.0, 1.0):
        rates = (generator.random((draws, size)) < mean) * 1.0 if rho else np.full((draws, size), mean)
    else:
        scale = 1 / rho - 1
        rates = generator.beta(mean * scale, (1 - mean) * scale, (draws, size))
    return Data(generator.binomial(samples, rates).astype(float), samples)


def effect(data: Data, kind: str) -> Floats:
    """The design effect: `ours` as in `mean_interval`; `plain`, the problems' spread over m (1 - m)."""
    values, mean = data.right / data.samples, data.mean
    squares, spread = (values - mean[:, None]) ** 2, mean * (1 - mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = squares.sum(1) / (values.shape[1] - 1) / spread
        if kind == "ours":
            telling = np.minimum((values > 0).sum(1), (values < 1).sum(1))
            found = (telling * found + np.minimum(1, squares.max(1) / spread)) / (telling + 1)
    return np.where(spread < 1e-12, 1.0, np.clip(found, 1 / data.samples, 1.0))


def wilson(right: Floats, size: Floats) -> Bounds:
    center, product = right + _Z**2 / 2, np.maximum(right * (size - right) / size, 0)
    margin = _Z * np.sqrt(product + _Z**2 / 4)
    return np.maximum((center - margin) / (size + _Z**2), 0), np.minimum(
        (center + margin) / (size + _Z**2), 1
    )


def agresti_coull(right: Floats, size: Floats) -> Bounds:
    mean = (right + _Z**2 / 2) / (size + _Z**2)
    margin = _Z * np.sqrt(mean * (1 - mean) / (size + _Z**2))
    return np.maximum(mean - margin, 0), np.minimum(mean + margin, 1)


def jeffreys(right: Floats, size: Floats) -> Bounds:
    wrong = size - right
    low, high = (betaincinv(right + 0.5, wrong + 0.5, tail) for tail in (0.025, 0.975))
    return np.where(right < _SMALL, 0, low), np.where(wrong < _SMALL, 1, high)


def clopper_pearson(right: Floats, size: Floats) -> Bounds:
    wrong = size - right
    low = betaincinv(np.maximum(right, _SMALL), wrong + 1, 0.025)
    high = betaincinv(right + 1, np.maximum(wrong, _SMALL), 0.975)
    return np.where(right < _SMALL, 0, low), np.where(wrong < _SMALL, 1, high)


def mid_p(right: Floats, size: Floats) -> Bounds:
    """Clopper and Pearson's with half of the outcome's own probability (Lancaster 1961), by bisection."""

    def above(chance: Floats) -> Floats:
        at_least = np.where(right < _SMALL, 1, betainc(np.maximum(right, _SMALL), size - right + 1, chance))
        more = np.where(
            size - right < _SMALL, 0, betainc(right + 1, np.maximum(size - right, _SMALL), chance)
        )
        return (at_least + more) / 2

    def solve(tail: float) -> Floats:
        low, high = np.zeros_like(right), np.ones_like(right)
        for _ in range(40):
            middle = (low + high) / 2
            is_low = above(middle) < tail
            low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
        return low

    return np.where(right < _SMALL, 0, solve(0.025)), np.where(size - right < _SMALL, 1, solve(0.975))


def at_effective_size(interval: Callable[[Floats, Floats], Bounds], kind: str) -> Callable[[Data], Bounds]:
    def bounds(data: Data) -> Bounds:
        size = data.right.shape[1] / effect(data, kind)
        return interval(data.mean * size, size)

    return bounds


def korn_graubard(data: Data) -> Bounds:
    """Wilson's, its size also reduced for the degrees of freedom of the spread (Korn and Graubard 1998)."""
    problems = data.right.shape[1]
    size = problems / effect(data, "plain") * (_Z / stdtrit(problems - 1, 0.975)) ** 2
    return wilson(data.mean * size, size)


def two_level(data: Data) -> Bounds:
    """Equal tails of a beta-binomial model's mean: a Jeffreys prior of it, a flat one of the correlation."""
    logs = _model_of(data)
    posterior = np.exp(logs - logs.max((1, 2), keepdims=True)).sum(2)
    shares = np.cumsum(posterior, 1) / posterior.sum(1, keepdims=True)
    places = [
        np.array([np.interp(tail, row, _GRID + 0.5 / len(_GRID)) for row in shares])
        for tail in (0.025, 0.975)
    ]
    low, high = (np.sin(place * np.pi / 2) ** 2 for place in places)
    right = data.mean
    return np.where(right < _SMALL, 0, low), np.where(right > 1 - _SMALL, 1, high)


def profile(data: Data) -> Bounds:
    """Means that a likelihood ratio does not refuse, each with its best correlation (beta-binomial model)."""
    logs = _model_of(data).max(2)
    kept = 2 * (logs.max(1, keepdims=True) - logs) <= _Z**2
    first, last = kept.argmax(1), kept.shape[1] - 1 - kept[:, ::-1].argmax(1)
    low, high = (
        np.sin((place + 0.5 + side) / len(_GRID) * np.pi / 2) ** 2
        for place, side in ((first, -0.5), (last, 0.5))
    )
    right = data.mean
    return np.where(right < _SMALL, 0, low), np.where(right > 1 - _SMALL, 1, high)


def _model_of(data: Data) -> Floats:
    """Log-likelihoods of each evaluation, [S, 400, 20]."""
    tables = _log_likelihoods(data.samples)
    counts = np.stack([np.bincount(row, minlength=data.samples + 1) for row in data.right.astype(int)])
    return (counts @ tables.reshape(len(tables), -1)).reshape(len(counts), *tables.shape[1:])


_GRID = (np.arange(400) + 0.5) / 400  # of arcsine, which is uniform under Jeffreys's prior
_RHO = (np.arange(20) + 0.5) / 20


def _log_likelihoods(samples: int) -> Floats:
    """Of each count of right samples, mean and correlation, [N + 1, 400, 20]."""
    count, mean = np.arange(samples + 1)[:, None, None], (np.sin(_GRID * np.pi / 2) ** 2)[None, :, None]
    scale = (1 / _RHO - 1)[None, None, :]
    first, second = mean * scale, (1 - mean) * scale
    ways = gammaln(samples + 1) - gammaln(count + 1) - gammaln(samples - count + 1)
    drawn = gammaln(count + first) + gammaln(samples - count + second) - gammaln(samples + scale)
    return ways + drawn - gammaln(first) - gammaln(second) + gammaln(scale)


def bootstrap_t(data: Data) -> Bounds:
    """Efron's studentised bootstrap; Wilson's where it is not defined (all problems alike)."""
    values, problems = data.right / data.samples, data.right.shape[1]
    weights = np.random.default_rng(1).multinomial(problems, np.full(problems, 1 / problems), size=400)
    means = values @ weights.T / problems
    spread = np.sqrt(np.maximum(values**2 @ weights.T / problems - means**2, 0))
    centered = np.divide(
        means - data.mean[:, None], spread, out=np.full_like(means, np.inf), where=spread > 1e-6
    )
    ordered = np.sort(centered, axis=1)
    known = np.maximum(np.isfinite(ordered).sum(1), 1)
    tails = [ordered[np.arange(len(ordered)), ((known - 1) * tail).astype(int)] for tail in (0.025, 0.975)]
    deviation = values.std(1)
    with np.errstate(invalid="ignore"):
        low, high = (np.clip(data.mean - tail * deviation, 0, 1) for tail in tails[::-1])
    other = at_effective_size(wilson, "ours")(data)
    lacks = (deviation < 1e-9) | ~np.isfinite(low) | ~np.isfinite(high)
    return np.where(lacks, other[0], low), np.where(lacks, other[1], high)


def accelerated(data: Data) -> Bounds:
    """Efron's bias-corrected and accelerated bootstrap (BCa); Wilson's where all problems are alike."""
    values, problems = data.right / data.samples, data.right.shape[1]
    weights = np.random.default_rng(1).multinomial(problems, np.full(problems, 1 / problems), size=400)
    means = np.sort(values @ weights.T / problems, axis=1)
    away = values - data.mean[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        skew = (away**3).sum(1) / (6 * (away**2).sum(1) ** 1.5)
        below = (means < data.mean[:, None] - 1e-12).mean(1) + (
            abs(means - data.mean[:, None]) <= 1e-12
        ).mean(1) / 2
        bias = ndtri(np.clip(below, 1e-3, 1 - 1e-3))
        shares = [ndtr(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-_Z, _Z)]
    alike = away.std(1) < 1e-9
    places = [
        np.clip(np.nan_to_num(share) * len(weights), 0, len(weights) - 1).astype(int) for share in shares
    ]
    low, high = (means[np.arange(len(means)), place] for place in places)
    other = at_effective_size(wilson, "ours")(data)
    return np.where(alike, other[0], low), np.where(alike, other[1], high)


def student(data: Data) -> Bounds:
    problems = data.right.shape[1]
    error = (data.right / data.samples).std(1, ddof=1) / math.sqrt(problems)
    margin = stdtrit(problems - 1, 0.975) * error
    return data.mean - margin, data.mean + margin


INTERVALS: dict[str, Callable[[Data], Bounds]] = {
    "Wilson, our design effect": at_effective_size(wilson, "ours"),
    "Wilson, plain design effect": at_effective_size(wilson, "plain"),
    "Wilson, Korn and Graubard": korn_graubard,
    "Jeffreys, our design effect": at_effective_size(jeffreys, "ours"),
    "Jeffreys, plain design effect": at_effective_size(jeffreys, "plain"),
    "mid-P, our design effect": at_effective_size(mid_p, "ours"),
    "Agresti and Coull, our design effect": at_effective_size(agresti_coull, "ours"),
    "Clopper and Pearson, our design effect": at_effective_size(clopper_pearson, "ours"),
    "two-level Bayesian (beta-binomial)": two_level,
    "profile likelihood (beta-binomial)": profile,
    "bootstrap-t": bootstrap_t,
    "bootstrap, BCa": accelerated,
    "Student": student,
}


def reachable(size: int) -> int:
    """Means for which some range of right problems, k to l of `size`, has a probability within the band.

    What lies in a range for one mean is covered there; no interval that says the same of the same data does
    better, and one that treats right and wrong alike has a symmetric range at 0.5.
    """
    count = 0
    for mean in MEANS:
        below = np.concatenate([[0.0], binom.cdf(np.arange(size + 1), size, mean)])
        masses = below[None, 1:] - below[:-1, None]
        allowed = np.triu(np.ones_like(masses, dtype=bool))
        if mean == 0.5:
            allowed &= np.add.outer(np.arange(size + 1), np.arange(size + 1)) == size
        count += bool((allowed & (masses >= BAND[0]) & (masses <= BAND[1])).any())
    return count


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    generator, found = np.random.default_rng(8), {name: [] for name in INTERVALS}
    for cell in cells():
        data = draw(generator, cell, draws)
        for name, interval in INTERVALS.items():
            low, high = interval(data)
            held = (low <= cell[2] + 1e-12) & (cell[2] - 1e-12 <= high)
            found[name].append((held.mean(), (high - low).mean()))
    print(f"{draws} draws of {len(found['Student'])} cells")
    for name, results in found.items():
        held, width = np.array(results).T
        inside = ((held >= BAND[0]) & (held <= BAND[1])).mean()
        low = (held < 0.915).mean()
        print(
            f"| {name} | {inside:.0%} | {held.mean():.3f} | {held.min():.3f} | {low:.0%} "
            f"| {width.mean():.3f} |"
        )
    print({size: f"{reachable(size)} of {len(MEANS)}" for size in SIZES})


if __name__ == "__main__":
    main()
