"""What the tests of a grid say: a table of verdicts, a table of every number, and where seeds are too few."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, get_args

from hpd.experiments.metrics import Scale, words
from hpd.experiments.power import MAX_EFFECT
from hpd.experiments.statistics import VariantComparison, Verdict
from hpd.experiments.table import Table, TableCell, number

__all__ = ["TONES", "comparison_table", "summarize", "verdict_table", "warnings_about"]

TONES: dict[str, str] = {
    "win": "win",
    "loss": "loss",
    "no difference found": "none",
    "too few seeds": "few",
}
"""Verdict -> the tone of its cell."""


def summarize(comparisons: Sequence[VariantComparison]) -> str:
    """The number of each verdict, in one sentence."""
    if not comparisons:
        return ""
    counts = Counter(c.verdict for c in comparisons)
    found = ", ".join(f"{name}: {counts[name]}" for name in get_args(Verdict) if counts[name])
    tests = f"{len(comparisons)} test{'s' * (len(comparisons) != 1)}"
    return f"Against {_baseline(comparisons)}, {tests}, Holm's correction: {found}."


def _baseline(comparisons: Sequence[VariantComparison]) -> str:
    """The one baseline, or words for the one that each method has."""
    names = {c.baseline for c in comparisons}
    return next(iter(names)) if len(names) == 1 else "its baseline"


def verdict_table(comparisons: Sequence[VariantComparison], scales: Mapping[str, Scale]) -> Table | None:
    """A row per method, a column per metric; None without tests."""
    if not comparisons:
        return None
    metrics = list(dict.fromkeys(c.metric for c in comparisons))
    found = {(c.variant, c.metric): _verdict_cell(c, scales[c.metric]) for c in comparisons}
    rows = [
        (method, *(found.get((method, metric), "") for metric in metrics))
        for method in dict.fromkeys(c.variant for c in comparisons)
    ]
    note = (
        f"Difference to {_baseline(comparisons)} with its 95 % interval, and p after Holm's correction for "
        f"all {len(comparisons)} tests. The interval is that of one test, so it can leave 0 out where no "
        "difference was found."
    )
    columns = (f"against {_baseline(comparisons)}", *map(words, metrics))
    return Table("verdicts", "Verdicts", note, columns, rows)


def _verdict_cell(c: VariantComparison, scale: Scale) -> TableCell:
    interval = scale.bounds(c.low, c.high)
    parts = [scale.difference(c.difference) + (f" ({interval})" if interval else "")]
    if not math.isnan(c.p_holm):
        parts.append(f"p {'<0.0001' if c.p_holm < 1e-4 else f'{c.p_holm:.2g}'}")
    if c.verdict == "too few seeds":
        parts = [f"{c.num_seeds} seed{'s' * (c.num_seeds != 1)}", parts[0]]
    return TableCell(c.verdict, c.verdict, TONES[c.verdict], ", ".join(filter(None, parts)))


def warnings_about(
    comparisons: Sequence[VariantComparison], added: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Where seeds are too few for a verdict, or for so many tests, or came after results were known.

    Args:
        added: when repetitions were added and how many runs were finished by then, of the manifest.

    Reference:
        Armitage, McPherson and Rowe, Repeated significance tests on accumulating data, 1969.
    """
    few = [c for c in comparisons if c.verdict == "too few seeds"]
    unfound = [c for c in comparisons if c.verdict == "no difference found"]
    warnings = []
    if few:
        counts = sorted({c.num_seeds for c in few})
        warnings.append(
            f"{len(few)} of {len(comparisons)} comparisons have {' or '.join(map(str, counts))} "
            f"seed{'s' * (counts != [1])} and no verdict: tests of so few seeds miss most effects smaller "
            f"than {MAX_EFFECT:g} standard deviations over seeds, so that no difference shows there means "
            "nothing. Run at least 4 seeds, better 8: add them to the file, behind the others; what is "
            "finished is kept."
        )
    effects = [c.detectable / c.deviation for c in unfound if c.deviation > 0]
    if effects and median(effects) > MAX_EFFECT:
        warnings.append(
            f"Weak tests: corrected for {len(comparisons)} tests, {unfound[0].num_seeds} seeds find only "
            f"differences of {median(effects):.2g} standard deviations over seeds or more (in 80% of "
            'repeats; the column detectable). Read the intervals, not the words "no difference found".'
        )
    looks = [step for step in added if step["finished"]]
    if comparisons and looks:
        times = "; ".join(
            f"{step['at'][:10]}, when {step['finished']} of {step['runs']} runs were finished"
            for step in looks
        )
        warnings.append(
            f"Repetitions were added later ({times}). If results decided about that, the tests find more "
            "than they should: of tests at 5% where nothing differs, about 8 in 100 find something at one of "
            "two looks and 14 at one of five."
        )
    return warnings


def comparison_table(comparisons: Sequence[VariantComparison], scales: Mapping[str, Scale]) -> Table:
    """Every test with every number, wins and the lack of them alike."""
    rows = [
        (
            c.variant,
            words(c.metric),
            TableCell(c.verdict, c.verdict, TONES[c.verdict]),
            _difference_cell(c, scales[c.metric]),
            TableCell(scales[c.metric].difference(c.detectable).removeprefix("+"), c.detectable),
            number(c.p_holm, 2),
            number(c.p_seeds, 2),
            number(c.p_permutation, 2),
            number(c.p_examples, 2),
            number(c.d_z),
            number(c.delta, 2),
            c.num_seeds,
            c.num_examples or "",
        )
        for c in comparisons
    ]
    baseline = _baseline(comparisons)
    seeds = max((c.num_seeds for c in comparisons), default=0)
    floor = f" With {seeds} seeds it cannot go below {2.0 ** (1 - seeds):.2g}." if seeds > 1 else ""
    note = (
        f"Every method minus {baseline}, runs paired by seed. A win or loss needs a paired t-test below 0.05 "
        f"after Holm's correction for all {len(comparisons)} tests and a 95 % interval without 0. The "
        "interval is Student's over seeds and, where answers are graded, over test problems too. "
        "Detectable: what the test finds in 80% of repeats, so corrected. "
        f"Permutation: signs of the seeds' differences flipped.{floor} Over test problems: the same over "
        "problems, which speaks of these trained models only. d_z: mean difference in its own standard "
        "deviations; delta: Cliff's."
    )
    columns = (
        "method",
        "metric",
        "verdict",
        "difference",
        "detectable",
        "p (Holm)",
        "p over seeds",
        "p permutation",
        "p over test problems",
        "d_z",
        "delta",
        "seeds",
        "problems",
    )
    return Table("tests", f"Tests against {baseline}", note, columns, rows)


def _difference_cell(c: VariantComparison, scale: Scale) -> TableCell:
    has_bounds = not math.isnan(c.low)
    return TableCell(
        scale.difference(c.difference),
        c.difference,
        detail=scale.bounds(c.low, c.high),
        bounds=(c.low, c.high) if has_bounds else None,
    )
