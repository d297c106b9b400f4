"""What a terminal shows: progress, verdicts, tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.progress import (
    Progress,
    TaskID,
    TextColumn,
)
from rich.table import Table
from transformers import TrainerCallback

from hpd.config.schema import Recipe
from hpd.methods.table import METHODS, name_terms
from hpd.progress import Progress as TrainProgress
from hpd.terminal.console import _bar, console, progress_bar
from hpd.training.caching import CacheProgress, write_cache
from hpd.training.run import train

__all__ = [
    "cache_with_display",
    "generate_with_display",
    "show_methods",
    "show_summary",
    "train_with_display",
]


def show_methods() -> None:
    """The table of METHODS."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("support", no_wrap=True)
    table.add_column("what it learns", overflow="fold")
    for name, method in METHODS.items():
        table.add_row(name, ", ".join(str(term.support) for term in name_terms(method.terms)), method.summary)
    console.print(table)
    console.print(
        "\nmethod: NAME in a recipe, or method=NAME on the command line; weights and sources: "
        "docs/methods.md",
        highlight=False,
    )


class _TrainingBar(TrainerCallback):
    """Loss, KL, tokens per second and time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = _bar(TextColumn("{task.fields[figures]}"))
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, figures=""
            )
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._bar is None or self._task is None or not logs or "loss" not in logs:
            return
        elapsed = self._bar.tasks[0].elapsed or 0.0
        tokens, seconds = logs.get("num_tokens", 0.0) - self._last[0], elapsed - self._last[1]
        self._last = (logs.get("num_tokens", 0.0), elapsed)
        figures = f"loss {logs['loss']:.4f}"
        if "forward_kl" in logs:
            figures += f"  KL {logs['forward_kl']:.4f}"
        if seconds > 0:
            figures += f"  {tokens / seconds:,.0f} tok/s"
        self._bar.update(self._task, figures=figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


class _TerminalProgress(TrainProgress):
    def say(self, text: str) -> None:
        console.print(escape(text), highlight=False)

    def evaluating(self, name: str) -> Callable[[int, int], None]:
        return progress_bar(f"answers of {name}")

    def callbacks(self) -> Sequence[TrainerCallback]:
        return (_TrainingBar(),)


def train_with_display(recipe: Recipe, overwrite: bool = False) -> dict[str, Any]:
    """`hpd.training.run.train` with bars."""
    return train(recipe, overwrite=overwrite, progress=_TerminalProgress())


class _CacheBar(CacheProgress):
    """Label positions done, their rate and the time left, on the main process."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._shown = int(os.environ.get("RANK", "0")) == 0
        self._start = (0.0, 0)

    def say(self, text: str) -> None:
        console.print(escape(text), highlight=False)

    def update(self, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._bar is None:
            self._bar = _bar(TextColumn("{task.fields[rate]}"))
            self._bar.add_task("label positions", total=total, completed=done, rate="")
            self._bar.start()
            self._start = (time.perf_counter(), done)
        rate = (done - self._start[1]) / max(time.perf_counter() - self._start[0], 1e-9)
        self._bar.update(self._bar.tasks[0].id, completed=done, rate=f"{rate:,.0f}/s")
        if done >= total:
            self._bar.stop()


def cache_with_display(recipe: Recipe, overwrite: bool = False) -> None:
    """`hpd cache`: the bar, and what was written."""
    started, bar = time.perf_counter(), _CacheBar()
    summary = write_cache(recipe, overwrite=overwrite, progress=bar)
    seconds = time.perf_counter() - started
    if int(os.environ.get("RANK", "0")) == 0:
        what = (
            f"{summary.written:,} positions written"
            if summary.written
            else "complete and verified, nothing to write"
        )
        console.print(f"{summary.path}: {what} in {seconds:.0f} s", highlight=False)
        console.print(f"train from it with teacher.type=cached teacher.path={summary.path}", highlight=False)


def show_summary(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Before and after, side by side, and where the student is."""
    console.print(summary_table(summary))
    console.print(f"student and metrics in {recipe.output_dir}", highlight=False)


def generate_with_display(recipe: Recipe, overwrite: bool = False) -> None:
    """`hpd generate`, with a bar and the summary."""
    from hpd.config.schema import GenerateConfig
    from hpd.generate import generate
    from hpd.progress import quiet_libraries

    quiet_libraries()
    summary = generate(recipe, overwrite=overwrite, progress=progress_bar("completions"))
    console.print(
        f"{summary['rows']:,} of {summary['completions']:,} completions of {summary['model']} kept "
        f"({summary['truncated']:,} cut, {summary['empty']:,} empty, {summary['wrong']:,} wrong), "
        f"{summary['tokens']:,} tokens, in {(recipe.generate or GenerateConfig()).output}",
        highlight=False,
    )


_FIGURES = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")


def summary_table(summary: dict[str, Any]) -> Table:
    """The figures of a run before and after training."""
    table = Table(
        title=f"{summary['method']}: {summary['steps']} steps, {summary['seconds']:.0f} s",
        title_justify="left",
    )
    table.add_column("")
    for column in ("before", "after", "teacher"):
        table.add_column(column, justify="right")
    for label in _task_labels(summary):
        show = _nats if label.endswith("score") else _share
        table.add_row(
            label,
            *(show(summary.get(f"{who} {label}")) for who in ("student before", "student after", "teacher")),
        )
    for figure in _FIGURES:
        before, after = summary.get(f"{figure} before"), summary.get(f"{figure} after")
        if before is not None or after is not None:
            show = _share if figure == "top1_agreement" else _nats
            table.add_row(figure, show(before), show(after), "")
    return table


def _task_labels(summary: dict[str, Any]) -> list[str]:
    """Metrics of the recipe's tasks."""
    found = [
        key.removeprefix(prefix)
        for prefix in ("student before ", "student after ")
        for key in summary
        if key.startswith(prefix)
    ]
    return list(dict.fromkeys(found))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
