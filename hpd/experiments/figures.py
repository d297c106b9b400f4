"""Panels: small figures, each with the table of numbers that it draws, as SVG, PDF and PNG."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # matplotlib takes a second that only figures spend
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "FORMATS",
    "GRID",
    "INK",
    "MAX_NAMED",
    "OTHERS",
    "Look",
    "Panel",
    "looks_of",
    "new_axes",
    "slug",
    "to_files",
    "to_svg",
]

INK = "#1f2328"
GRID = "#d0d7de"
"""INK and GRID are colors that the page replaces by its own, so that a figure follows dark mode."""
COLORS = ("#3f7fc1", "#d9772b", "#3a9d6e", "#a85bb0", "#c94f5c")
"""Of the named lines; dashes and markers tell them apart without color."""
OTHERS = "#9aa4ae"
"""Of all other lines."""
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (8, 2)))
_MARKERS = "osD^v"
MAX_NAMED = len(COLORS)
FORMATS = ("png", "svg", "pdf")
_WIDTH = 4.6
_TITLE_CHARACTERS = 58
_NOTE_CHARACTERS = 86
_TITLE_INCHES = 0.2
"""Of a line of the title, at 10 points."""
_NOTE_INCHES = 0.14
"""Of a line of the caption, at 7 points."""


class Panel(NamedTuple):
    """One figure."""

    key: str
    """File name."""
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    """The numbers that are drawn."""
    draw: Callable[[Figure], None]
    """Draws them on an empty figure, on axes of `new_axes`."""
    height: float = 3.1
    """In inches, without title and caption; the width is 4.6."""
    note: str = ""
    """The caption: what a line, a band or a mark is."""


class Look(NamedTuple):
    """How a line is drawn."""

    color: str
    dash: Any
    marker: str
    is_named: bool


def looks_of(names: Sequence[str], first: str | None = None) -> dict[str, Look]:
    """A look for every name: `first` and the first others get five colors, all that follow are gray."""
    order = sorted(names, key=lambda name: name != first)[:MAX_NAMED]
    styles = zip(COLORS, _DASHES, _MARKERS, strict=True)
    named = {name: Look(*style, True) for name, style in zip(order, styles, strict=False)}
    return {name: named.get(name, Look(OTHERS, "-", "", False)) for name in names}


def new_axes(figure: Figure, rows: int = 1, columns: int = 1, **options: Any) -> list[Axes]:
    """Axes in the manner of the report, row by row; options go to `Figure.subplots`."""
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for axis in axes:
        axis.patch.set_visible(False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.tick_params(which="both", labelsize=10, labelcolor=INK, color=GRID)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return axes


def to_svg(panel: Panel) -> str:
    """For the page: without fixed colors for ink and grid, with text as text, and without title and caption,
    which stand beside it."""
    with _settings(panel.key):
        text = _save(_figure(panel, alone=False), "svg", facecolor="none").decode("utf-8")
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--line)")
    # Every figure names its parts alike; on one page ids must differ.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{panel.key}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{panel.key}-", text)
    title = panel.title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def to_files(panel: Panel) -> dict[str, bytes]:
    """The same figure as each of `FORMATS`, on white, under its title and caption: a file stands alone, where
    the page has both as text. Equal figures give equal bytes."""
    with _settings(panel.key):
        figure = _figure(panel, alone=True)
        # Laid out once, not again for every format.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return {kind: _save(figure, kind, facecolor="white") for kind in FORMATS}


def slug(text: str) -> str:
    """A text as a part of a file name."""
    return re.sub(r"[^\w]+", "-", text).strip("-").lower()


def _settings(key: str) -> Any:
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": key,
            "pdf.fonttype": 42,  # letters that an editor can change
            "text.parse_math": False,  # a dollar in a name does not start a formula
        }
    )


def _figure(panel: Panel, alone: bool) -> Figure:
    from matplotlib.figure import Figure

    title = textwrap.wrap(panel.title, _TITLE_CHARACTERS) if alone else []
    note = textwrap.wrap(panel.note, _NOTE_CHARACTERS) if alone else []
    head = _TITLE_INCHES * len(title) + _NOTE_INCHES * len(note) + (0.1 if alone else 0.0)
    height = panel.height + head
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    if alone:
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / height))  # type: ignore[union-attr]
        for lines, size, below in ((title, 10, 0.05), (note, 7, 0.05 + _TITLE_INCHES * len(title))):
            place = 1 - below / height
            figure.text(0.015, place, "\n".join(lines), ha="left", va="top", fontsize=size, color=INK)
    panel.draw(figure)
    return figure


def _save(figure: Figure, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    # No date: a report that says the same is the same file.
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(stream, format=kind, dpi=144, metadata=dates.get(kind), **options)
    return stream.getvalue()
