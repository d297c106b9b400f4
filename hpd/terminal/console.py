"""The one console: progress as bars in a terminal and as lines elsewhere, and tables whose figures are never
cut."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, cast

import rich.progress
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpd.progress import Bar, Progress, drop_lost_output

__all__ = ["TerminalProgress", "console", "paragraph", "remarks", "show_figures", "show_next"]

# Columns of a bar, and those below which it is left out.
_BAR = 24
_SHORTEST_BAR = 6
# Between two lines on a job whose figures have not changed, where there is no terminal.
_LINE_SECONDS = 30.0
# More columns than any line of text has.
_UNBOUNDED = 10_000


class _Output:
    """Standard output, which a job outlives: where it is lost, nothing is shown."""

    @property
    def rich_proxied_file(self) -> _Output:
        # While bars are shown, rich has a proxy in the place of standard output; it asks for what is behind.
        return self

    def write(self, text: str) -> int:
        return self._try("write", text) or 0

    def flush(self) -> None:
        self._try("flush")

    def _try(self, name: str, *arguments: str) -> Any:
        try:
            return getattr(self._file, name)(*arguments)
        except OSError:
            drop_lost_output()
            return None

    @property
    def _file(self) -> Any:
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# One process of a launch speaks; errors have a console of their own.
console = Console(file=cast("IO[str]", _Output()), quiet=int(os.environ.get("RANK", "0")) != 0)


remarks = Console(stderr=True)
"""For what is said beside an output that a program may read."""


class TerminalProgress(Progress):
    """Bars with the time left in a terminal, lines with the same figures elsewhere; of the main process."""

    def __init__(self) -> None:
        self._shown = int(os.environ.get("RANK", "0")) == 0

    def say(self, text: str) -> None:
        if self._shown:
            paragraph(text)

    def bar(self, name: str) -> Bar:
        if not self._shown:
            return super().bar(name)
        return _RichBar(name) if console.is_terminal else _Lines(name)


def paragraph(text: str | Text) -> None:
    """Print a paragraph: in a terminal broken between words, elsewhere one line."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def show_next(*commands: str) -> None:
    """Name the commands that people want next, each on a line of its own."""
    for number, command in enumerate(commands):
        lead = "     " if number else "next:"
        console.print(f"{lead} {command}", highlight=False, markup=False, soft_wrap=True)


def show_figures(table: Table) -> None:
    """Print a table of figures, none of them cut; its title is a line of text above, as wide as it needs.

    Where the terminal is too narrow, each row is a block of lines. Outside a terminal nothing is too wide.
    """
    if table.title:
        style = "italic" if table.title_style is None else table.title_style
        console.print(table.title, style=style, highlight=False, soft_wrap=not console.is_terminal)
        table.title = None
    wide = console.options.update(width=_UNBOUNDED, max_width=_UNBOUNDED)
    needed = Measurement.get(console, wide, table).maximum
    if needed <= console.width:
        console.print(table)
    elif console.is_terminal:
        _show_blocks(table)
    else:
        before, console.width = console.width, needed  # print's own width is cut to the console's
        console.print(table)
        console.width = before


def _show_blocks(table: Table) -> None:
    columns = [[column.header, *column.cells] for column in table.columns]
    if table.show_footer:
        columns = [[*cells, column.footer] for cells, column in zip(columns, table.columns, strict=True)]
    headers, *rows = zip(*columns, strict=True)
    for name, *values in rows:
        console.print(name, style="bold", highlight=False)
        for header, value in zip(headers[1:], values, strict=True):
            if value:
                console.print(f"  {header}: {value}" if header else f"  {value}", highlight=False)
    if table.caption:
        console.print(table.caption, style="dim", highlight=False)


class _Pace:
    """When a job began, and when it will end if it goes on like this."""

    def __init__(self, done: int):
        self._began, self._first = time.perf_counter(), done

    def elapsed(self) -> float:
        """Seconds since the first figure."""
        return time.perf_counter() - self._began

    def rate(self, done: int) -> str:
        """What is done a second, in words; nothing yet at the start."""
        if not self._measured(done):
            return ""
        rate = (done - self._first) / self.elapsed()
        return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"

    def times(self, done: int, total: int) -> str:
        """Elapsed time, and time left where it can be told."""
        left = "?"
        if done >= total:
            left = _clock(0.0)
        elif self._measured(done):
            left = _clock(self.elapsed() * (total - done) / (done - self._first))
        return f"{_clock(self.elapsed())} left {left}"

    def _measured(self, done: int) -> bool:
        return done > self._first and self.elapsed() > 0


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


class _Lines:
    """A line when a job begins, at each change of its figures, twice a minute without one, and at its end."""

    def __init__(self, name: str):
        self._name = name
        self._pace: _Pace | None = None
        self._note = ""
        self._shown_at = 0.0
        self._shown_done = -1

    def __call__(self, done: int, total: int, note: str = "") -> None:
        beside, _, below = note.partition("\n")
        if self._pace is None:
            self._pace = _Pace(done)
        elif self._is_quiet(done, total, beside):
            return
        self._note, self._shown_at, self._shown_done = beside, time.perf_counter(), done
        figures = [f"{self._name} {done:,}/{total:,}", beside or self._pace.rate(done)]
        line = "  ".join(filter(None, [*figures, self._pace.times(done, total)]))
        console.print("\n".join(filter(None, [line, below])), markup=False, highlight=False, soft_wrap=True)
        console.file.flush()  # whoever follows the file sees it now

    def _is_quiet(self, done: int, total: int, beside: str) -> bool:
        if done >= total:
            return self._shown_done == done and beside == self._note
        return beside == self._note and time.perf_counter() - self._shown_at < _LINE_SECONDS


class _Display(rich.progress.Progress):
    """Bars below each other, each with all of its figures: where a row is too narrow, the bar gets shorter,
    and then the figures get a row of their own."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            times, note, below = (task.fields[name] for name in ("times", "note", "below"))
            count = f"{int(task.completed):,}/{int(task.total or 0):,} {times}"
            room = self.console.width - 1
            bar = room - sum(cell_len(part) + 1 for part in (task.description, count, note) if part)
            row = [task.description, count, note]
            if bar < _SHORTEST_BAR and note:
                below = "\n".join(filter(None, [f"  {note}", below]))
                bar += cell_len(note) + 1
                row.pop()
            if bar >= _SHORTEST_BAR:
                grid = Table.grid(padding=(0, 1))
                width = min(_BAR, bar)
                shown = ProgressBar(total=task.total, completed=task.completed, width=width)
                grid.add_row(Text(row[0]), shown, *map(Text, filter(None, row[1:])))  # a cell costs a column
                yield grid
            else:
                yield Text(" ".join(filter(None, row)), overflow="fold")
            if below:
                yield Text(below, overflow="fold")


_display = _Display(console=console)
"""Of all bars: a terminal has one place where lines are redrawn, and validations run inside training."""


def _open_display() -> _Display:
    """The display, a new one where it is empty: one that was stopped would draw over the lines above it, as
    many as it had."""
    global _display
    if not _display.tasks:
        _display = _Display(console=console)
    return _display


class _RichBar:
    """A bar that appears with its first figure and stays when it is full."""

    def __init__(self, name: str):
        self._name = name
        self._task: rich.progress.TaskID | None = None
        self._pace = _Pace(0)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._task is None:
            self._pace = _Pace(done)
            self._task = _open_display().add_task(
                self._name, total=total, completed=done, times="", note="", below=""
            )
            _display.start()
            # Whatever ends the program, the terminal gets its cursor back.
            atexit.register(_display.live.stop)
        beside, _, below = note.partition("\n")
        _display.update(
            self._task,
            completed=done,
            total=total,
            times=self._pace.times(done, total),
            note=beside or self._pace.rate(done),
            below=below,
        )
        if done >= total:
            self._end()

    def _end(self) -> None:
        """Leave a last picture of this bar, or, inside another job, make room for that."""
        assert self._task is not None
        if len(_display.tasks) == 1:
            _display.stop()
        _display.remove_task(self._task)
        self._task = None
