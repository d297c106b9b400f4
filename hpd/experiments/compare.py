"""`hpd compare`: tune, freeze, run the grid, each run in a process of its own and resumable by itself."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpd.config.schema import Recipe
from hpd.experiments.experiment import Budget, Evaluation, Experiment, read_experiment
from hpd.experiments.grid import (
    Cell,
    choose,
    evaluations,
    expand,
    expand_tuning,
    group_key,
    read_choices,
    tuning_evaluation,
    write_choices,
)
from hpd.experiments.manifest import TEACHER_FIGURES, is_finished, open_manifest, require_comparable
from hpd.experiments.worker import Job, evaluate_teacher, has_model, run_job
from hpd.files import JsonLines
from hpd.progress import Progress

__all__ = ["Cost", "Failure", "compare", "predict", "run_grid"]


_POLL_SECONDS = 0.2


class Failure(NamedTuple):
    """A run that ended without its result."""

    name: str
    log: Path
    reason: str


def compare(
    path: Path,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Experiment, list[Failure]]:
    """Run what is missing of an experiment.

    Args:
        path: the experiment file; it is copied to the experiment's folder before the first run.
        overrides: `key=value` assignments to the experiment's keys, such as `set.train.max_steps=50`.
        jobs: runs at once; the machine's threads are split among them.
        allow: fields of the environment that may differ between runs.
        progress: gets a bar for tuning and one for the runs, with the steps of those under way.

    Returns:
        The experiment, and the runs that failed; all others are finished.

    Raises:
        FileNotFoundError, ValueError: an experiment that is not valid, has changed, or compares what is not
            comparable.
    """
    progress = progress or Progress()
    text = path.read_text(encoding="utf-8")
    experiment = read_experiment(text, overrides)
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}.")
    if jobs > 1 and experiment.budget is not None and experiment.budget.type == "seconds":
        raise ValueError("A budget in seconds needs --jobs 1: runs beside each other slow each other down.")
    folder = experiment.folder
    tuning, grid = expand_tuning(experiment, folder), expand(experiment, folder)
    manifest = open_manifest(folder, text, overrides, tuning, grid, allow)
    if experiment.tune is not None:
        choices = read_choices(folder)
        if choices is None:
            require_comparable(tuning, manifest, allow)
            deciding = tuning_evaluation(experiment, folder)
            evals = (deciding,) if deciding is not None else ()
            work = [Job(cell.recipe, cell.axes, experiment.budget, evals) for cell in tuning]
            failures = run_grid(work, jobs, folder, "tuning", progress)
            if failures:
                return experiment, failures
            choices = choose(experiment, tuning)
            write_choices(folder, choices)
        grid = expand(experiment, folder, {choice.group: choice.chosen for choice in choices})
    require_comparable(grid, manifest, allow)
    evals = evaluations(experiment, folder)
    own = experiment.own_samples, experiment.own_samples_every
    work = [Job(cell.recipe, cell.axes, experiment.budget, evals, *own) for cell in grid]
    _evaluate_teacher(work[0], folder)
    return experiment, run_grid(work, jobs, folder, "runs", progress)


def run_grid(work: Sequence[Job], jobs: int, folder: Path, title: str, progress: Progress) -> list[Failure]:
    """Run the unfinished of `work`, `jobs` at once; a crash loses one run."""
    waiting = [job for job in work if not is_finished(job.recipe)]
    done = len(work) - len(waiting)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    context = _context()
    bar = progress.bar(title)
    running: dict[str, tuple[Any, Job]] = {}
    failures: list[Failure] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                name = Path(job.recipe.output_dir).name
                process = context.Process(
                    target=run_job, args=(job._replace(threads=threads), str(logs / f"{title}-{name}.log"))
                )
                process.start()
                running[name] = (process, job)
            time.sleep(_POLL_SECONDS)
            for name, (process, job) in list(running.items()):
                if process.is_alive():
                    continue
                del running[name]
                done += 1
                if not is_finished(job.recipe):
                    failures.append(_failure(name, logs / f"{title}-{name}.log", process.exitcode))
            bar(done, len(work), "\n" + "\n".join(_steps(name, job) for name, (_, job) in running.items()))
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()
    return failures


def _context() -> Any:
    """Forks from a server that has imported everything and run nothing, which saves seconds of imports per
    run."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["hpd.experiments.worker"])
    return context


def _evaluate_teacher(job: Job, folder: Path) -> None:
    """The reference line of the experiment's own evaluations; the recipe's eval asks the teacher in every
    run."""
    target = folder / "teacher"
    if not job.evals or not has_model(job.recipe) or (target / TEACHER_FIGURES).is_file():
        return
    (folder / "logs").mkdir(exist_ok=True)
    log = folder / "logs" / "teacher.log"
    job = job._replace(threads=os.cpu_count() or 1)
    process = _context().Process(target=evaluate_teacher, args=(job, str(target), str(log)))
    process.start()
    process.join()
    if not (target / TEACHER_FIGURES).is_file():
        raise ValueError(
            f"The teacher could not be evaluated: {_failure('teacher', log, process.exitcode).reason}"
        )


def _failure(name: str, log: Path, exit_code: int | None) -> Failure:
    lines = (
        [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if log.is_file()
        else []
    )
    return Failure(name, log, lines[-1].strip() if lines else f"the process ended with exit code {exit_code}")


def _steps(name: str, job: Job) -> str:
    """Last logged step of a run, and its planned steps."""
    logs = JsonLines(Path(job.recipe.output_dir) / "metrics.jsonl").read()
    total = int(job.recipe.train.get("max_steps", 0) or 0)
    return f"  {name}  step {logs[-1]['step'] if logs else 0}{f' of {total}' if total else ''}"


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
    experiment: Experiment,
    folder: Path,
    cells: Sequence[Cell],
    probe: bool = True,
    progress: Progress | None = None,
) -> list[Cost]:
    """One line per group of cells that differ in the seed only.

    Finished runs of a group give their mean time. Without any, the first cell is run for 8 steps and 32
    answers in a temporary folder, and (seconds per step) x steps + (seconds per answer) x answers + the rest
    is taken; an untrained student writes longer answers than a trained one, so this is rather too much. FLOPs
    are scaled from the same runs.
    """
    progress = progress or Progress()
    evals = evaluations(experiment, folder)
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
            progress.say(f"probe of {group}: {PROBE_STEPS} steps")
            seconds, flops = _probe(experiment, evals, members[0])
            costs.append(Cost(group, len(members), 0, seconds, flops, "probe"))
        else:
            costs.append(Cost(group, len(members), 0, float("nan"), float("nan"), "not measured"))
    return costs


def _mean_of(finished: Sequence[Cell]) -> tuple[float, float]:
    folders = [Path(cell.recipe.output_dir) for cell in finished]
    seconds = [json.loads((f / "summary.json").read_text(encoding="utf-8"))["seconds"] for f in folders]
    flops = [
        json.loads((f / "experiment.json").read_text(encoding="utf-8"))["cost"]["flops"] for f in folders
    ]
    return sum(seconds) / len(seconds), sum(flops) / len(flops)


def _probe(experiment: Experiment, evals: Sequence[Evaluation], cell: Cell) -> tuple[float, float]:
    """(seconds, FLOPs) of the whole run, scaled from a short one."""
    # torch and TRL take seconds to import; a prediction from finished runs does without.
    from hpd.estimate.cost import flops_per_token
    from hpd.experiments.budget import BudgetCallback
    from hpd.experiments.worker import Callbacks
    from hpd.training.plan import plan, steps_of
    from hpd.training.run import train

    recipe = cell.recipe
    planned_steps = steps_of(plan(recipe)) or PROBE_STEPS
    counter = BudgetCallback(flops_per_token(recipe))
    own = [Evaluation(name="accuracy")] if recipe.eval else []
    with tempfile.TemporaryDirectory() as folder:
        changed = {"max_steps": min(PROBE_STEPS, planned_steps), "warmup_steps": 0, "save_strategy": "no"}
        short = dataclasses.replace(
            recipe, output_dir=f"{folder}/run", train={**recipe.train, **changed}, eval=None
        )
        summary = train(short, progress=Callbacks(counter))
        per_answer = _seconds_per_answer(
            dataclasses.replace(recipe, output_dir=f"{folder}/run"), [*own, *evals]
        )
    probed = summary["steps"]
    per_step = summary["train seconds"] / probed
    per = {name: value / probed for name, value in counter.spent.items()}
    steps = _steps_within(experiment.budget, planned_steps, per_step, per)
    # Teacher and student before and after training answer the recipe's examples; the experiment's own only
    # the trained one.
    every = experiment.own_samples_every
    own_times = 1 + (1 + int(steps) // every if every else 0)
    answers = sum(3 * _num_examples(recipe, e) for e in own) + sum(_num_examples(recipe, e) for e in evals)
    answers += own_times * experiment.own_samples
    rest = summary["seconds"] - summary["train seconds"]
    return rest + per_step * steps + per_answer * answers, per["flops"] * steps


def _steps_within(budget: Budget | None, steps: int, per_step: float, spent: Mapping[str, float]) -> float:
    if budget is None or budget.type == "steps":
        return steps
    one = per_step if budget.type == "seconds" else spent[budget.type]
    return min(steps, budget.value / max(one, 1e-9))


def _seconds_per_answer(recipe: Recipe, evals: Sequence[Evaluation]) -> float:
    """Measured with the student that the probe left in `recipe.output_dir`, on the first evaluation."""
    from hpd.evaluate import evaluate
    from hpd.experiments.worker import task_and_settings
    from hpd.models.load import load_model, load_tokenizer

    if not evals:
        return 0.0
    task, settings = task_and_settings(recipe, dataclasses.replace(evals[0], limit=PROBE_EXAMPLES))
    trained = dataclasses.replace(recipe.student, model=recipe.output_dir, init="pretrained")
    student, tokenizer = load_model(trained, "student"), load_tokenizer(recipe.student, "student")
    start = time.perf_counter()
    result = evaluate(student, tokenizer, task, settings)
    return (time.perf_counter() - start) / result.num_examples


def _num_examples(recipe: Recipe, evaluation: Evaluation) -> int:
    from hpd.experiments.worker import task_and_settings

    return len(task_and_settings(recipe, evaluation)[0].examples())
