"""One run of a grid, in a process of its own: train within the budget, evaluate, write down what it cost."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hpd.config.schema import Recipe
from hpd.estimate.cost import flops_per_token
from hpd.evaluate import GenerationSettings, Task, evaluate, generate_answers
from hpd.evaluate.tasks import build_task, settings_for
from hpd.experiments.budget import BudgetCallback
from hpd.experiments.experiment import Budget, Evaluation
from hpd.experiments.manifest import OWN_LOGS, RECORD, TEACHER_FIGURES, fingerprints
from hpd.files import JsonLines, write_json
from hpd.generation.texts import Prompt
from hpd.models.load import load_model, load_tokenizer
from hpd.progress import Progress, quiet_libraries
from hpd.training.run import train

__all__ = [
    "Callbacks",
    "Job",
    "OwnSampleCurve",
    "evaluate_teacher",
    "has_model",
    "own_sample_metrics",
    "run_job",
    "task_and_settings",
]


class Job(NamedTuple):
    """Everything that a process needs to know of its run."""

    recipe: Recipe
    axes: dict[str, str]
    budget: Budget | None = None
    evals: tuple[Evaluation, ...] = ()
    own_samples: int = 0
    own_samples_every: int | None = None
    threads: int = 1


class Callbacks(Progress):
    """Callbacks for `hpd.training.run.train`, and nothing shown."""

    def __init__(self, *callbacks: TrainerCallback):
        self._callbacks = callbacks

    def callbacks(self) -> Sequence[TrainerCallback]:
        return self._callbacks


def run_job(job: Job, log: str | None = None) -> None:
    """Do whatever of the run is not done yet.

    Args:
        log: file that takes stdout and stderr of this process; only for a process that does nothing else.

    Raises:
        ValueError, FileNotFoundError: as `hpd.training.run.train`; or the recipe ends before its budget is
            spent.
    """
    if log is not None:
        _redirect(log)
    torch.set_num_threads(job.threads)
    quiet_libraries()
    folder = Path(job.recipe.output_dir)
    record: dict[str, Any] = {"axes": job.axes, "fingerprints": fingerprints(job.recipe)}
    if not (folder / "summary.json").is_file():
        counter = BudgetCallback(flops_per_token(job.recipe), job.budget)
        train(job.recipe, progress=Callbacks(counter, *_own_curve(job, folder)))
        if not counter.complete:
            assert job.budget is not None
            raise ValueError(
                f"{folder.name} ended with {counter.spent[job.budget.type]:g} of {job.budget.value:g} "
                f"{job.budget.type}: train.max_steps is the ceiling of such a budget, raise it."
            )
        record["cost"] = counter.spent
        write_json(folder / "cost.json", counter.spent)
    else:
        record["cost"] = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    record["figures"] = _more_evaluations(job, folder)
    write_json(folder / RECORD, record)


def _redirect(log: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _more_evaluations(job: Job, folder: Path) -> dict[str, float]:
    """The experiment's own evaluations of the trained student."""
    if not job.evals and not job.own_samples:
        return {}
    recipe = job.recipe
    tokenizer = load_tokenizer(recipe.student, "student")
    student = load_model(dataclasses.replace(recipe.student, model=str(folder), init="pretrained"), "student")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student.to(device)  # type: ignore[arg-type]
    figures = {}
    for evaluation in job.evals:
        task, settings = task_and_settings(recipe, evaluation)
        result = evaluate(
            student, tokenizer, task, settings, output_dir=folder, name=f"student after: {evaluation.name}"
        )
        figures[evaluation.name] = result.value
    if job.own_samples:
        figures |= _measure_own(job, tokenizer, device)(student)
    return figures


def _own_curve(job: Job, folder: Path) -> list[TrainerCallback]:
    if not job.own_samples_every:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure = _measure_own(job, load_tokenizer(job.recipe.student, "student"), device)
    return [OwnSampleCurve(folder / OWN_LOGS, job.own_samples_every, measure)]


def _measure_own(job: Job, tokenizer: Any, device: str) -> Callable[[torch.nn.Module], dict[str, float]]:
    recipe = job.recipe
    if not has_model(recipe):
        raise ValueError(
            "own_samples needs a teacher of type model, or of type cached with the model that it is a cache "
            "of."
        )
    teacher = load_model(recipe.teacher, "teacher").to(device)  # type: ignore[arg-type]
    where = Evaluation(name="own", limit=job.own_samples) if recipe.eval or not job.evals else job.evals[0]
    task, settings = task_and_settings(
        recipe, dataclasses.replace(where, limit=job.own_samples, temperature=1.0)
    )
    prompts = [example.prompt for example in task.examples()]
    return lambda student: own_sample_metrics(student, teacher, tokenizer, prompts, settings)


def evaluate_teacher(job: Job, folder: str, log: str) -> None:
    """The experiment's own evaluations of the teacher: once for a grid, since all its runs share it."""
    _redirect(log)
    torch.set_num_threads(job.threads)
    quiet_libraries()
    tokenizer = load_tokenizer(job.recipe.student, "student")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(job.recipe.teacher, "teacher").to(device)  # type: ignore[arg-type]
    figures = {}
    for evaluation in job.evals:
        task, settings = task_and_settings(job.recipe, evaluation)
        figures[evaluation.name] = evaluate(
            teacher, tokenizer, task, settings, output_dir=folder, name="teacher"
        ).value
    write_json(Path(folder) / TEACHER_FIGURES, figures)


def has_model(recipe: Recipe) -> bool:
    """Whether the teacher can be loaded: a cache answers about its own rows only, but may name its model."""
    return recipe.teacher.type in ("model", "cached") and recipe.teacher.model is not None


def task_and_settings(recipe: Recipe, evaluation: Evaluation) -> tuple[Task, GenerationSettings]:
    """What an evaluation asks and how; what it leaves open is as in the recipe's eval."""
    own = recipe.eval[0] if recipe.eval else None
    data = evaluation.data or (own.data if own else None)
    if not data:
        raise ValueError(
            f"The evaluation {evaluation.name!r} has no data, and the recipe has no eval to take it from."
        )
    name = evaluation.task or (own.task if own else "exact-match")
    options = own.options if own and name == own.task else {}
    task = build_task(name, data, limit=evaluation.limit or (own.limit if own else None), options=options)
    settings = settings_for(
        task,
        None,
        max_new_tokens=evaluation.max_new_tokens or (own.max_new_tokens if own else None),
        batch_size=evaluation.batch_size or (own.batch_size if own else None),
        temperature=evaluation.temperature,
        seed=evaluation.seed,
    )
    return task, settings


_BATCH = 32


def own_sample_metrics(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
) -> dict[str, float]:
    """Means over the tokens that the student writes after `prompts`, in nats per token.

    Prompts in chat form are refused: their template would have to be cut at the right token.

    Returns:
        own_entropy (the student's), own_reverse_kl = KL(student || teacher) and own_forward_kl = KL(teacher
        || student).
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("own_samples needs prompts of plain text; use `hpd eval` for chats.")
    answers = generate_answers(student, tokenizer, list(prompts), settings)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(prompts), _BATCH):
        pairs = list(zip(prompts[start : start + _BATCH], answers[start : start + _BATCH], strict=True))
        sums += _sum_batch(student, teacher, tokenizer, pairs)
    tokens = max(float(sums[0]), 1.0)
    names = ("own_entropy", "own_forward_kl", "own_reverse_kl")
    return {name: round(float(value) / tokens, 6) for name, value in zip(names, sums[1:], strict=True)}


class OwnSampleCurve(TrainerCallback):
    """Measures the student's own text before the first step and after every n-th; training sees nothing of
    it.

    Args:
        path: gets a line per measurement, the step and its figures; lines of steps that a resumed run does
            again are dropped.
        every: optimiser steps between two measurements.
        measure: takes the student, in evaluation mode, and returns its figures.
    """

    def __init__(self, path: Path, every: int, measure: Callable[[nn.Module], dict[str, float]]):
        self._lines = JsonLines(path)
        self._every = every
        self._measure = measure

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        self._lines.write(line for line in self._lines.read() if step and line["step"] <= step)
        if not step:
            self._add(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._add(state.global_step, model)

    def _add(self, step: int, model: Any) -> None:
        was_training = model.training
        model.eval()
        figures = self._measure(model)
        model.train(was_training)
        self._lines.append({"step": step, **figures})


@torch.no_grad()
def _sum_batch(
    student: Any, teacher: Any, tokenizer: Any, pairs: Sequence[tuple[Any, Any]]
) -> Float[Tensor, "4"]:
    device = next(student.parameters()).device
    prefixes = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    own = [
        tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id] * (answer.finish_reason == "stop")
        for _, answer in pairs
    ]
    rows = [prefix + written for prefix, written in zip(prefixes, own, strict=True)]
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    position = torch.arange(longest, device=device)
    # Position t predicts token t + 1: the written tokens are predicted from the prompt's last one on.
    first = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)[:, None]
    last = torch.tensor([len(row) - 1 for row in rows], device=device)[:, None]
    chosen = (position >= first) & (position < last)  # [B, T]
    # Padding stands on the right, where causal attention never looks at it.
    log_q = student(input_ids=ids).logits[chosen].float().log_softmax(-1)  # [N, V]
    vocab = log_q.shape[-1]
    log_p = teacher(input_ids=ids).logits[chosen][:, :vocab].float().log_softmax(-1)
    if log_p.shape[-1] != vocab:
        raise ValueError(f"own_samples needs equal vocabularies, got {vocab} and {log_p.shape[-1]} rows.")
    p, q = log_p.exp(), log_q.exp()
    values = [-(q * log_q).sum(), (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()]
    return torch.stack([chosen.sum().double(), *(value.double() for value in values)]).cpu()
