"""Figures of a report: curves, tuning, differences, scaling, thirds by the teacher's entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpd.experiments.figures import COLORS, INK, OTHERS, Look, Panel, looks_of, slug
from hpd.experiments.grid import short
from hpd.experiments.lines import Level, Line, line_panel, multiples_panel
from hpd.experiments.metrics import (
    SPREAD_NOTE,
    Scale,
    higher_is_better,
    is_entropy,
    label,
    over,
    scale_of,
    words,
)
from hpd.experiments.results import Results
from hpd.experiments.split import SPLIT_NOTE, split, split_axes
from hpd.experiments.statistics import VariantComparison
from hpd.experiments.table import TableCell
from hpd.experiments.tuning import Choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "compared_panel",
    "difference_panels",
    "level_of",
    "numeric_axis",
    "rate_panels",
    "results_looks",
    "scaling_panels",
    "thirds_panels",
]

_THIRDS = ("low", "mid", "high")
_TONES = {"win": COLORS[2], "loss": COLORS[4], "no difference found": OTHERS, "too few seeds": OTHERS}


def compared_panel(
    results: Results,
    key: str,
    title: str,
    lines: Mapping[str, Line],
    looks: Mapping[str, Look],
    **options: Any,
) -> Panel:
    """Lines of methods on one axis; where axes next to the method have several settings, a plot for each, so
    that lines of one plot differ in the method alone.

    Args:
        lines: group -> line.
        looks: of groups and of methods (`results_looks`).
        options: as `line_panel`.
    """
    plots: dict[str, dict[str, Line]] = {}
    for group, line in lines.items():
        method, setting = results.method_and_setting(group)
        plots.setdefault(setting, {})[method] = line
    if len(plots) < 2 or all(len(found) < 2 for found in plots.values()):
        return line_panel(key, title, lines, looks=looks, **options)
    return multiples_panel(key, title, plots, looks=looks, share_y=True, **options)


def results_looks(results: Results, baseline: str | Mapping[str, str] | None) -> dict[str, Look]:
    """A look for every group, and for every method where groups have more to them; behind the baseline HPD
    comes first, whatever its place in the grid."""
    groups = list(dict.fromkeys(run.group for run in results.runs))
    groups.sort(key=lambda group: results.method_and_setting(group)[0] != "hpd")
    methods = list(dict.fromkeys(results.method_and_setting(group)[0] for group in groups))
    if isinstance(baseline, Mapping):
        first = baseline.get("variant") or baseline.get("method")
        baseline = next((group for group in groups if results.method_and_setting(group)[0] == first), None)
    else:
        first = results.method_and_setting(baseline)[0] if baseline in groups else baseline
    return looks_of(groups, baseline) | looks_of(methods, first)


def rate_panels(choices: Sequence[Choice], looks: Mapping[str, Look]) -> list[Panel]:
    """Per tuned setting: the metric that decided over the tried values; a ring marks the value that was
    taken."""
    paths = dict.fromkeys(choice.path for choice in choices)
    panels = [
        _rate_panel(f"robustness-{slug(short(path))}" if i else "robustness", found, looks)
        for i, path in enumerate(paths)
        for found in [[choice for choice in choices if choice.path == path]]
    ]
    return [panel for panel in panels if panel is not None]


def _rate_panel(key: str, choices: Sequence[Choice], looks: Mapping[str, Look]) -> Panel | None:
    values = sorted({value for choice in choices for value in choice.means})
    lines: dict[str, Line] = {}
    for choice in choices:
        found = sorted((values.index(float(value)), seeds) for value, seeds in choice.tried.items())
        points = [(v, float(np.mean(s)), min(s), max(s)) for v, s in found if np.isfinite(s).all()]
        if points:
            lines[choice.group] = points
    if not lines:
        return None
    first, setting = choices[0], short(choices[0].path)
    title = f"{label(first.metric)} on validation rows, by {words(setting)}"
    note = f"Mean of {_seeds([len(s) for s in first.tried.values()])} for tuning; band: lowest to highest."
    options: dict[str, Any] = {
        "looks": looks_of(list(lines)) | {name: looks[name] for name in lines if name in looks},
        "scale": scale_of(first.metric),
        "x_label": words(setting),
        "ticks": {place: f"{value:g}" for place, value in enumerate(values)},
    }
    if first.metric == "loss":  # losses of different methods have no common scale
        return multiples_panel(
            key, title, {name: {name: line} for name, line in lines.items()}, note=note, **options
        )
    marks = {choice.group: values.index(choice.chosen) for choice in choices}
    note = f"{note} Ring: the value that was taken."
    is_log = first.metric.endswith("kl")
    return line_panel(key, title, lines, log=is_log, marks=marks, note=note, **options)


def _seeds(counts: Sequence[int]) -> str:
    fewest, most = min(counts), max(counts)
    return f"{fewest} seed{'s' * (fewest != 1)}" if fewest == most else f"{fewest} to {most} seeds"


def difference_panels(comparisons: Sequence[VariantComparison], scales: Mapping[str, Scale]) -> list[Panel]:
    """Per metric: every method minus the baseline with its 95 % interval."""
    panels = []
    for metric in dict.fromkeys(c.metric for c in comparisons):
        rows = [c for c in comparisons if c.metric == metric and not math.isnan(c.difference)]
        if rows:
            panels.append(_difference_panel(metric, rows, scales[metric]))
    return panels


def _difference_panel(metric: str, rows: Sequence[VariantComparison], scale: Scale) -> Panel:
    height = max(1.6, 0.9 + 0.24 * len(rows))
    baselines = {row.baseline for row in rows}
    baseline = rows[0].baseline if len(baselines) == 1 else "its baseline"
    bounds = [_ends(row, scale.factor) for row in rows]
    found = split([(0.0, 0.0), *bounds])

    def draw(figure: Figure) -> None:
        axes = split_axes(figure, found, vertical=False)
        if len(axes) == 1:
            axes[0].locator_params(axis="x", nbins=5)  # numbers of six characters would touch
        for axis in axes:
            for y, (row, ends) in enumerate(zip(reversed(rows), reversed(bounds), strict=True)):
                color = _TONES[row.verdict]
                axis.plot(ends, [y, y], color=color, linewidth=2.2, solid_capstyle="round")
                fill = "none" if row.verdict == "too few seeds" else "full"
                x, (start, end) = scale.factor * row.difference, axis.get_xlim()
                if len(axes) == 1 or start <= x <= end:  # no half points at the split
                    axis.plot([x], [y], "o", color=color, markersize=6, fillstyle=fill)
            axis.axvline(0, color=INK, linewidth=0.9)
            axis.set_ylim(-0.6, len(rows) - 0.4)
        axes[0].set_yticks(range(len(rows)), [row.variant for row in reversed(rows)])
        unit = ", percentage points" if scale.percent else ""
        figure.supxlabel(f"difference to {baseline}{unit}", fontsize=10, color=INK)

    better = "right" if higher_is_better(metric) else "left"
    title = f"{label(metric)}: minus {baseline} (better is {better})"
    counts = [row.num_seeds for row in rows]
    note = (
        f"Point: mean paired difference; bar: its 95 % interval, uncorrected, over {_seeds(counts)}. "
        "Green: win; red: loss, both after correction; gray: no difference found; hollow: too few seeds to "
        f"tell.{f' {SPLIT_NOTE}' if len(found.parts) > 1 else ''}"
    )
    table = [
        (
            r.variant,
            *(TableCell(scale.difference(v), v) for v in (r.difference, r.low, r.high)),
            r.p_holm,
            r.verdict,
        )
        for r in rows
    ]
    columns = ("method", "difference", "low", "high", "p (Holm)", "verdict")
    return Panel(f"difference-{metric}", title, columns, table, draw, height, note)


def _ends(row: VariantComparison, factor: float) -> tuple[float, float]:
    low, high = (row.difference if math.isnan(bound) else bound for bound in (row.low, row.high))
    return factor * low, factor * high


def numeric_axis(results: Results, axis: str) -> dict[str, float] | None:
    """Label -> number, rising; None where some label is no number."""
    labels = dict.fromkeys(run.axes[axis] for run in results.runs if run.finished)
    try:
        found = {name: float(name.removeprefix("x")) for name in labels}
    except ValueError:
        return None
    return dict(sorted(found.items(), key=lambda item: item[1]))


def scaling_panels(
    results: Results, metrics: Sequence[str], looks: Mapping[str, Look] | None = None
) -> list[Panel]:
    """Each metric, and the student's entropy, over one numeric axis, a line per combination of the others."""
    panels = []
    for axis in results.axes:
        values = numeric_axis(results, axis)
        if values is None or len(values) < 2 or min(values.values()) <= 0:
            continue
        for metric in dict.fromkeys((*metrics, "student_entropy")):
            if lines := _scaling_lines(results, axis, metric, values):
                panels.append(_scaling_panel(results, axis, metric, lines, looks))
    return panels


def _scaling_lines(
    results: Results, axis: str, metric: str, values: Mapping[str, float]
) -> dict[tuple[str, str], Line]:
    """(labels of the other axes, the method) -> line; without a method the first of those axes is it."""
    others = [other for other in results.axes if other != axis]
    others.sort(key=lambda other: other not in ("variant", "method"))  # lines are methods
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in results.runs:
        if metric in run.figures:
            name, *rest = [run.axes[other] for other in others] or [words(metric)]
            setting = ", ".join(f"{short(a)}={label}" for a, label in zip(others[1:], rest, strict=True))
            points = found.setdefault((setting, name), {}).setdefault(values[run.axes[axis]], [])
            points.append(run.figures[metric])
    scale = results.scale(metric)
    return {key: _spread_line(points, scale) for key, points in found.items() if len(points) > 1}


def _scaling_panel(
    results: Results,
    axis: str,
    metric: str,
    lines: Mapping[tuple[str, str], Line],
    looks: Mapping[str, Look] | None,
) -> Panel:
    plots: dict[str, dict[str, Line]] = {}
    for (setting, name), line in lines.items():
        plots.setdefault(setting, {})[name] = line
    options: dict[str, Any] = {
        "looks": looks if looks and {name for _, name in lines} <= set(looks) else None,
        "scale": results.scale(metric),
        "log": metric.endswith("kl"),
        "x_label": words(short(axis)),
        "log_x": True,
        "level": level_of(results, metric),
        "note": f"Mean over seeds; band: {SPREAD_NOTE}.",
    }
    key, title = f"scaling-{slug(metric)}-{slug(short(axis))}", over(metric, words(short(axis)))
    if metric == "loss":  # losses of different methods have no common scale
        alone = {", ".join(filter(None, (name, at))): {name: line} for (at, name), line in lines.items()}
        return multiples_panel(key, title, alone, **options)
    if len(plots) > 1:
        return multiples_panel(key, title, plots, share_y=True, **options)
    return line_panel(key, title, next(iter(plots.values())), **options)


def _spread_line(points: Mapping[float, Sequence[float]], scale: Scale) -> Line:
    spreads = {x: scale.spread(values) for x, values in sorted(points.items())}
    return [(x, spread.mean, spread.low, spread.high) for x, spread in spreads.items()]


def thirds_panels(results: Results, looks: Mapping[str, Look]) -> list[Panel]:
    """A KL over thirds of the positions, from those where the teacher is surest to those where it is least,
    for every figure that the runs have in thirds."""
    measured = dict.fromkeys(metric for run in results.runs for metric in run.figures)
    panels = []
    for start in [name.removesuffix("_low_entropy") for name in measured if name.endswith("_low_entropy")]:
        names = [f"{start}_{third}_entropy" for third in _THIRDS]
        scale = scale_of(names[0])
        lines: dict[str, Line] = {}
        for group in results.groups:
            found = [list(results.values(group, name).values()) for name in names]
            if all(found):
                lines[group] = _spread_line(dict(enumerate(found)), scale)
        if lines:
            panels.append(
                compared_panel(
                    results,
                    f"thirds-{slug(start)}",
                    f"{label(start)}, by the teacher's entropy",
                    lines,
                    looks,
                    scale=scale,
                    log=True,
                    x_label="third of the positions, by the teacher's entropy",
                    ticks=dict(enumerate(_THIRDS)),
                    note=f"Mean over seeds; band: {SPREAD_NOTE}.",
                )
            )
    return panels


def level_of(results: Results, metric: str) -> Level | None:
    """The teacher's value of a metric: its accuracy, or its entropy on the validation rows."""
    if is_entropy(metric):
        # Of several sets of validation rows each has its own.
        one = metric.removesuffix("student_entropy").removesuffix("teacher_entropy")
        name = f"{one}teacher_entropy" if one != metric else "teacher_entropy"
        found = [run.figures[name] for run in results.runs if name in run.figures]
        return (float(np.mean(found)), min(found), max(found)) if found else None
    value = results.teacher.get(metric)
    return None if value is None else (value, value, value)
