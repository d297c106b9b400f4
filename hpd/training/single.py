"""From a recipe to a trained student: check, load, evaluate, train, evaluate, write down."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hpd.config.schema import Recipe
from hpd.models.load import load_model
from hpd.progress import Progress
from hpd.teachers import ModelTeacher, Teacher, TeacherUnavailable
from hpd.teachers.sources import load_teacher
from hpd.training.checkpoints import writing
from hpd.training.evaluations import TaskEvaluation
from hpd.training.folder import MetricsWriter, RunFolder
from hpd.training.plan import Plan, lora_of
from hpd.training.stopping import Interrupted, Signals
from hpd.training.trainer import DistillTrainer

__all__ = ["evaluate_task", "open_together"]


class _EvaluatingTrainer(TaskEvaluation, DistillTrainer):
    """A `DistillTrainer` that does tasks while it trains."""


def open_together(folder: RunFolder, args: Any) -> None:
    """Open a run folder from its main process, when all processes have checked it.

    Args:
        folder: the folder, checked by its constructor.
        args: TrainingArguments; they know the processes.

    Raises:
        ValueError: processes find different checkpoints there, since machines do not share it.
    """
    assert args.device is not None  # asking for it joins the processes
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        folder.open()
    processes.wait_for_everyone()
    folder.opened_elsewhere()
    if processes.num_processes > 1:
        found = gather_object([folder.checkpoint])
        if len(set(found)) > 1:
            raise ValueError(
                f"Processes find different checkpoints in {folder.path}: "
                f"{', '.join(sorted({str(name) for name in found}))}. All machines must see one output_dir: "
                "put it on shared storage."
            )


def _run(
    planned: Plan, folder: RunFolder, progress: Progress, baselines: bool, signals: Signals
) -> dict[str, Any]:
    recipe = planned.recipe
    progress.say(f"student {recipe.student.model}, teacher {recipe.teacher.title}")
    started = time.perf_counter()
    student = load_model(recipe.student, "student", planned.args.seed)
    teacher = planned.served or load_teacher(recipe.teacher)
    _check_lora(recipe, student)
    # Not before the models are loaded: what cannot start leaves nothing behind.
    open_together(folder, planned.args)
    if planned.served is not None and PartialState().is_main_process:
        folder.keep_teacher(planned.served.fingerprint)
    summary: dict[str, Any] = {"method": recipe.method or ("hpd" if not recipe.terms else "terms")}
    resume, before = folder.checkpoint, folder.baselines()
    to_measure = resume is None and before is None
    before = before or {}
    if to_measure and baselines and planned.evals and is_deepspeed_zero3_enabled():
        progress.say("ZeRO-3 loads models in pieces that run only in training: no task is done before it")
    elif to_measure and baselines:
        before |= evaluate_task(planned, student, "student before", folder, progress)
        if isinstance(teacher, ModelTeacher):
            before |= evaluate_task(planned, teacher.model, "teacher", folder, progress)
    trainer = _trainer(planned, student, teacher, folder, progress)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    # FSDP2 and DeepSpeed take the student over together with its optimiser, when training starts.
    trainer.args.eval_on_start = trainer.eval_dataset is not None and resume is None and sharded
    if to_measure:
        if trainer.eval_dataset is not None and not sharded:
            before |= {f"{k} before": v for k, v in _eval_metrics(trainer.evaluate()).items()}
        if trainer.is_world_process_zero():
            folder.write_json("baselines.json", before)
    elif resume is None and trainer.eval_dataset is not None and not sharded:
        # Measured by a life that left no checkpoint: its loader drew a number, on which the order of rows
        # depends.
        next(iter(trainer.get_eval_dataloader()))
    summary |= before
    before_training = time.perf_counter()
    with signals.stopping(trainer):
        trainer.train(resume_from_checkpoint=resume)
    with _keeping_steps(trainer):
        summary |= _finish(planned, trainer, folder, progress, before_training)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    summary["steps"] = trainer.state.global_step
    if trainer.stopped_by:
        summary["stopped"] = trainer.stopped_by
    written = sum(log.get("rollouts/tokens", 0.0) for log in trainer.state.log_history)
    if written:
        summary["generated tokens"] = int(written)
    if trainer.is_world_process_zero():
        folder.write_card(summary)
        folder.write_json("summary.json", summary)
    return summary


def _finish(
    planned: Plan, trainer: DistillTrainer, folder: RunFolder, progress: Progress, started: float
) -> dict[str, Any]:
    """What comes after the last step: evaluate the student and write it down."""
    if trainer.stop_reason is not None:
        raise Interrupted(trainer.stop_reason)
    found: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        first = [log for log in trainer.state.log_history if log["step"] == 0 and "eval_loss" in log]
        found |= {f"{k} before": v for log in first[:1] for k, v in _eval_metrics(log).items()}
        found |= {f"{k} after": v for k, v in _eval_metrics(trainer.evaluate()).items()}
    found["train seconds"] = round(time.perf_counter() - started, 1)
    with writing(folder.path):
        trainer.save_model()
    student = trainer.accelerator.unwrap_model(trainer.model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return found | evaluate_task(planned, student, "student after", folder, progress, together=sharded)


@contextlib.contextmanager
def _keeping_steps(trainer: DistillTrainer) -> Iterator[None]:
    """Save the last step before something ends the run after it, if training did not."""
    try:
        yield
    except (Interrupted, TeacherUnavailable) as error:
        # The best model is not that of the last step; and a signal may find each process somewhere else.
        alone = trainer.accelerator.num_processes == 1
        if not trainer.args.load_best_model_at_end and (alone or not isinstance(error, Interrupted)):
            trainer.save_checkpoint()
        raise


def _trainer(
    planned: Plan, student: Any, teacher: Teacher, folder: RunFolder, progress: Progress
) -> DistillTrainer:
    recipe, args = planned.recipe, planned.args
    make: Callable[..., DistillTrainer] = DistillTrainer
    if any(entry.config.every is not None for entry in planned.evals):
        make = functools.partial(_EvaluatingTrainer, evals=planned.evals, folder=folder.path)
    trainer = make(
        model=student,
        teacher=teacher,
        args=args,
        method=recipe.method,
        method_kwargs=recipe.method_kwargs,
        terms=recipe.terms,
        train_dataset=planned.rows.train,
        eval_dataset=planned.rows.validation,
        processing_class=planned.tokenizer,
        prefixes=recipe.prefixes,
        rollouts=recipe.rollouts,
        strategy=recipe.strategy,
        guards=recipe.guards,
        peft_config=lora_of(recipe),
        callbacks=[MetricsWriter(folder), *progress.callbacks()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    rows: Any = trainer.train_dataset
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError("Every label is masked: no row keeps a completion token within train.max_length.")
    return trainer


def _check_lora(recipe: Recipe, student: torch.nn.Module) -> None:
    """Every module that the adapter names must be there; peft complains only if none is, and later."""
    targets = recipe.lora.target_modules if recipe.lora else "all-linear"
    if targets == "all-linear":
        return
    names = [name for name, _ in student.named_modules()]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [
            target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)
        ]
    if missing:
        known = sorted(
            {
                name.rpartition(".")[2]
                for name, module in student.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
        raise ValueError(
            f"lora.target_modules names {', '.join(missing)}, which the student has not; it has "
            f"{', '.join(known)}."
        )


def _eval_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    return {name: round(metrics[f"eval_{name}"], 6) for name in names if f"eval_{name}" in metrics}


def evaluate_task(
    planned: Plan, model: Any, name: str, folder: RunFolder, progress: Progress, together: bool = False
) -> dict[str, Any]:
    """The metric of each of the recipe's tasks, found by the main process.

    Args:
        together: all processes generate the same answers, since a sharded model runs on all of them or not at
            all.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    if not planned.evals or not (is_main or together):
        return {}
    from hpd.evaluate import evaluate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (
        not together
        and not getattr(model, "hf_device_map", None)
        and not getattr(model, "quantization_method", None)
    ):
        model.to(device)
    found = {}
    for entry in planned.evals:
        result = evaluate(
            model,
            planned.tokenizer,
            entry.task,
            entry.settings,
            output_dir=folder.path if is_main else None,
            name=name,
            progress=progress.bar(f"answers of {name}"),
        )
        label = entry.label if len(planned.evals) > 1 else result.metric
        found[f"{name} {label}"] = round(result.value, 4)
    return found
