"""The one console: progress bars and verdicts that every command shows alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hpd.models.pairing import CheckResult

__all__ = ["console", "progress_bar", "show_verdicts"]


console = Console()


_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}


def show_verdicts(verdicts: Iterable[CheckResult]) -> None:
    """One line per finding."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for verdict in verdicts:
        table.add_row(_MARKS[verdict.level], verdict.topic, escape(verdict.text))
    console.print(table)


def _bar(*extra: TextColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *extra,
        console=console,
    )


def progress_bar(description: str) -> Callable[[int, int], None]:
    """A callback `(done, total)` that draws a bar and closes it at the end."""
    bar = _bar()
    task = bar.add_task(description)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return update
