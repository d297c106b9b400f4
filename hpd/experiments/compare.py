"""`hpd compare`: tune, freeze, run the grid, each run in a process of its own and resumable by itself."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpd.experiments.bases import evaluations
from hpd.experiments.experiment import Experiment, read_experiment
from hpd.experiments.grid import expand
from hpd.experiments.manifest import TEACHER_FIGURES, is_finished, open_manifest, require_comparable
from hpd.experiments.tuning import (
    Choice,
    all_tuning,
    choose,
    chosen_values,
    expand_tuning,
    read_choices,
    tuning_evaluation,
    write_choices,
)
from hpd.experiments.worker import Job, evaluate_teacher, has_model, run_job
from hpd.files import JsonLines, write_json
from hpd.locks import holding
from hpd.progress import Progress
from hpd.training.plan import plan_evals

__all__ = ["Failure", "compare", "run_grid"]

_POLL_SECONDS = 0.2
_TEACHER_MODEL = "model.json"
"""In the folder of one of several teachers: which it is."""


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
            comparable; another process runs it.
    """
    text = path.read_text(encoding="utf-8")
    experiment = read_experiment(text, overrides)
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}.")
    if jobs > 1 and experiment.budget is not None and experiment.budget.type == "seconds":
        raise ValueError("A budget in seconds needs --jobs 1: runs next to each other slow each other down.")
    with holding(experiment.folder):
        return experiment, _compare(experiment, text, overrides, jobs, allow, progress or Progress())


def _compare(
    experiment: Experiment,
    text: str,
    overrides: Sequence[str],
    jobs: int,
    allow: Sequence[str],
    progress: Progress,
) -> list[Failure]:
    """Tune, freeze and run; returns the runs that failed."""
    folder = experiment.folder
    progress.say(f"{experiment.name}: reading its recipes and data")
    tuning = all_tuning(experiment, folder)
    grid = expand(experiment, folder)
    finished = sum(is_finished(cell.recipe) for cell in [*tuning, *grid])
    progress.say(f"{len(tuning)} runs of tuning and {len(grid)} of the grid, {finished} of them finished")
    evals = evaluations(experiment, folder)
    plan_evals(evals)  # a missing file is found before anything runs
    if any(cell.recipe.train.get("push_to_hub") for cell in [*tuning, *grid]):
        raise ValueError(
            "train.push_to_hub would push every run of the experiment, each over the one before: remove it, "
            "and push the run that you choose (hpd export RUN --push-to-hub OWNER/NAME)."
        )
    if experiment.own_samples and not evals and not all(cell.recipe.eval for cell in grid):
        raise ValueError(
            "own_samples needs prompts to continue: give the recipe an eval, or the experiment evals."
        )
    manifest = open_manifest(experiment, text, overrides, tuning, grid, allow)
    if experiment.tune is not None:
        choices = read_choices(folder)
        if choices is None:
            choices, failures = _tune(experiment, folder, manifest, jobs, allow, progress)
            if failures:
                return failures
            write_choices(folder, choices)
        grid = expand(experiment, folder, chosen_values(choices))
    require_comparable(grid, manifest, allow)
    own = experiment.own_samples, experiment.own_samples_every, experiment.entropy_tertiles
    work = [Job(cell.recipe, cell.axes, experiment.budget, evals, *own) for cell in grid]
    _evaluate_teachers(work, folder, progress)
    return run_grid(work, jobs, folder, "runs", progress)


def _tune(
    experiment: Experiment,
    folder: Path,
    manifest: Mapping[str, Any],
    jobs: int,
    allow: Sequence[str],
    progress: Progress,
) -> tuple[list[Choice], list[Failure]]:
    """The choices, path after path; or the runs that failed."""
    assert experiment.tune is not None
    deciding = tuning_evaluation(experiment, folder)
    asked = (deciding,) if deciding is not None else ()
    choices: list[Choice] = []
    for path in experiment.tune.paths:
        cells = expand_tuning(experiment, folder, path, chosen_values(choices))
        require_comparable(cells, manifest, allow)
        work = [Job(cell.recipe, cell.axes, experiment.budget, asked) for cell in cells]
        failures = run_grid(work, jobs, folder, "tuning", progress)
        if failures:
            return [], failures
        choices += choose(experiment, path, cells)
    return choices, []


def run_grid(work: Sequence[Job], jobs: int, folder: Path, title: str, progress: Progress) -> list[Failure]:
    """Run the unfinished of `work`, `jobs` at once; a crash loses one run."""
    waiting = [job for job in work if not is_finished(job.recipe)]
    done = len(work) - len(waiting)
    threads = max(1, _threads() // jobs)
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
                running[name] = (process, job)
                process.start()
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
        if running:
            progress.say(f"{len(running)} under way save first; a second signal ends them at once")
        _stop([process for process, _ in running.values()])
    return failures


def _stop(processes: Sequence[Any]) -> None:
    """Have runs save and stop, and wait for that.

    A terminal and SLURM tell the runs themselves, too. SIGUSR1 comes on top of that; a second SIGTERM would
    end them at once.
    """
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
    for process in alive:
        process.join()


def _threads() -> int:
    """The threads that the runs may have together: OMP_NUM_THREADS, or one for each core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else os.cpu_count() or 1


def _context() -> Any:
    """A context that forks from a server which has imported everything: that saves seconds per run.

    With a GPU each run starts by itself: some libraries ask for the card while they are imported
    (bitsandbytes does), and in a fork of a process that did so CUDA refuses to start.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    method = "forkserver" if forks else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["hpd.experiments.preload", "hpd.experiments.worker"])
    return context


def _evaluate_teachers(work: Sequence[Job], folder: Path, progress: Progress) -> None:
    """Evaluate each teacher once for all runs; the recipe's own eval asks it in every run. Several teachers
    have a folder each, and the figures of all are their means."""
    target = folder / "teacher"
    asked = {str(job.recipe.teacher.model): job for job in work if job.evals and has_model(job.recipe)}
    folders = [target] if len(asked) == 1 else _teacher_folders(target, asked)
    missing = [
        (job, own)
        for job, own in zip(asked.values(), folders, strict=True)
        if not (own / TEACHER_FIGURES).is_file()
    ]
    if missing:
        (folder / "logs").mkdir(exist_ok=True)
        bar = progress.bar("teachers evaluated")
        for number, (job, own) in enumerate(missing):
            waiting = functools.partial(bar, number, len(missing))
            _evaluate_teacher(job._replace(threads=_threads()), own, folder / "logs" / "teacher.log", waiting)
        bar(len(missing), len(missing))
    if len(asked) > 1:
        for model, own in zip(asked, folders, strict=True):
            write_json(own / _TEACHER_MODEL, {"model": model})
        found = [json.loads((own / TEACHER_FIGURES).read_text(encoding="utf-8")) for own in folders]
        means = {name: sum(figures[name] for figures in found) / len(found) for name in found[0]}
        write_json(target / TEACHER_FIGURES, means)


def _teacher_folders(target: Path, models: Iterable[str]) -> list[Path]:
    """A numbered folder for each; that of a teacher stays its own where repetitions that are added bring
    another before it."""
    records = target.glob(f"*/{_TEACHER_MODEL}")
    known = {json.loads(file.read_text(encoding="utf-8"))["model"]: file.parent for file in records}
    taken = set(known.values())
    free = (folder for number in itertools.count() if (folder := target / str(number)) not in taken)
    return [known.get(model) or next(free) for model in models]


def _evaluate_teacher(job: Job, target: Path, log: Path, waiting: Callable[[], None]) -> None:
    process = _context().Process(target=evaluate_teacher, args=(job, str(target), str(log)))
    try:
        process.start()
        while process.is_alive():
            waiting()
            process.join(_POLL_SECONDS)
    finally:
        _stop([process])
    if not (target / TEACHER_FIGURES).is_file():
        raise ValueError(
            f"The teacher could not be evaluated: {_failure('teacher', log, process.exitcode).reason}"
        )


def _failure(name: str, log: Path, exit_code: int | None) -> Failure:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return Failure(name, log, lines[-1] if lines else f"the process ended with exit code {exit_code}")


def _steps(name: str, job: Job) -> str:
    """Last logged step of a run, and its planned steps."""
    logs = JsonLines(Path(job.recipe.output_dir) / "metrics.jsonl").read()
    total = int(job.recipe.train.get("max_steps", 0) or 0)
    step = logs[-1]["step"] if logs else 0
    return f"  {name}  step {step}" + (f" of {total}" if total else "")
