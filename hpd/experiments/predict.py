"""Prediction of what a grid will cost, from its finished runs or from a short probe of each variant."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hpd.config.schema import EvalConfig, Recipe
from hpd.estimate.cost import flops_per_token
from hpd.evaluate import evaluate
from hpd.experiments.bases import evaluations
from hpd.experiments.budget import BudgetCallback
from hpd.experiments.experiment import Budget, Evaluation, Experiment
from hpd.experiments.grid import Cell, group_key
from hpd.experiments.manifest import RECORD, is_finished
from hpd.experiments.worker import Callbacks
from hpd.models.load import load_model, load_tokenizer
from hpd.progress import Progress
from hpd.training.plan import plan, plan_evals, steps_of
from hpd.training.run import train

__all__ = ["Cost", "predict"]

PROBE_STEPS = 8
PROBE_EXAMPLES = 32


class Cost(NamedTuple):
    """Predicted for one group of runs, equal but for the seed."""

    group: str
    num_runs: int
    num_finished: int
    seconds: float
    """Of one run alone on the machine; NaN where nothing could be measured."""
    flops: float
    """Of one run's training, by the formula of `hpd.experiments.budget`."""
    source: str


def predict(
    experiment: Experiment,
    folder: Path,
    cells: Sequence[Cell],
    probe: bool = True,
    progress: Progress | None = None,
) -> list[Cost]:
    """One line per group of cells that differ in the seed and other repetitions only.

    Finished runs of a group give their mean time. Without any, the first cell is run for 8 steps and 32
    answers in a temporary folder, and (seconds per step) x steps + (seconds per answer) x answers + the rest
    is taken; an untrained student writes longer answers than a trained one, so this is rather too much. FLOPs
    are scaled from the same runs.
    """
    progress = progress or Progress()
    evals = evaluations(experiment, folder)
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        axes = [axis for axis in cell.axes if axis not in experiment.repeats]
        groups.setdefault(group_key(cell.axes, axes), []).append(cell)
    costs = []
    for group, members in groups.items():
        finished = [cell for cell in members if is_finished(cell.recipe)]
        if finished:
            seconds, flops = _mean_of(finished)
            costs.append(Cost(group, len(members), len(finished), seconds, flops, "finished runs"))
        elif probe:
            progress.say(f"probe of {group}: {PROBE_STEPS} steps")
            seconds, flops = _probe(experiment, evals, members[0])
            costs.append(Cost(group, len(members), 0, seconds, flops, "probe"))
        else:
            costs.append(Cost(group, len(members), 0, math.nan, math.nan, "not measured"))
    return costs


def _mean_of(finished: Sequence[Cell]) -> tuple[float, float]:
    folders = [Path(cell.recipe.output_dir) for cell in finished]
    seconds = [json.loads((f / "summary.json").read_text(encoding="utf-8"))["seconds"] for f in folders]
    flops = [json.loads((f / RECORD).read_text(encoding="utf-8"))["cost"]["flops"] for f in folders]
    return sum(seconds) / len(seconds), sum(flops) / len(flops)


def _probe(experiment: Experiment, evals: Sequence[Evaluation], cell: Cell) -> tuple[float, float]:
    """(seconds, FLOPs) of the whole run, scaled from a short one."""
    recipe = cell.recipe
    planned_steps = steps_of(plan(recipe)) or PROBE_STEPS
    counter = BudgetCallback(flops_per_token(recipe))
    with tempfile.TemporaryDirectory() as folder:
        changed = {"max_steps": min(PROBE_STEPS, planned_steps), "warmup_steps": 0, "save_strategy": "no"}
        short = dataclasses.replace(
            recipe, output_dir=f"{folder}/run", train={**recipe.train, **changed}, eval=()
        )
        summary = train(short, progress=Callbacks(counter))
        per_answer = _seconds_per_answer(
            dataclasses.replace(recipe, output_dir=f"{folder}/run"), [*recipe.eval, *evals]
        )
    probed = summary["steps"]
    per_step = summary["train seconds"] / probed
    per = {name: value / probed for name, value in counter.spent.items()}
    steps = _steps_within(experiment.budget, planned_steps, per_step, per)
    # Teacher and student before and after training answer the recipe's examples; the experiment's own only
    # the trained one.
    every = experiment.own_samples_every
    own_times = 1 + (1 + int(steps) // every if every else 0)
    answers = 3 * _num_examples(recipe.eval) + _num_examples(evals) + own_times * experiment.own_samples
    rest = summary["seconds"] - summary["train seconds"]
    return rest + per_step * steps + per_answer * answers, per["flops"] * steps


def _steps_within(budget: Budget | None, steps: int, per_step: float, spent: Mapping[str, float]) -> float:
    if budget is None or budget.type == "steps":
        return steps
    one = per_step if budget.type == "seconds" else spent[budget.type]
    return min(steps, budget.value / max(one, 1e-9))


def _seconds_per_answer(recipe: Recipe, evals: Sequence[EvalConfig]) -> float:
    """Seconds on the first evaluation of the student that the probe left in `recipe.output_dir`."""
    if not evals:
        return 0.0
    (planned,) = plan_evals([dataclasses.replace(evals[0], limit=PROBE_EXAMPLES)])
    trained = dataclasses.replace(recipe.student, model=recipe.output_dir, init="pretrained")
    student, tokenizer = load_model(trained, "student"), load_tokenizer(recipe.student, "student")
    start = time.perf_counter()
    result = evaluate(student, tokenizer, planned.task, planned.settings)
    return (time.perf_counter() - start) / result.num_examples


def _num_examples(evals: Sequence[EvalConfig]) -> int:
    return sum(len(planned.task.examples()) for planned in plan_evals(evals))
