"""The one console and its progress bars, which every command shows alike."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, cast

import rich.progress
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from hpd.progress import Bar, Progress, drop_lost_output

__all__ = ["TerminalProgress", "console"]


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


class TerminalProgress(Progress):
    """Bars with the time left, of the main process."""

    def __init__(self) -> None:
        self._shown = int(os.environ.get("RANK", "0")) == 0

    def say(self, text: str) -> None:
        if self._shown:
            console.print(escape(text), highlight=False)

    def bar(self, name: str) -> Bar:
        return _RichBar(name) if self._shown else super().bar(name)


class _Display(rich.progress.Progress):
    """Bars, and lines of text below them."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below)


class _RichBar:
    """A bar that appears with its first figure and stays when it is full."""

    def __init__(self, name: str):
        self._display = _Display(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._display.add_task(escape(name), note="", start=False)
        self._start: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._start is None:
            self._start = (time.perf_counter(), done)
            self._display.start_task(self._task)
            self._display.start()
            # Whatever ends the program, the terminal gets its cursor back.
            atexit.register(self._display.live.stop)
        beside, _, self._display.below = note.partition("\n")
        shown = escape(beside) if note else self._rate(done)
        self._display.update(self._task, completed=done, total=total, note=shown)
        if done >= total and self._display.live.is_started:
            self._display.stop()

    def _rate(self, done: int) -> str:
        assert self._start is not None
        began, first = self._start
        seconds = time.perf_counter() - began
        if done <= first or seconds <= 0:
            return ""
        rate = (done - first) / seconds
        return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
