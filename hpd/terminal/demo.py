"""`hpd demo` in a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpd.config.load import load_recipe
from hpd.demo.plot import plot_training
from hpd.demo.recipe import demo_recipe
from hpd.files import JsonLines
from hpd.terminal.console import console
from hpd.terminal.training import show_summary, train_with_display

__all__ = ["run_demo"]


_SAMPLES = 4


def run_demo(output_dir: Path, overrides: Sequence[str] = (), overwrite: bool = False) -> dict[str, Any]:
    """Distill the packaged pair and show what changed; returns the run's summary."""
    recipe = load_recipe(demo_recipe(output_dir), overrides)
    console.print(
        "A 0.8 M-parameter teacher solves chains of arithmetic in writing. A student 8 times smaller, from "
        "random weights, learns from 24,000 of its solutions with "
        f"[bold]{escape(recipe.method or 'terms')}[/].\n",
        highlight=False,
    )
    summary = train_with_display(recipe, overwrite=overwrite)
    picture = plot_training(Path(recipe.output_dir))
    console.print()
    show_summary(recipe, summary)
    _show_samples(Path(recipe.output_dir))
    console.print(f"\ntraining curves: {picture or 'none, no step was logged'}", highlight=False)
    console.print(
        "next: the same run with another method  [bold]hpd demo --overwrite method=forward_kl[/]\n"
        "      your own pair                     [bold]hpd init recipe.yaml[/]\n"
        "      every method                      [bold]hpd methods[/]",
        highlight=False,
    )
    return summary


def _show_samples(folder: Path) -> None:
    """The same problems, answered by the teacher and by the student before and after."""
    evals = {
        entry["id"]: entry["model"]
        for entry in json.loads((folder / "evals.json").read_text(encoding="utf-8"))
    }
    answers: dict[str, dict[str, tuple[str, bool]]] = {}
    prompts: dict[str, str] = {}
    for record in JsonLines(folder / "records-exact-match.jsonl").read():
        prompts[record["id"]] = record["prompt"]
        answers.setdefault(record["id"], {})[evals[record["eval"]]] = (record["text"], record["correct"])
    models = ("teacher", "student before", "student after")
    table = Table(title="the first problems of the test file", title_justify="left")
    table.add_column("problem", overflow="fold")
    for model in models:
        table.add_column(model, overflow="fold")
    for identity in list(answers)[:_SAMPLES]:
        cells = [answers[identity].get(model, ("", False)) for model in models]
        shown = [
            f"[{'green' if correct else 'red'}]{escape(text.strip()[:80])}[/]" for text, correct in cells
        ]
        table.add_row(escape(prompts[identity]), *shown)
    console.print(table)
