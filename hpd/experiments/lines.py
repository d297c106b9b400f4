"""Line figures: series with bands, the teacher's line, one plot or many small ones."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from hpd.experiments.figures import INK, Look, Panel, looks_of, new_axes
from hpd.experiments.metrics import PLAIN, Scale
from hpd.experiments.split import SPLIT_NOTE, Split, split, split_axes
from hpd.experiments.table import TableCell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Level", "Line", "line_panel", "multiples_panel"]

Line: TypeAlias = Sequence[tuple[float, float, float, float]]
"""(x, mean, low, high) of each point."""
Level: TypeAlias = tuple[float, float, float]
"""The teacher's (mean, low, high); all equal for one teacher and one set of rows."""
CUT_NOTE = "Bands end where the axis does."
_OUTSIDE = 4
"""Legend entries from which the legend stands below the figure."""
_MULTIPLE_COLUMNS = 3
_NAMED_ORDER, _OTHER_ORDER = 2.0, 1.5
"""Drawing orders: named lines lie above the others, and come first in the legend."""
_BELOW_MEANS = 4.0
"""How far a logarithmic axis goes below the lowest mean, as a factor."""
_ROW_CHARACTERS = 62
"""Of the labels of small plots side by side, together."""


def line_panel(
    key: str,
    title: str,
    lines: Mapping[str, Line],
    *,
    looks: Mapping[str, Look] | None = None,
    scale: Scale = PLAIN,
    log: bool = False,
    x_label: str = "step",
    log_x: bool = False,
    ticks: Mapping[float, str] | None = None,
    marks: Mapping[str, float] | None = None,
    level: Level | None = None,
    note: str = "",
) -> Panel:
    """One line per name, with a band from low to high where the line has a color.

    Args:
        looks: name -> look; by default the first five names have colors.
        scale: of the values.
        log: a logarithmic axis where the values span more than a factor of 10; it may cut bands off.
        ticks: names of the x values.
        marks: name -> x of a ring on its line.
        level: the teacher's.
        note: the caption; what is drawn beside lines and bands is added.
    """
    chosen = looks or looks_of(list(lines))
    has_markers = bool(log_x or ticks) or sum(map(len, lines.values())) < 8 * len(lines)
    is_log = log and _spans(lines.values())
    ranges = [_range(points, scale.factor) for points in lines.values()]
    if level is not None:
        ranges.append((scale.factor * level[1], scale.factor * level[2]))
    found = Split([(0.0, 1.0)], 0) if is_log else split(ranges)
    entries = sum(chosen[name].is_named for name in lines) + (level is not None)
    entries += any(not chosen[name].is_named for name in lines)

    def draw(figure: Figure) -> None:
        axes = split_axes(figure, found, vertical=True)
        for axis in axes:
            _draw_lines(axis, lines, chosen, scale.factor, marks or {}, has_markers)
            if level is not None:
                _draw_level(axis, level, scale.factor)
            if is_log:
                _set_log(axis, lines.values(), scale.factor, 3.0)
            _set_ticks(axis, lines, log_x, ticks)
        axes[0].set_xlabel(x_label, fontsize=10)
        axes[-1].set_ylabel("%" if scale.percent else "", fontsize=10)
        if len(lines) > 1 or level is not None:
            _legend(axes[-1], entries)

    cut = is_log and _are_cut(lines.values())
    notes = [
        note,
        CUT_NOTE if cut else "",
        SPLIT_NOTE if len(found.parts) > 1 else "",
        _level_note(level, scale),
    ]
    height = 3.1 + (0.2 * math.ceil(entries / 2) if entries >= _OUTSIDE else 0.0)
    columns = ("method", x_label, "mean", "low", "high")
    return Panel(key, title, columns, _rows(lines, scale), draw, height, " ".join(filter(None, notes)))


def multiples_panel(
    key: str,
    title: str,
    plots: Mapping[str, Mapping[str, Line]],
    *,
    looks: Mapping[str, Look] | None = None,
    scale: Scale = PLAIN,
    log: bool = False,
    x_label: str = "step",
    log_x: bool = False,
    ticks: Mapping[float, str] | None = None,
    level: Level | None = None,
    share_y: bool = False,
    note: str = "",
) -> Panel:
    """A small plot per name, in a grid, each with its own lines.

    Args:
        plots: title of a plot -> its lines.
        looks: name of a line -> look; a plot with several gray lines gives them colors of its own.
        log, ticks, level: as `line_panel`.
        log_x: a logarithmic x axis.
        share_y: one y axis for all, where their values are comparable.
    """
    most = max(plots.values(), key=len)
    columns = 2 if len(plots) == 4 else min(_MULTIPLE_COLUMNS, len(plots))
    num_rows = math.ceil(len(plots) / columns)
    # Plots of the same lines, or of some of them, share a legend; else a plot of several has its own.
    has_legend = len(most) > 1 and all(lines.keys() <= most.keys() for lines in plots.values())
    looks = looks or (looks_of(list(most)) if has_legend else None)
    wrap = partial(textwrap.fill, width=_ROW_CHARACTERS // columns)
    titles = [wrap(name) for name in plots]
    every = [line for lines in plots.values() for line in lines.values()]
    is_log = log and _spans(every)

    def draw(figure: Figure) -> None:
        axes = new_axes(figure, num_rows, columns, sharex=True, sharey=share_y)
        for axis in axes[len(plots) :]:
            axis.set_visible(False)
        for i, (axis, lines) in enumerate(zip(axes, plots.values(), strict=False)):
            shown = _looks_within(lines, looks, has_legend)
            _draw_lines(axis, lines, shown, scale.factor, {}, bool(ticks) or log_x)
            if level is not None:
                _draw_level(axis, level, scale.factor)
            if is_log:
                _set_log(axis, every if share_y else lines.values(), scale.factor, 1.5)
            else:
                axis.locator_params(axis="y", nbins=4)
            _set_ticks(axis, lines, log_x, ticks)
            _label_small(axis, titles[i], wrap(x_label) if i + columns >= len(plots) else "")
            if len(lines) > 1 and not has_legend:
                axis.legend(*_entries(axis), frameon=False, fontsize=7, labelcolor=INK)
        if has_legend:
            _legend(axes[list(plots.values()).index(most)], _OUTSIDE)

    rows = [(name, *row) for name, lines in plots.items() for row in _rows(lines, scale)]
    height = _grid_height(titles, num_rows, len(most) if has_legend else 0)
    cut = is_log and any(map(_are_cut, [every] if share_y else [lines.values() for lines in plots.values()]))
    caption = " ".join(filter(None, [note, CUT_NOTE if cut else "", _level_note(level, scale)]))
    return Panel(key, title, ("plot", "line", x_label, "mean", "low", "high"), rows, draw, height, caption)


def _grid_height(titles: Sequence[str], num_rows: int, entries: int) -> float:
    """Inches of small plots below each other, with room for their titles' lines and a legend."""
    lines = max(title.count("\n") for title in titles)
    return 0.4 + (1.25 + 0.13 * lines) * num_rows + 0.2 * math.ceil(entries / 2)


def _label_small(axis: Axes, title: str, x_label: str) -> None:
    """Title and, in the last plot of a column, what x is."""
    axis.set_title(title, fontsize=8, color=INK, loc="left")
    axis.tick_params(labelsize=8, labelbottom=bool(x_label))
    axis.set_xlabel(x_label, fontsize=8)


def _spans(lines: Iterable[Line]) -> bool:
    """True if the values are positive and span more than a factor of 10."""
    means = [point[1] for points in lines for point in points]
    return min(means) > 0 and max(means) > 10 * min(means)


def _are_cut(lines: Iterable[Line]) -> bool:
    """True if a band reaches below a logarithmic axis."""
    points = [point for line in lines for point in line]
    return min(point[2] for point in points) < min(point[1] for point in points) / _BELOW_MEANS


def _looks_within(
    lines: Mapping[str, Line], looks: Mapping[str, Look] | None, are_shared: bool
) -> Mapping[str, Look]:
    """The looks that are given, unless lines of a plot with a legend of its own would be the same gray."""
    if looks is None:
        return looks_of(list(lines))
    given = {name: looks[name] for name in lines}
    is_told_apart = len(lines) == 1 or all(look.is_named for look in given.values())
    return given if are_shared or is_told_apart else looks_of(list(lines))


def _rows(lines: Mapping[str, Line], scale: Scale) -> list[tuple[Any, ...]]:
    return [
        (name, x, *(TableCell(scale.value(value), value) for value in values))
        for name, points in lines.items()
        for x, *values in points
    ]


def _range(points: Line, factor: float) -> tuple[float, float]:
    means = [factor * point[1] for point in points]
    return min(means), max(means)


def _draw_lines(
    axis: Axes,
    lines: Mapping[str, Line],
    looks: Mapping[str, Look],
    factor: float,
    marks: Mapping[str, float],
    has_markers: bool,
) -> None:
    others = sum(not looks[name].is_named for name in lines)
    word = f"{others} other{'s' * (others != 1)}"
    for name in sorted(lines, key=lambda name: looks[name].is_named):
        look = looks[name]
        x, *values = zip(*lines[name], strict=True)
        mean, low, high = ([factor * value for value in column] for column in values)
        if look.is_named:
            text, width = name, 1.7
            axis.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
        else:
            text, width, word = word, 0.9, "_others"  # one entry of the legend stands for all
        marker = look.marker if has_markers else ""
        axis.plot(
            x,
            mean,
            color=look.color,
            label=text,
            linewidth=width,
            marker=marker,
            markersize=4,
            linestyle=look.dash,
            zorder=_NAMED_ORDER if look.is_named else _OTHER_ORDER,
        )
        if name in marks and marks[name] in x:
            height = mean[x.index(marks[name])]
            axis.plot([marks[name]], [height], "o", color=look.color, markersize=9, fillstyle="none")


def _draw_level(axis: Axes, level: Level, factor: float) -> None:
    mean, low, high = (factor * value for value in level)
    if high > low:
        axis.axhspan(low, high, color=INK, alpha=0.08, linewidth=0)
    axis.axhline(
        mean, color=INK, linewidth=1.1, linestyle=(0, (1, 1.4)), label="teacher", zorder=_OTHER_ORDER
    )


def _level_note(level: Level | None, scale: Scale) -> str:
    if level is None:
        return ""
    mean, low, high = level
    differ = scale.value(low) != scale.value(high)
    spread = f", shaded from the lowest to the highest, {scale.bounds(low, high)}" if differ else ""
    return f"Dotted: the teacher's, {scale.value(mean)}{spread}."


def _set_log(axis: Axes, lines: Iterable[Line], factor: float, few: float) -> None:
    """A logarithmic axis that shows the means: a band that goes down to nearly nothing would press them into
    its upper edge. Up to `few` decades have three labels each."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    points = [point for line in lines for point in line]
    lowest = factor * min(point[1] for point in points)
    bottom = max(factor * min(point[2] for point in points), lowest / _BELOW_MEANS) / 1.2
    top = factor * max(point[3] for point in points) * 1.2
    axis.set_ylim(bottom, top)
    decades = math.log10(top / bottom)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades <= few else (1,), numticks=6))
    axis.yaxis.set_minor_locator(NullLocator())
    # matplotlib writes powers as formulas, which are switched off for the sake of names.
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _set_ticks(axis: Axes, lines: Mapping[str, Line], log_x: bool, ticks: Mapping[float, str] | None) -> None:
    places = sorted({point[0] for points in lines.values() for point in points})
    if log_x:
        axis.set_xscale("log")
        axis.minorticks_off()
    if log_x or ticks:
        axis.set_xticks(places, [ticks[place] if ticks else f"{place:g}" for place in places], minor=False)


def _legend(axis: Axes, count: int) -> None:
    options: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    handles, labels = _entries(axis)
    if count < _OUTSIDE:
        axis.legend(handles, labels, **options)
    else:
        axis.figure.legend(handles, labels, loc="outside lower left", ncols=2, **options)


def _entries(axis: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels: named lines first, then the others and the teacher."""
    found = list(zip(*axis.get_legend_handles_labels(), strict=True))
    found.sort(key=lambda entry: entry[0].zorder < _NAMED_ORDER)
    return [handle for handle, _ in found], [label for _, label in found]
