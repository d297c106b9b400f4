"""The figures of a report: their names in words, their direction, and how a number of them is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hpd.experiments.power import MIN_SEEDS
from hpd.experiments.statistics import mean_interval

__all__ = [
    "PLAIN",
    "SPREAD_NOTE",
    "Scale",
    "Spread",
    "higher_is_better",
    "is_entropy",
    "label",
    "over",
    "scale_of",
    "words",
]

_LABELS = {
    "loss": "loss",
    "forward_kl": "KL(teacher || student), nats",
    "reverse_kl": "KL(student || teacher), nats",
    "student_entropy": "student's entropy on teacher text, nats",
    "teacher_entropy": "teacher's entropy, nats",
    "grad_norm": "gradient norm",
    "accuracy": "accuracy",
    "sampled_accuracy": "accuracy, sampled at temperature 1",
    "own_entropy": "student's entropy on its own text, nats",
    "own_reverse_kl": "KL(student || teacher) on own text, nats",
    "own_forward_kl": "KL(teacher || student) on own text, nats",
    "top1_agreement": "agreement on the likeliest token",
    "validation_forward_kl": "KL(teacher || student) on validation rows, nats",
    "clipped_share": "share of steps with a clipped gradient",
}
# Figures that each of several sets of validation rows has, with the set's name in front.
_OF_VALIDATION = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement", "loss")
_LOWER = ("loss", "kl", "perplexity", "tokens", "seconds", "flops")
_LEVELS = ("_low_entropy", "_mid_entropy", "_high_entropy")
"""Ends of a figure that is taken over a third of the positions, by the teacher's entropy there."""
_SHARES = ("accuracy", "agreement", "share")
_NEUTRAL = ("clipped_share",)
SPREAD_NOTE = (
    "95 % interval over seeds (Student's t: another training run, the same test problems), or with fewer "
    f"than {MIN_SEEDS} seeds the lowest and the highest"
)


class Spread(NamedTuple):
    """A mean over seeds and where it lies: an interval, or with too few seeds their range."""

    mean: float
    low: float
    high: float
    num_values: int

    @property
    def is_interval(self) -> bool:
        return self.num_values >= MIN_SEEDS


class Scale(NamedTuple):
    """The range of a metric, and whether it is written in percent."""

    low: float = -math.inf
    high: float = math.inf
    percent: bool = False

    @property
    def factor(self) -> float:
        """What a figure multiplies a value by."""
        return 100.0 if self.percent else 1.0

    @property
    def change(self) -> Scale:
        """The scale of a difference between two values."""
        return Scale(self.low - self.high, self.high - self.low, self.percent)

    def spread(self, values: Sequence[float]) -> Spread:
        """Mean and Student's 95 % interval, kept within the range; below `MIN_SEEDS` values the lowest and
        the highest, since an interval from two values says nothing (0.04 ± 0.51)."""
        found = mean_interval(values)
        if found.num_values < MIN_SEEDS:
            low, high = min(values, default=math.nan), max(values, default=math.nan)
            return Spread(found.mean, low, high, found.num_values)
        return Spread(found.mean, max(found.low, self.low), min(found.high, self.high), found.num_values)

    def value(self, value: float) -> str:
        """`95.6%`, or three significant digits."""
        if math.isnan(value):
            return ""
        return f"{_tenths(value)}%" if self.percent else _significant(value)

    def bounds(self, low: float, high: float) -> str:
        """`94.7 to 96.6`, in the unit of `value`."""
        if math.isnan(low) or math.isnan(high):
            return ""
        shown = [_tenths(bound) if self.percent else _significant(bound) for bound in (low, high)]
        return " to ".join(shown)

    def difference(self, value: float) -> str:
        """`-3.6 points` of percent, or three significant digits; signed."""
        if math.isnan(value):
            return ""
        return f"{float(_tenths(value)):+.1f} points" if self.percent else f"{value:+#.3g}".rstrip(".")

    def about(self, spread: Spread) -> str:
        """What stands behind the mean: `94.7 to 96.6`, `2 seeds: 0.0 to 8.0`, `all 3 seeds`."""
        seeds = f"{spread.num_values} seed{'s' * (spread.num_values != 1)}"
        if spread.num_values < 2:
            return seeds if spread.num_values else ""
        if math.isclose(spread.low, spread.high, rel_tol=1e-9):
            return f"all {seeds}"
        text = self.bounds(spread.low, spread.high)
        return text if spread.is_interval else f"{seeds}: {text}"


PLAIN = Scale()
"""Of a number that can be anything."""


def scale_of(metric: str, graded: bool = False) -> Scale:
    """The scale of a metric, by its name.

    Args:
        graded: its values are means of grades from 0 to 1, whatever its name.
    """
    if graded or any(part in metric for part in _SHARES):
        return Scale(0.0, 1.0, percent=True)
    if is_entropy(metric) or metric.endswith(("kl", *_LEVELS)):
        return Scale(low=0.0)
    return PLAIN


def higher_is_better(metric: str) -> bool | None:
    """True or False; None for a metric that is neither better high nor low (entropies, clipped steps)."""
    if is_entropy(metric) or metric in _NEUTRAL:
        return None
    for level in _LEVELS:
        metric = metric.removesuffix(level)
    return not any(metric == part or metric.endswith(f"_{part}") for part in _LOWER)


def is_entropy(metric: str) -> bool:
    """True for an entropy, which has the teacher's as its mark; not for a KL where the entropy is low."""
    return "entropy" in metric and not metric.endswith(_LEVELS)


def words(metric: str) -> str:
    """The metric's name as a column heading."""
    return metric.replace("_", " ")


def label(metric: str) -> str:
    """The metric in words, with its unit."""
    of = next((name for name in _OF_VALIDATION if metric.endswith(f"_{name}")), None)
    if metric not in _LABELS and of is not None:
        return f"{_LABELS[of]}, of {metric.removesuffix(f'_{of}')}"
    return _LABELS.get(metric, words(metric))


def over(metric: str, what: str) -> str:
    """The title of a figure: `accuracy over limit`, `KL(teacher || student), nats, over limit`."""
    text = label(metric)
    return f"{text}{',' if ',' in text else ''} over {what}"


def _tenths(value: float) -> str:
    """In percent; never "-0.0"."""
    return f"{round(100 * value, 1) + 0.0:.1f}"


def _significant(value: float) -> str:
    """Three digits, zeros at the end included, so that columns line up."""
    if not value or math.isinf(value):
        return f"{value:g}"
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1e4 else f"{value:,.0f}"
