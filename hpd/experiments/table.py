"""A table of a report: rows of text and numbers, what they sort by, and their tone."""

from __future__ import annotations

import csv
import io
import math
from typing import Any, NamedTuple

from hpd.experiments.figures import Panel

__all__ = ["Table", "TableCell", "number", "panel_table"]


class TableCell(NamedTuple):
    """A cell that sorts by something else than its text, or has a tone (win, loss, best)."""

    text: str
    sort: float | str
    tone: str = ""


class Table(NamedTuple):
    """Rows under columns; a cell is text, a number, or a `TableCell`."""

    key: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def as_csv(self) -> str:
        """Numbers at full precision."""
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_plain(cell) for cell in row] for row in self.rows])
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
