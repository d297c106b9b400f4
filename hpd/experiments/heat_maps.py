"""Heat maps: a metric over two numeric axes, every map of a metric with one range of colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpd.experiments.figures import INK, Panel, new_axes, slug
from hpd.experiments.grid import short
from hpd.experiments.metrics import SPREAD_NOTE, Scale, Spread, higher_is_better, over, words
from hpd.experiments.plots import level_of, numeric_axis
from hpd.experiments.results import Results
from hpd.experiments.table import TableCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["heat_maps"]

_WIDE_COLUMNS = 4
"""Columns up to which a cell has room for an interval on one line."""


class _Map(NamedTuple):
    x_axis: str
    y_axis: str
    xs: list[str]
    ys: list[str]
    rest: str
    """The values of all other axes."""
    cells: dict[tuple[str, str], Spread]
    """(y, x) -> mean and spread."""


def heat_maps(results: Results, metrics: Sequence[str]) -> list[Panel]:
    """The mean of each metric over every pair of numeric axes; one map per value of the other axes."""
    axes = {a: list(found) for a in results.axes if (found := numeric_axis(results, a)) and len(found) > 1}
    panels = []
    for metric in metrics:
        scale = results.scale(metric)
        maps = [
            found
            for i, y_axis in enumerate(axes)
            for x_axis in list(axes)[i + 1 :]
            for found in _maps(results, metric, x_axis, y_axis, axes)
            if len(found.cells) > 1
        ]
        means = [spread.mean for found in maps for spread in found.cells.values()]
        level = level_of(results, metric)
        teacher = f" The teacher's: {scale.value(level[0])}." if level else ""
        panels += [_panel(metric, found, (min(means), max(means)), scale, teacher) for found in maps]
    return panels


def _maps(
    results: Results, metric: str, x_axis: str, y_axis: str, axes: Mapping[str, list[str]]
) -> list[_Map]:
    others = [axis for axis in results.axes if axis not in (x_axis, y_axis)]
    values: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = {}
    for run in results.runs:
        if metric in run.figures:
            cells = values.setdefault(tuple(run.axes[axis] for axis in others), {})
            cells.setdefault((run.axes[y_axis], run.axes[x_axis]), []).append(run.figures[metric])
    scale = results.scale(metric)
    return [
        _Map(
            x_axis,
            y_axis,
            axes[x_axis],
            axes[y_axis],
            ", ".join(f"{short(axis)} {value}" for axis, value in zip(others, rest, strict=True)),
            {place: scale.spread(found) for place, found in cells.items()},
        )
        for rest, cells in values.items()
    ]


def _panel(metric: str, found: _Map, limits: tuple[float, float], scale: Scale, teacher: str) -> Panel:
    x_name, y_name = words(short(found.x_axis)), words(short(found.y_axis))
    grid = np.full((len(found.ys), len(found.xs)), math.nan)
    for (y, x), spread in found.cells.items():
        grid[found.ys.index(y), found.xs.index(x)] = scale.factor * spread.mean

    # In narrow cells an interval takes two lines.
    is_narrow = len(found.xs) > _WIDE_COLUMNS
    below = {place: scale.about(spread).replace(": ", ":\n") for place, spread in found.cells.items()}
    if is_narrow:
        below = {place: text.replace(" to ", "\nto ") for place, text in below.items()}

    def draw(figure: Figure) -> None:
        (axis,) = new_axes(figure)
        axis.grid(False)
        low, high = (scale.factor * limit for limit in limits)
        name = "cividis_r" if higher_is_better(metric) is False else "cividis"
        mesh = axis.pcolormesh(grid, cmap=name, edgecolors="none", vmin=low, vmax=high)
        for (y, x), spread in found.cells.items():
            row, column = found.ys.index(y), found.xs.index(x)
            ink = _contrasting(mesh.cmap(mesh.norm(grid[row, column])))
            for y_place, text, side, size in (
                (row + 0.5, scale.value(spread.mean), "bottom", 9),
                (row + 0.46, below[y, x], "top", 6),
            ):
                axis.text(column + 0.5, y_place, text, va=side, fontsize=size, ha="center", color=ink)
        axis.set_xticks(np.arange(len(found.xs)) + 0.5, found.xs)
        axis.set_yticks(np.arange(len(found.ys)) + 0.5, found.ys)
        axis.set_xlabel(x_name, fontsize=10)
        axis.set_ylabel(y_name, fontsize=10)
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axis, pad=0.02, aspect=30)
        bar.outline.set_visible(False)  # type: ignore[union-attr]
        bar.ax.tick_params(labelsize=8, labelcolor=INK, color=INK)
        bar.set_label(f"{words(metric)}{', %' if scale.percent else ''}", fontsize=8, color=INK)

    key = "-".join(filter(None, ("heat", slug(metric), slug(y_name), slug(x_name), slug(found.rest))))
    title = over(metric, f"{y_name} and {x_name}") + (f" ({found.rest})" if found.rest else "")
    note = (
        f"Mean over seeds, and below it: {SPREAD_NOTE}. All maps of this metric have one range of colors."
        f"{teacher}"
    )
    rows: list[tuple[Any, ...]] = [
        (y, x, *(TableCell(scale.value(v), v) for v in spread[:3]), spread.num_values)
        for (y, x), spread in found.cells.items()
    ]
    height = max(2.2, 0.9 + (0.55 if is_narrow else 0.42) * len(found.ys))
    return Panel(key, title, (y_name, x_name, "mean", "low", "high", "runs"), rows, draw, height, note)


def _contrasting(color: Any) -> str:
    """Black or white, by the luminance of what lies below (ITU-R BT.709)."""
    red, green, blue = color[:3]
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "#ffffff"
