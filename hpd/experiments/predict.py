"""What a grid will cost, before it runs: from its finished runs, or from a probe of each variant."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hpd.config import Recipe
from hpd.experiments.grid import Budget, Cell, Evaluation, Experiment, group_key

__all__ = ["Cost", "predict"]

PROBE_STEPS, PROBE_EXAMPLES = 8, 32


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
    experiment: Experiment, cells: Sequence[Cell], probe: bool = True, say: Callable[[str], None] = lambda text: None
) -> list[Cost]:
    """One line per group of cells that differ in the seed only.

    Finished runs of a group give their mean time. Without any, the first cell is run for 8 steps and 32 answers in a temporary
    folder, and (seconds per step) x steps + (seconds per answer) x answers + the rest is taken; an untrained student writes
    longer
    answers than a trained one, so this is rather too much. FLOPs are scaled from the same runs.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        axes = [axis for axis in cell.axes if axis not in ("seed", "train.seed")]
        groups.setdefault(group_key(cell.axes, axes), []).append(cell)
    costs = []
    for group, members in groups.items():
        finished = [cell for cell in members if (Path(cell.recipe.output_dir) / "experiment.json").is_file()]
        if finished:
            seconds, flops = _mean_of(finished)
            costs.append(Cost(group, len(members), len(finished), seconds, flops, "finished runs"))
        elif probe:
            say(f"probe of {group}: {PROBE_STEPS} steps")
            seconds, flops = _probe(experiment, members[0])
            costs.append(Cost(group, len(members), 0, seconds, flops, "probe"))
        else:
            costs.append(Cost(group, len(members), 0, float("nan"), float("nan"), "not measured"))
    return costs


def _mean_of(finished: Sequence[Cell]) -> tuple[float, float]:
    folders = [Path(cell.recipe.output_dir) for cell in finished]
    seconds = [json.loads((f / "summary.json").read_text(encoding="utf-8"))["seconds"] for f in folders]
    flops = [json.loads((f / "experiment.json").read_text(encoding="utf-8"))["cost"]["flops"] for f in folders]
    return sum(seconds) / len(seconds), sum(flops) / len(flops)


def _probe(experiment: Experiment, cell: Cell) -> tuple[float, float]:
    """(seconds, FLOPs) of the whole run, scaled from a short one."""
    # torch and TRL take seconds to import; a prediction from finished runs does without.
    from hpd.experiments.budget import BudgetCallback, flops_per_token
    from hpd.experiments.worker import Callbacks
    from hpd.train import plan, steps_of, train

    recipe = cell.recipe
    steps = steps_of(plan(recipe)) or PROBE_STEPS
    num_answers = min(PROBE_EXAMPLES, recipe.eval.limit or PROBE_EXAMPLES) if recipe.eval else 0
    counter = BudgetCallback(flops_per_token(recipe))
    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            recipe,
            output_dir=str(Path(folder) / "run"),
            train={**recipe.train, "max_steps": min(PROBE_STEPS, steps), "warmup_steps": 0, "save_strategy": "no"},
            eval=dataclasses.replace(recipe.eval, limit=num_answers) if recipe.eval else None,
        )
        summary = train(short, progress=Callbacks(counter))
        answering = _answering_seconds(Path(folder) / "run")
    probed = summary["steps"]
    per_step = summary["train seconds"] / probed
    steps = _steps_within(experiment.budget, steps, per_step, {name: value / probed for name, value in counter.spent.items()})
    rest = max(summary["seconds"] - summary["train seconds"] - answering, 0.0)
    # Teacher and student before and after training answer the recipe's examples; the experiment's own only the trained one.
    per_answer = answering / max(3 * num_answers, 1)
    answers = 3 * num_examples(recipe) + sum(num_examples(recipe, e) for e in experiment.evals)
    seconds = rest + per_step * steps + per_answer * (answers + experiment.own_samples)
    return seconds, counter.spent["flops"] / probed * steps


def _steps_within(budget: Budget | None, steps: int, per_step: float, spent: Mapping[str, float]) -> float:
    if budget is None or budget.type == "steps":
        return steps
    one = per_step if budget.type == "seconds" else spent[budget.type]
    return min(steps, budget.value / max(one, 1e-9))


def _answering_seconds(folder: Path) -> float:
    """Seconds that the evaluations of the probe took."""
    path = folder / "evals.json"
    if not path.is_file():
        return 0.0
    entries = json.loads(path.read_text(encoding="utf-8"))
    return sum(e["num_examples"] * e["mean_tokens"] / max(e["tokens_per_second"], 1e-9) for e in entries)


def num_examples(recipe: Recipe, evaluation: Evaluation | None = None) -> int:
    """Answers that one evaluation writes; 0 where the recipe has none."""
    from hpd.experiments.worker import task_and_settings

    if evaluation is None and recipe.eval is None:
        return 0
    task, _ = task_and_settings(recipe, evaluation or Evaluation(name="accuracy"))
    return len(task.examples())
