"""The verdicts on a pair of models and its rows."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpd.models.pairing import CheckResult
from hpd.terminal.console import console

__all__ = ["show_verdicts"]

_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}


def show_verdicts(verdicts: Iterable[CheckResult], to: Console = console) -> None:
    """One line per finding."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for verdict in verdicts:
        table.add_row(_MARKS[verdict.level], verdict.topic, escape(verdict.text))
    to.print(table)
