"""Panels: small figures, each with the table of numbers that it draws, as SVG or PNG."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

__all__ = ["COLORS", "INK", "MAX_LINES", "Line", "Panel", "label", "line_panel", "slug", "to_png", "to_svg"]

INK = "#1f2328"
GRID = "#d0d7de"
"""INK and GRID are colours that the page replaces by its own, so that a figure follows dark mode."""
COLORS = (
    "#3f7fc1",
    "#d9772b",
    "#3a9d6e",
    "#a85bb0",
    "#c94f5c",
    "#8a8f3c",
    "#3fa3b8",
    "#a9745b",
    "#7276cf",
    "#7d8590",
)
_MARKERS = "osD^vPX<>h"
MAX_LINES = 2 * len(COLORS)
"""Dashed from the eleventh on."""
_OUTSIDE = 5
"""Lines from which the legend stands below the figure."""
_WIDTH = 4.6
_TITLE_CHARACTERS = 58
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
}
Line: TypeAlias = Sequence[tuple[float, float, float, float]]
"""(x, mean, low, high) of each point."""


class Panel(NamedTuple):
    """One figure."""

    key: str
    """File name."""
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    """The numbers that are drawn."""
    draw: Callable[[Any], None]
    """Draws them on a matplotlib axis."""
    height: float = 3.1
    """In inches; the width is 4.6."""


def label(metric: str) -> str:
    """The metric in words, with its unit."""
    return _LABELS.get(metric, metric.replace("_", " "))


def to_svg(panel: Panel) -> str:
    """Without fixed colours for ink and grid, and with text as text."""
    import matplotlib

    # A dollar in a name does not start a formula.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.key, "text.parse_math": False}):
        text = _save(panel, "svg", facecolor="none", metadata={"Date": None}).decode("utf-8")
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--line)")
    # Every figure names its parts alike; on one page ids must differ.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{panel.key}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{panel.key}-", text)
    words = panel.title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)


def to_png(panel: Panel) -> bytes:
    """On white, at 144 dots per inch, under its title: a file stands alone, where the page has a caption."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        return _save(panel, "png", panel.title, facecolor="white", dpi=144)


def line_panel(
    key: str,
    title: str,
    lines: Mapping[str, Line],
    *,
    log: bool = False,
    x_label: str = "step",
    y_label: str = "",
    log_x: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Panel:
    """One line per name, with a band from low to high; `marks` puts a ring at an x of a line."""
    rows = [(name, *point) for name, points in lines.items() for point in points]
    height = 3.1 + (0.2 * math.ceil(len(lines) / 2) if len(lines) >= _OUTSIDE else 0.0)

    def draw(axis: Any) -> None:
        for i, (name, points) in enumerate(lines.items()):
            x, mean, low, high = zip(*points, strict=True)
            color, style = COLORS[i % len(COLORS)], "-" if i < len(COLORS) else "--"
            marker = _MARKERS[i % len(_MARKERS)] if log_x or len(x) < 8 else ""
            axis.plot(
                x, mean, color=color, label=name, linewidth=1.7, marker=marker, markersize=4, linestyle=style
            )
            axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            if marks and name in marks:
                height = mean[x.index(marks[name])]
                axis.plot([marks[name]], [height], "o", color=color, markersize=9, fillstyle="none")
        axis.set_xlabel(x_label, fontsize=10)
        axis.set_ylabel(y_label, fontsize=10)
        values = [point[1] for points in lines.values() for point in points]
        if log and min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
            # matplotlib writes powers as formulas, which are switched off for the sake of names.
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if log_x:
            axis.set_xscale("log")
            ticks = sorted({point[0] for points in lines.values() for point in points})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axis.minorticks_off()
        if len(lines) > 1:
            _legend(axis, len(lines))

    return Panel(key, title, ("series", x_label, "mean", "low", "high"), rows, draw, height)


def slug(text: str) -> str:
    """A text as a part of a file name."""
    return re.sub(r"[^\w]+", "-", text).strip("-").lower()


def _save(panel: Panel, kind: str, title: str = "", **options: Any) -> bytes:
    from matplotlib.figure import Figure

    lines = textwrap.wrap(title, _TITLE_CHARACTERS)
    figure = Figure(figsize=(_WIDTH, panel.height + 0.2 * len(lines)), layout="constrained")
    axis = figure.subplots()
    if lines:
        figure.suptitle("\n".join(lines), x=0.015, ha="left", fontsize=10, color=INK)
    axis.patch.set_visible(False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(which="both", labelsize=10, colors=INK, color=GRID)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    panel.draw(axis)
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **options)
    return stream.getvalue()


def _legend(axis: Any, count: int) -> None:
    if count < _OUTSIDE:
        axis.legend(fontsize=9, frameon=False, labelcolor=INK)
    else:
        axis.figure.legend(loc="outside lower left", fontsize=9, frameon=False, labelcolor=INK, ncols=2)
