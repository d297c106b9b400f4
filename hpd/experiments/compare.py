"""`hpd compare`: tune, freeze, run the grid, each run in a process of its own and resumable by itself."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpd.experiments.bases import evaluations
from hpd.experiments.experiment import Experiment, read_experiment
from hpd.experiments.grid import expand
from hpd.experiments.manifest import TEACHER_FIGURES, is_finished, open_manifest, require_comparable
from hpd.experiments.tuning import choose, expand_tuning, read_choices, tuning_evaluation, write_choices
from hpd.experiments.worker import Job, evaluate_teacher, has_model, run_job
from hpd.files import JsonLines, holding
from hpd.progress import Progress
from hpd.training.plan import plan_evals

__all__ = ["Failure", "compare", "run_grid"]

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
            comparable; another process runs it.
    """
    text = path.read_text(encoding="utf-8")
    experiment = read_experiment(text, overrides)
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}.")
    if jobs > 1 and experiment.budget is not None and experiment.budget.type == "seconds":
        raise ValueError("A budget in seconds needs --jobs 1: runs beside each other slow each other down.")
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
    tuning = expand_tuning(experiment, folder)
    grid = expand(experiment, folder)
    evals = evaluations(experiment, folder)
    plan_evals(evals)  # a missing file is found before anything runs
    manifest = open_manifest(folder, text, overrides, tuning, grid, allow)
    if experiment.tune is not None:
        choices = read_choices(folder)
        if choices is None:
            require_comparable(tuning, manifest, allow)
            deciding = tuning_evaluation(experiment, folder)
            asked = (deciding,) if deciding is not None else ()
            work = [Job(cell.recipe, cell.axes, experiment.budget, asked) for cell in tuning]
            failures = run_grid(work, jobs, folder, "tuning", progress)
            if failures:
                return failures
            choices = choose(experiment, tuning)
            write_choices(folder, choices)
        grid = expand(experiment, folder, {choice.group: choice.chosen for choice in choices})
    require_comparable(grid, manifest, allow)
    own = experiment.own_samples, experiment.own_samples_every
    work = [Job(cell.recipe, cell.axes, experiment.budget, evals, *own) for cell in grid]
    _evaluate_teacher(work[0], folder)
    return run_grid(work, jobs, folder, "runs", progress)


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
    """A context that forks from a server which has imported everything: that saves seconds per run."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["hpd.experiments.worker"])
    return context


def _evaluate_teacher(job: Job, folder: Path) -> None:
    """Evaluate the teacher once for all runs; the recipe's own eval asks it in every run."""
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
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return Failure(name, log, lines[-1] if lines else f"the process ended with exit code {exit_code}")


def _steps(name: str, job: Job) -> str:
    """Last logged step of a run, and its planned steps."""
    logs = JsonLines(Path(job.recipe.output_dir) / "metrics.jsonl").read()
    total = int(job.recipe.train.get("max_steps", 0) or 0)
    step = logs[-1]["step"] if logs else 0
    return f"  {name}  step {step}" + (f" of {total}" if total else "")
