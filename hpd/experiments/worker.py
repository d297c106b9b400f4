"""One run of a grid, in a process of its own: train within the budget, evaluate, write down what it cost."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hpd.config.schema import EvalConfig, Recipe
from hpd.estimate.cost import flops_per_token
from hpd.evaluate.generate import PartialAnswers
from hpd.evaluate.run import evaluate_engine
from hpd.experiments.budget import BudgetCallback
from hpd.experiments.experiment import Budget, Evaluation
from hpd.experiments.manifest import OWN_LOGS, RECORD, TEACHER_FIGURES, fingerprints
from hpd.experiments.own_samples import OwnSampleCurve, own_sample_metrics
from hpd.experiments.tertiles import tertile_metrics
from hpd.files import JsonLines, write_json
from hpd.generation.engine import TransformersEngine
from hpd.locks import holding
from hpd.models.load import load_model, load_tokenizer
from hpd.progress import Progress, quiet_libraries
from hpd.teachers.fingerprints import model_fingerprint
from hpd.training.plan import plan_evals
from hpd.training.run import train

_PATIENCE = 600.0
"""Seconds in which a run of an earlier comparison may save."""

__all__ = ["Callbacks", "Job", "evaluate_teacher", "has_model", "run_job"]


class Job(NamedTuple):
    """One run of a grid, as its process is told of it."""

    recipe: Recipe
    axes: dict[str, str]
    budget: Budget | None = None
    evals: tuple[Evaluation, ...] = ()
    own_samples: int = 0
    own_samples_every: int | None = None
    entropy_tertiles: bool = False
    threads: int = 1


class Callbacks(Progress):
    """Callbacks for `hpd.training.run.train`, and nothing shown."""

    def __init__(self, *callbacks: TrainerCallback):
        self._callbacks = callbacks

    def callbacks(self) -> Sequence[TrainerCallback]:
        return self._callbacks


def run_job(job: Job, log: str | None = None) -> None:
    """Do the part of the run that is not done yet.

    Args:
        log: file that takes stdout and stderr of this process; only for a process that does nothing else.

    Raises:
        ValueError, FileNotFoundError: as `hpd.training.run.train`; or the recipe ends before its budget is
            spent.
    """
    if log is not None:
        _redirect(log)
    _end_with_parent()
    torch.set_num_threads(job.threads)
    quiet_libraries()
    folder = Path(job.recipe.output_dir)
    # A run whose comparison was killed is still saving.
    with holding(folder, patience=_PATIENCE):
        _run(job, folder)


def _run(job: Job, folder: Path) -> None:
    record: dict[str, Any] = {"axes": job.axes, "fingerprints": fingerprints(job.recipe)}
    cost = folder / "cost.json"
    counter = BudgetCallback(flops_per_token(job.recipe), job.budget, cost)
    if (folder / "summary.json").is_file():
        counter.spent |= json.loads(cost.read_text(encoding="utf-8"))
    else:
        train(job.recipe, progress=Callbacks(counter, *_own_curve(job, folder)))
    if not counter.complete:
        assert job.budget is not None
        raise ValueError(
            f"{folder.name} ended with {counter.spent[job.budget.type]:g} of {job.budget.value:g} "
            f"{job.budget.type}: train.max_steps is the ceiling of such a budget, raise it."
        )
    record["cost"] = counter.spent
    record["figures"] = _clipped_share(folder) | _more_evaluations(job, folder)
    write_json(folder / RECORD, record)


def _redirect(log: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _end_with_parent() -> None:
    """Stop as at SIGTERM when the comparison is gone, which nobody told this process of: it was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _more_evaluations(job: Job, folder: Path) -> dict[str, float]:
    """The experiment's own measures of the trained student."""
    if not job.evals and not job.own_samples and not job.entropy_tertiles:
        return {}
    recipe = job.recipe
    tokenizer = load_tokenizer(recipe.student, "student")
    student = load_model(dataclasses.replace(recipe.student, model=str(folder), init="pretrained"), "student")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student.to(device)  # type: ignore[arg-type]
    figures = _ask(student, tokenizer, job.evals, folder, "student after: {}")
    if job.own_samples:
        figures |= _measure_own(job, tokenizer, device)(student)
    if job.entropy_tertiles:
        figures |= tertile_metrics(recipe, student.eval(), _load_teacher(job, "entropy_tertiles", device))
    return figures


def _clipped_share(folder: Path) -> dict[str, float]:
    """The share of all steps whose gradient was clipped."""
    shares = [
        log["clipped_share"] for log in JsonLines(folder / "metrics.jsonl").read() if "clipped_share" in log
    ]
    return {"clipped_share": round(sum(shares) / len(shares), 4)} if shares else {}


def _load_teacher(job: Job, key: str, device: str) -> nn.Module:
    if not has_model(job.recipe):
        raise ValueError(
            f"{key} needs a teacher of type model, or of type cached with the model that it is a cache of."
        )
    return load_model(job.recipe.teacher, "teacher").to(device).eval()  # type: ignore[arg-type]


def _own_curve(job: Job, folder: Path) -> list[TrainerCallback]:
    if not job.own_samples_every:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure = _measure_own(job, load_tokenizer(job.recipe.student, "student"), device)
    return [OwnSampleCurve(folder / OWN_LOGS, job.own_samples_every, measure)]


def _measure_own(job: Job, tokenizer: Any, device: str) -> Callable[[torch.nn.Module], dict[str, float]]:
    teacher = _load_teacher(job, "own_samples", device)
    source: EvalConfig | None = next(iter((*job.recipe.eval, *job.evals)), None)
    assert source is not None, "compare has looked"
    # Tokens as the student draws them: cut or sharpened, they would be another distribution's.
    plain = {"temperature": 1.0, "top_p": None, "preset": None, "num_samples": None}
    first = dataclasses.replace(source, limit=job.own_samples, limit_seed=None, **plain)
    (planned,) = plan_evals([first])
    prompts = [example.prompt for example in planned.task.examples()]
    settings = planned.settings
    return lambda student: own_sample_metrics(student, teacher, tokenizer, prompts, settings)


def evaluate_teacher(job: Job, folder: str, log: str) -> None:
    """The experiment's own evaluations of the teacher: once for a grid, since all its runs share it."""
    _redirect(log)
    _end_with_parent()
    torch.set_num_threads(job.threads)
    quiet_libraries()
    tokenizer = load_tokenizer(job.recipe.student, "student")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(job.recipe.teacher, "teacher").to(device)  # type: ignore[arg-type]
    with holding(Path(folder), patience=_PATIENCE):
        figures = _ask(teacher, tokenizer, job.evals, Path(folder), "teacher")
        write_json(Path(folder) / TEACHER_FIGURES, figures)


def has_model(recipe: Recipe) -> bool:
    """True if the teacher can be loaded: a cache answers about its own rows only, but may name its model."""
    return recipe.teacher.type in ("model", "cached") and recipe.teacher.model is not None


def _ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    evals: Sequence[Evaluation],
    folder: Path,
    name: str,
) -> dict[str, float]:
    """The figure of each evaluation, by its name; answers and grades go to `folder`, under `name`. An
    interrupted evaluation goes on."""
    figures = {}
    engine = TransformersEngine(model, tokenizer)
    weights = model_fingerprint(model)
    partials: list[PartialAnswers] = []
    for evaluation, planned in zip(evals, plan_evals(evals), strict=True):
        result = evaluate_engine(
            engine,
            planned.task,
            planned.settings,
            folder,
            name=name.format(evaluation.name),
            fingerprint=weights,
            partials=partials,
        )
        figures[evaluation.name] = result.value
    for partial in partials:
        partial.remove()
    return figures
