"""`hpd compare` in a terminal."""

from __future__ import annotations

import math
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpd.config.schema import Recipe
from hpd.estimate.memory import StepMemory
from hpd.experiments.compare import Failure, compare
from hpd.experiments.experiment import Experiment, load_experiment
from hpd.experiments.grid import expand
from hpd.experiments.manifest import MANIFEST, RECORD, is_finished
from hpd.experiments.output import check_target, write_report
from hpd.experiments.predict import Cost, predict
from hpd.experiments.report import build_report
from hpd.experiments.tuning import all_tuning, read_choices
from hpd.terminal.console import TerminalProgress, console, paragraph, show_figures, show_next
from hpd.terminal.report import show_verdicts
from hpd.training.plan import plan
from hpd.training.stopping import ends_kept

__all__ = ["run_compare"]

_GIB = 2**30


def run_compare(
    path: Path, overrides: Sequence[str], jobs: int, allow: Sequence[str], dry_run: bool, probe: bool
) -> bool:
    """Run the grid, then write the report and print its verdicts; False if a run failed."""
    if dry_run:
        _dry_run(path, overrides, jobs, probe)
        return True
    folder = load_experiment(path, overrides).folder
    # Known before hours of runs, not behind them.
    check_target(folder / "report")

    def kept() -> str | None:
        finished = len(list(folder.glob(f"*/*/{RECORD}")))
        return f"{finished} finished runs and what the others saved are in {folder}" if finished else None

    with ends_kept(folder, "The comparison", kept):
        experiment, failures = compare(path, overrides, jobs, allow, TerminalProgress())
        if failures:
            _show_failures(failures)
            return False
        _show_choices(experiment)
        report = build_report([folder], allow=allow)
        page = write_report(report, folder / "report")
    console.print()
    show_verdicts(report)
    paragraph(f"\nreport: {page}")
    show_next(f"hpd report {shlex.quote(str(folder))} --watch")
    return True


def _show_choices(experiment: Experiment) -> None:
    for choice in read_choices(experiment.folder) or ():
        if choice.ties:
            equal = ", ".join(f"{value:g}" for value in choice.ties)
            console.print(
                f"{escape(choice.group)}: {choice.path} {choice.chosen:g} was taken, {equal} did as well.",
                highlight=False,
            )


def _show_failures(failures: Sequence[Failure]) -> None:
    table = Table(
        title=f"{len(failures)} runs failed; the others are kept, and a second call repeats only these",
        title_justify="left",
    )
    table.add_column("run")
    table.add_column("why", overflow="fold")
    table.add_column("log", overflow="fold")
    for failure in failures:
        table.add_row(escape(failure.name), escape(failure.reason), escape(str(failure.log)))
    console.print(table)


def _dry_run(path: Path, overrides: Sequence[str], jobs: int, probe: bool) -> None:
    """Print the grid and what it will cost; nothing is written but to a temporary folder."""
    experiment = load_experiment(path, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        # Files of a base function must exist to be checked; finished runs are looked for where they are.
        folder = experiment.folder if (experiment.folder / MANIFEST).is_file() else Path(scratch)
        tuning = all_tuning(experiment, folder)
        runs = expand(experiment, folder)
        _show_axes(experiment)
        costs = predict(experiment, folder, runs, probe, TerminalProgress())
        unfinished = [cell for cell in tuning if not is_finished(cell.recipe)]
        seconds = _show_costs(costs, len(unfinished))
        _show_total(experiment, runs[0].recipe, seconds, jobs)


def _show_axes(experiment: Experiment) -> None:
    console.print(f"[bold]{escape(experiment.name)}[/]: {escape(experiment.question)}", highlight=False)
    variants = {"variant": experiment.variants} if experiment.variants else {}
    axes: dict[str, Any] = {**variants, **experiment.axes}
    for axis, values in axes.items():
        console.print(f"  {escape(axis)}: {escape(', '.join(map(str, values)))}", highlight=False)
    if experiment.tune is not None:
        tune = experiment.tune
        tried = (f"{path} in {', '.join(f'{v:g}' for v in values)}" for path, values in tune.paths.items())
        console.print(
            f"  tuned on {escape(tune.metric)} of validation rows, seeds {', '.join(map(str, tune.seeds))}: "
            f"{escape('; then '.join(tried))}",
            highlight=False,
        )
    if experiment.budget is not None:
        console.print(
            f"  equal budget: {experiment.budget.value:g} {experiment.budget.type}", highlight=False
        )


def _show_costs(costs: Sequence[Cost], num_tuning: int) -> float:
    table = Table(title="predicted cost of a run, alone on this machine", title_justify="left")
    for column in ("variant", "runs", "finished", "seconds", "FLOPs", "measured by"):
        table.add_column(
            column, justify="left" if column in ("variant", "measured by") else "right", overflow="fold"
        )
    for cost in costs:
        known = not math.isnan(cost.seconds)
        table.add_row(
            escape(cost.group),
            str(cost.num_runs),
            str(cost.num_finished),
            f"{cost.seconds:.0f}" if known else "",
            f"{cost.flops:.2g}" if known else "",
            cost.source,
        )
    show_figures(table)
    mean = sum(cost.seconds for cost in costs) / len(costs)
    # Those still to come; a tuning run evaluates less than a run of the grid and is taken to cost as much.
    return sum(cost.seconds * (cost.num_runs - cost.num_finished) for cost in costs) + mean * num_tuning


def _time_text(seconds: float) -> str:
    """A time in the unit that people read."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _show_total(experiment: Experiment, recipe: Recipe, seconds: float, jobs: int) -> None:
    memory = StepMemory(plan(recipe)).predict().total * jobs / _GIB
    total = "unknown time (leave out --no-probe)" if math.isnan(seconds) else _time_text(seconds)
    paragraph(
        f"all that is left, one after the other: {total}; --jobs {jobs} splits the cores, it does not add "
        f"any. Memory of {jobs} at once: {memory:.2f} GiB (as hpd doctor estimates it). Folder: "
        f"{experiment.folder}"
    )
