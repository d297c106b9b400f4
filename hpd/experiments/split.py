"""Axes in two parts, where a few series would press all others together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hpd.experiments.figures import INK, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SPLIT_NOTE", "Split", "split", "split_axes"]

SPLIT_NOTE = "The axis is split and each part has its own scale."
_STRETCH = 4.0
"""An axis is split where all that is drawn takes this many times the room of the larger half."""
_SMALLEST_CORE = 3
_CORE_SHARE = 0.68
"""Of a split axis, for the part that holds most series."""


class Split(NamedTuple):
    """An axis in one part or two."""

    parts: list[tuple[float, float]]
    """Low to high."""
    core: int
    """The part that holds most items."""


def split(ranges: Sequence[tuple[float, float]]) -> Split:
    """The range of an axis, or two of them where a few items stretch it.

    Items at one end are cut off if at least half of all, and three, remain and these need no more than a
    quarter of the room; as many as can remain do.

    >>> split([(0, 1), (0, 2), (1, 2), (40, 50)])
    Split(parts=[(0, 2), (40, 50)], core=0)
    """
    low, high = min(a for a, _ in ranges), max(b for _, b in ranges)
    best = (0, Split([(low, high)], 0))
    for sign in (1, -1):
        # Mirrored, the items at the lower end are those at the upper one.
        items = sorted(((a, b) if sign > 0 else (-b, -a) for a, b in ranges), key=lambda item: item[1])
        start = min(a for a, _ in items)
        for count in range(len(items) - 1, max(_SMALLEST_CORE, (len(items) + 1) // 2) - 1, -1):
            core, rest = items[:count], items[count:]
            end = core[-1][1]
            if 0 < _STRETCH * (end - start) <= high - low:
                away = (max(end, min(a for a, _ in rest)), rest[-1][1])
                cut = Split([(start, end), away], 0)
                found = cut if sign > 0 else Split([(-away[1], -away[0]), (-end, -start)], 1)
                best = max(best, (count, found), key=lambda pair: pair[0])
                break
    return best[1]


def split_axes(figure: Figure, found: Split, vertical: bool) -> list[Axes]:
    """One axis, or two parts of one that is split, low to high.

    The caller draws everything on each part.

    Args:
        vertical: the split axis is y, else x.
    """
    if len(found.parts) < 2:
        return new_axes(figure)
    figure.get_layout_engine().set(hspace=0.0, wspace=0.0, h_pad=0.02, w_pad=0.02)  # type: ignore[union-attr]
    shares = [1 - _CORE_SHARE] * 2
    shares[found.core] = _CORE_SHARE
    if vertical:
        upper, lower = new_axes(figure, 2, 1, sharex=True, height_ratios=shares[::-1])
        upper.spines["bottom"].set_visible(False)
        upper.tick_params(bottom=False, labelbottom=False)
        axes, marks = [lower, upper], (((0, 1), lower), ((0, 0), upper))
    else:
        left, right = new_axes(figure, 1, 2, sharey=True, width_ratios=shares)
        right.spines["left"].set_visible(False)
        right.tick_params(left=False, labelleft=False)
        axes, marks = [left, right], (((1, 0), left), ((0, 0), right))
    slant = [(-1, -0.5), (1, 0.5)] if vertical else [(-0.5, -1), (0.5, 1)]
    for (x, y), axis in marks:
        axis.plot(
            [x],
            [y],
            marker=slant,
            markersize=9,
            color=INK,
            linestyle="",
            transform=axis.transAxes,
            clip_on=False,
        )
    for axis, limits in zip(axes, _padded(found), strict=True):
        axis.set_ylim(*limits) if vertical else axis.set_xlim(*limits)
        axis.locator_params(axis="y" if vertical else "x", nbins=4)
    return axes


def _padded(found: Split) -> list[tuple[float, float]]:
    room = found.parts[found.core][1] - found.parts[found.core][0]
    pads = [0.06 * (b - a) or 0.06 * room for a, b in found.parts]
    (low, end), (start, high) = found.parts
    end, start = end + pads[0], start - pads[1]
    if start < end:  # the parts touch: the one that holds most keeps its margin
        start = end = end if found.core == 0 else start
    return [(low - pads[0], end), (start, high + pads[1])]
