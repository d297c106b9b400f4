"""Figures of a report: curves, tuning, differences, heat maps, scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpd.experiments.figures import COLORS, INK, MAX_LINES, Line, Panel, label, line_panel, slug
from hpd.experiments.results import Results, higher_is_better
from hpd.experiments.statistics import VariantComparison, mean_interval
from hpd.experiments.tuning import Choice

__all__ = ["curve_panels", "difference_panels", "heat_maps", "rate_panels", "scaling_panels"]

OWN_METRICS = ("own_entropy", "own_forward_kl", "own_reverse_kl")
BRANCHES = {
    "k1_positive": "student underestimates the label",
    "reinforced": "reinforced",
    "suppressed": "suppressed",
    "punished": "draw punished",
}


def curve_panels(results: Results) -> list[Panel]:
    """Means over seeds of what training logs, a band from the lowest to the highest seed; and HPD's branches
    per variant."""
    panels = []
    by_group: dict[str, list[list[dict[str, Any]]]] = {}
    for run in results.runs:
        if run.logs:
            by_group.setdefault(run.group, []).append(run.logs)
    shown = dict(list(by_group.items())[:MAX_LINES])
    for metric in ("loss", "forward_kl", "reverse_kl", "student_entropy", "grad_norm", *OWN_METRICS):
        lines = {group: line for group, logs in shown.items() if (line := _mean_line(logs, metric))}
        if lines:
            panels.append(
                line_panel(
                    f"curve-{metric}", f"{label(metric)} over training", lines, log=metric.endswith("kl")
                )
            )
    for group, logs in shown.items():
        lines = {words: line for name, words in BRANCHES.items() if (line := _mean_line(logs, name))}
        if lines:
            panels.append(line_panel(f"branches-{slug(group)}", f"{group}: share of label tokens", lines))
    return panels


def _mean_line(logs: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> Line:
    """(step, mean, low, high) at the steps that every seed logged."""
    series = [
        {
            log["step"]: float(log[metric])
            for log in run
            if ("loss" in log or metric in OWN_METRICS) and log.get(metric) is not None
        }
        for run in logs
    ]
    series = [points for points in series if points]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    found = [(step, [points[step] for points in series]) for step in steps]
    return [(step, float(np.mean(v)), min(v), max(v)) for step, v in found if all(map(math.isfinite, v))]


def rate_panels(choices: Sequence[Choice]) -> list[Panel]:
    """The metric that was tuned on over the tried values; a ring marks the one that was taken."""
    if not choices:
        return []
    lines: dict[str, Line] = {}
    for choice in choices[:MAX_LINES]:
        found = sorted((float(value), seeds) for value, seeds in choice.tried.items())
        lines[choice.group] = [
            (v, float(np.mean(s)), min(s), max(s)) for v, s in found if np.isfinite(s).all()
        ]
    first = choices[0]
    marks = {choice.group: choice.chosen for choice in choices[:MAX_LINES]}
    title = f"{label(first.metric)} on validation rows, by {first.path.rsplit('.', 1)[-1].replace('_', ' ')}"
    x_label = first.path.rsplit(".", 1)[-1].replace("_", " ")
    panel = line_panel(
        "robustness", title, lines, x_label=x_label, log_x=True, log=first.metric.endswith("kl"), marks=marks
    )
    return [panel]


def difference_panels(comparisons: Sequence[VariantComparison]) -> list[Panel]:
    """Per metric: every variant minus the baseline with its 95 % interval."""
    panels = []
    for metric in dict.fromkeys(c.metric for c in comparisons):
        rows = [c for c in comparisons if c.metric == metric and not math.isnan(c.difference)]
        if rows:
            panels.append(_difference_panel(metric, rows))
    return panels


def _difference_panel(metric: str, rows: Sequence[VariantComparison]) -> Panel:
    height = max(1.6, 0.9 + 0.24 * len(rows))
    colors = {"win": COLORS[2], "loss": COLORS[4], "no consistent win": COLORS[9]}

    def draw(axis: Any) -> None:
        for y, row in enumerate(reversed(rows)):
            color = colors[row.verdict]
            if not math.isnan(row.low):
                axis.plot([row.low, row.high], [y, y], color=color, linewidth=2.2, solid_capstyle="round")
            axis.plot([row.difference], [y], "o", color=color, markersize=6)
        axis.axvline(0, color=INK, linewidth=0.9)
        axis.set_yticks(range(len(rows)), [row.variant for row in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlabel(f"difference to {rows[0].baseline}", fontsize=10)

    better = "right" if higher_is_better(metric) else "left"
    title = f"{label(metric)}: minus {rows[0].baseline}, 95 % interval (better is {better})"
    table = [(r.variant, r.difference, r.low, r.high, r.p_holm, r.verdict) for r in rows]
    return Panel(
        f"difference-{metric}",
        title,
        ("variant", "difference", "low", "high", "p (Holm)", "verdict"),
        table,
        draw,
        height,
    )


def heat_maps(results: Results, metrics: Sequence[str]) -> list[Panel]:
    """The mean of each metric over every pair of numeric axes; one map per value of the other axes."""
    axes = {axis: values for axis in results.axes if (values := _numeric(results, axis)) and len(values) > 1}
    panels = []
    names = list(axes)
    for i, y_axis in enumerate(names):
        for x_axis in names[i + 1 :]:
            others = [axis for axis in results.axes if axis not in (x_axis, y_axis)]
            for rest in dict.fromkeys(
                tuple(run.axes[axis] for axis in others) for run in results.runs if run.finished
            ):
                fixed = dict(zip(others, rest, strict=True))
                panels += [
                    p for metric in metrics if (p := _heat_map(results, metric, x_axis, y_axis, axes, fixed))
                ]
    return panels


def _numeric(results: Results, axis: str) -> dict[str, float] | None:
    labels = dict.fromkeys(run.axes[axis] for run in results.runs if run.finished)
    try:
        return dict(
            sorted(((name, float(name.removeprefix("x"))) for name in labels), key=lambda item: item[1])
        )
    except ValueError:
        return None


def _heat_map(
    results: Results,
    metric: str,
    x_axis: str,
    y_axis: str,
    axes: Mapping[str, Mapping[str, float]],
    fixed: Mapping[str, str],
) -> Panel | None:
    xs, ys = list(axes[x_axis]), list(axes[y_axis])
    cells: dict[tuple[str, str], list[float]] = {}
    for run in results.runs:
        if metric in run.figures and all(run.axes[axis] == value for axis, value in fixed.items()):
            cells.setdefault((run.axes[y_axis], run.axes[x_axis]), []).append(run.figures[metric])
    if len(cells) < 2:
        return None
    grid = np.array([[np.mean(cells[y, x]) if (y, x) in cells else math.nan for x in xs] for y in ys])
    x_name, y_name = (axis.rsplit(".", 1)[-1].replace("_", " ") for axis in (x_axis, y_axis))

    def draw(axis: Any) -> None:
        axis.grid(False)
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        axis.pcolormesh(
            grid,
            cmap="cividis" if higher_is_better(metric) else "cividis_r",
            edgecolors="none",
            vmin=low,
            vmax=high,
        )
        for row, col in np.ndindex(*grid.shape):
            if not math.isnan(value := grid[row, col]):
                dark = ((value - low) / max(high - low, 1e-12) < 0.55) == bool(higher_is_better(metric))
                axis.text(
                    col + 0.5,
                    row + 0.5,
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="#ffffff" if dark else "#000000",
                )
        axis.set_xticks(np.arange(len(xs)) + 0.5, xs)
        axis.set_yticks(np.arange(len(ys)) + 0.5, ys)
        axis.set_xlabel(x_name, fontsize=10)
        axis.set_ylabel(y_name, fontsize=10)
        axis.spines[:].set_visible(False)

    rest = ", ".join(f"{axis.rsplit('.', 1)[-1]} {value}" for axis, value in fixed.items())
    key = f"heat-{slug(metric)}-{slug(y_name)}-{slug(x_name)}" + (f"-{slug(rest)}" if rest else "")
    rows = [(y, x, float(np.mean(v)), len(v)) for (y, x), v in cells.items()]
    title = f"{label(metric)} over {y_name} and {x_name}" + (f" ({rest})" if rest else "")
    return Panel(key, title, (y_name, x_name, "mean", "runs"), rows, draw)


def scaling_panels(results: Results, metrics: Sequence[str]) -> list[Panel]:
    """Each metric over one numeric axis, a line per combination of the others."""
    panels = []
    for axis in results.axes:
        values = _numeric(results, axis)
        if values is None or len(values) < 2 or min(values.values()) <= 0:
            continue
        others = [other for other in results.axes if other != axis]
        for metric in metrics:
            found: dict[str, dict[float, list[float]]] = {}
            for run in results.runs:
                if metric in run.figures:
                    name = ", ".join(run.axes[other] for other in others) or label(metric)
                    found.setdefault(name, {}).setdefault(values[run.axes[axis]], []).append(
                        run.figures[metric]
                    )
            lines = {
                name: _interval_line(points)
                for name, points in list(found.items())[:MAX_LINES]
                if len(points) > 1
            }
            if lines:
                words = axis.rsplit(".", 1)[-1].replace("_", " ")
                key = f"scaling-{slug(metric)}-{slug(words)}"
                panels.append(
                    line_panel(key, f"{label(metric)} over {words}", lines, x_label=words, log_x=True)
                )
    return panels


def _interval_line(points: Mapping[float, Sequence[float]]) -> Line:
    line = []
    for x, values in sorted(points.items()):
        interval = mean_interval(values)
        alone = math.isnan(interval.low)
        line.append(
            (
                x,
                interval.mean,
                interval.mean if alone else interval.low,
                interval.mean if alone else interval.high,
            )
        )
    return line
