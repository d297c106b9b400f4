"""A table of a report: rows of text and numbers, what they sort by, and their tone."""

from __future__ import annotations

import csv
import io
import math
from typing import Any, NamedTuple

from hpd.experiments.figures import Panel

__all__ = ["Table", "TableCell", "number", "panel_table"]


class TableCell(NamedTuple):
    """A cell that sorts by something else than its text, has a tone (win, loss, none, few, best), or more to
    say."""

    text: str
    sort: float | str
    tone: str = ""
    detail: str = ""
    """What stands after the text, smaller."""
    bounds: tuple[float, float] | None = None
    """The interval around `sort`, for the CSV file."""


class Table(NamedTuple):
    """Rows under columns; a cell is text, a number, or a `TableCell`."""

    key: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def as_csv(self) -> str:
        """Numbers at full precision; a column of numbers with intervals is followed by their ends."""
        with_ends = [any(_bounds(row[i]) for row in self.rows) for i in range(len(self.columns))]
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            part
            for name, has_ends in zip(self.columns, with_ends, strict=True)
            for part in ((name, f"{name} low", f"{name} high") if has_ends else (name,))
        )
        for row in self.rows:
            cells: list[Any] = []
            for cell, has_ends in zip(row, with_ends, strict=True):
                cells.append(cell)
                cells += (_bounds(cell) or ("", "")) if has_ends else ()
            writer.writerow(map(_plain, cells))
        return stream.getvalue()


def number(value: float | None, digits: int = 3) -> TableCell:
    """A number to `digits` significant digits; empty where there is none."""
    if value is None or math.isnan(value):
        return TableCell("", math.nan)
    return TableCell(
        f"{value:.{digits}g}" if abs(value) < 1e4 or math.isinf(value) else f"{value:,.0f}", float(value)
    )


def panel_table(panel: Panel) -> Table:
    """The numbers behind a figure."""
    rows = [tuple(number(cell, 4) if isinstance(cell, float) else cell for cell in row) for row in panel.rows]
    return Table(panel.key, panel.title, "", panel.columns, rows)


def _bounds(cell: Any) -> tuple[float, float] | None:
    return cell.bounds if isinstance(cell, TableCell) else None


def _plain(cell: Any) -> Any:
    value = (
        cell.sort
        if isinstance(cell, TableCell)
        and cell.text not in ("", str(cell.sort))
        and isinstance(cell.sort, str)
        else cell
    )
    if isinstance(value, TableCell):
        value = value.sort
    return "" if isinstance(value, float) and math.isnan(value) else value
