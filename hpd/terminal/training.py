"""`hpd train`, `hpd cache` and `hpd generate` in a terminal."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from hpd.config.check import resolve
from hpd.config.load import load_recipe
from hpd.config.schema import GenerateConfig, Recipe
from hpd.generate import CHUNK, generate, part_of
from hpd.progress import Bar, Progress, quiet_libraries
from hpd.terminal.console import (
    TerminalProgress,
    console,
    paragraph,
    remarks,
    show_figures,
    show_next,
)
from hpd.terminal.rows import show_rows
from hpd.terminal.verdicts import show_verdicts
from hpd.training.caching import shards_of, write_cache
from hpd.training.hub import PushFailed
from hpd.training.measured import SET_NAME
from hpd.training.plan import plan
from hpd.training.run import train
from hpd.training.stopping import ends_kept, leaving_processes

__all__ = ["run_cache", "run_generate", "run_train", "show_summary", "train_with_display"]

_FIGURES = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")


def run_train(
    path: Path, overrides: Sequence[str], dry_run: bool, overwrite: bool, takes_changed: bool = False
) -> None:
    """Train by a recipe file and show the summary; or check everything and print the resolved recipe."""
    recipe = load_recipe(path, overrides)
    if not dry_run:
        try:
            summary = train_with_display(recipe, overwrite, takes_changed)
        except PushFailed as error:
            show_summary(recipe, error.summary)
            raise
        show_summary(recipe, summary)
        folder = shlex.quote(recipe.output_dir)
        show_next(f"hpd chat {folder}", f"hpd eval {folder} --data test.jsonl", f"hpd report {folder}")
        return
    with leaving_processes():
        planned = plan(recipe)
        text = yaml.safe_dump(resolve(recipe), sort_keys=False, allow_unicode=True)
        if not console.quiet:
            console.file.write(text)  # as it is: no wrapping, no markup
            console.file.flush()
        # Beside the recipe, not in it: `hpd train recipe.yaml --dry-run > resolved.yaml` gives a recipe.
        show_verdicts(planned.verdicts, remarks)
        show_rows(planned, remarks)
        planned.require_sound()


def train_with_display(
    recipe: Recipe, overwrite: bool = False, takes_changed: bool = False
) -> dict[str, Any]:
    """Train with bars; returns the summary of `hpd.training.run.train`."""
    with leaving_processes():
        return train(recipe, overwrite=overwrite, progress=_TrainingProgress(), takes_changed=takes_changed)


def show_summary(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Show before and after, side by side, and where the student is."""
    table = summary_table(summary)
    if table.row_count:
        show_figures(table)
    else:
        paragraph(
            f"{_title(summary)}. Nothing was measured before or after: data.validation holds rows out for "
            "that, and eval names tasks."
        )
    paragraph(f"student and metrics in {recipe.output_dir}")


def run_cache(path: Path, overrides: Sequence[str], overwrite: bool) -> None:
    """Write the cache of a recipe file, with a bar, and show what was written."""
    started = time.perf_counter()
    recipe = load_recipe(path, overrides)
    folder = Path(recipe.cache.path if recipe.cache else "")

    def kept() -> str | None:
        done = len(shards_of(folder))
        return f"{done:,} shards are in {folder}" if done else None

    with ends_kept(folder, "Writing the cache", kept), leaving_processes():
        summary = write_cache(recipe, overwrite=overwrite, progress=TerminalProgress())
    seconds = time.perf_counter() - started
    if int(os.environ.get("RANK", "0")) == 0:
        done = "complete and verified, nothing to write"
        if summary.written:
            done = f"{summary.written:,} positions written"
        paragraph(f"{summary.path}: {done} in {seconds:.0f} s")
        written = shlex.quote(str(summary.path))
        show_next(f"hpd train {shlex.quote(str(path))} teacher.type=cached teacher.path={written}")


def run_generate(path: Path, overrides: Sequence[str], overwrite: bool) -> None:
    """Write the completions of a recipe file, with a bar, and show the summary."""
    quiet_libraries()
    recipe = load_recipe(path, overrides)
    output = Path((recipe.generate or GenerateConfig()).output)

    def kept() -> str | None:
        part = part_of(output)
        done = sum("chunk" in line for line in part.read() if isinstance(line, dict))
        return f"{done:,} chunks of {CHUNK} completions are in {part.path}" if done else None

    with ends_kept(output, "Writing completions", kept):
        summary = generate(recipe, overwrite=overwrite, progress=TerminalProgress())
    paragraph(
        f"{summary['rows']:,} of {summary['completions']:,} completions of {summary['model']} kept "
        f"({summary['truncated']:,} cut, {summary['empty']:,} empty, {summary['wrong']:,} wrong), "
        f"{summary['tokens']:,} tokens, in {output}"
    )
    told = recipe.generate is not None and recipe.generate.logprobs
    stored = recipe.prefixes is not None and recipe.prefixes.stored
    how = " method=opd prefixes.student=1 prefixes.stored=true" if told and not stored else ""
    show_next(f"hpd train {shlex.quote(str(path))} data.path={shlex.quote(str(output))}{how}")


def summary_table(summary: dict[str, Any]) -> Table:
    """The figures of a run before and after training."""
    table = Table(title=_title(summary), title_justify="left")
    table.add_column("")
    for column in ("before", "after", "teacher"):
        table.add_column(column, justify="right")
    for label in _task_labels(summary):
        show = _nats if label.endswith("score") else _share
        table.add_row(
            label,
            *(show(summary.get(f"{who} {label}")) for who in ("student before", "student after", "teacher")),
        )
    for figure in _figures(summary):
        before, after = summary.get(f"{figure} before"), summary.get(f"{figure} after")
        if before is not None or after is not None:
            show = _share if figure.endswith("top1_agreement") else _nats
            table.add_row(figure, show(before), show(after), "")
    return table


def _figures(summary: dict[str, Any]) -> list[str]:
    """Figures of the validation rows, of several sets one set after the other."""
    names = list(
        dict.fromkeys(key.rpartition(" ")[0] for key in summary if key.endswith((" before", " after")))
    )
    sets = dict.fromkeys(
        name.removesuffix(figure) for name in names for figure in _FIGURES if name.endswith(f"_{figure}")
    )
    return [f"{one}{figure}" for one in ("", *sets) for figure in _FIGURES]


def _title(summary: dict[str, Any]) -> str:
    """Method, steps and times: of the steps alone, and of the whole command."""
    return (
        f"{summary['method']}: {summary['steps']} steps in {summary['train seconds']:,.0f} s, "
        f"{summary['seconds']:,.0f} s with loading and evaluation"
    )


class _TrainingBar(TrainerCallback):
    """Loss, KL, tokens per second and time left of training, and how far each validation is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: Bar | None = None
        self._figures = ""
        self._last = (0.0, 0.0)
        self._validation: Bar | None = None
        self._batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = self._progress.bar("training")
            self._last = (0.0, time.perf_counter())
            self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        tokens = logs.get("num_tokens", 0.0) - self._last[0]
        seconds = now - self._last[1]
        self._last = (logs.get("num_tokens", 0.0), now)
        self._figures = f"loss {logs['loss']:.4f}"
        if "forward_kl" in logs:
            self._figures += f"  KL {logs['forward_kl']:.4f}"
        if seconds > 0:
            self._figures += f"  {tokens / seconds:,.0f} tok/s"
        self._show(state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self._validation is None:
            name = getattr(eval_dataloader, SET_NAME, "")
            self._validation = self._progress.bar(f"validation of {name}" if name else "validation")
        self._batches += 1
        self._validation(self._batches, len(eval_dataloader))
        if self._batches >= len(eval_dataloader):
            self._validation, self._batches = None, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar(state.global_step, state.global_step, self._figures)

    def _show(self, state: Any) -> None:
        # The last step's log comes after it, and the bar ends where it is full.
        if self._bar is not None and state.global_step < state.max_steps:
            self._bar(state.global_step, state.max_steps, self._figures)


class _TrainingProgress(TerminalProgress):
    def callbacks(self) -> Sequence[TrainerCallback]:
        return (_TrainingBar(self),)


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
