"""A run without stages, from its plan to a trained student: load, evaluate, train, evaluate, write down."""

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
from peft import PeftModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hpd.config.schema import Recipe
from hpd.data.rows import validation_sets
from hpd.evaluate.run import evaluate
from hpd.generation.vllm_engine import rollout_dtype
from hpd.models.load import load_adapted, load_model
from hpd.progress import Progress, saying_warnings
from hpd.teachers import ModelTeacher, Teacher, TeacherUnavailable
from hpd.teachers.sources import load_teacher
from hpd.training.adapting import goes_on_adapter, lora_of
from hpd.training.checkpoints import writing
from hpd.training.dates import DATE
from hpd.training.engines import check_launch
from hpd.training.evaluations import TaskEvaluation
from hpd.training.folder import MetricsWriter, RunFolder
from hpd.training.inputs import input_fingerprints
from hpd.training.plan import Plan
from hpd.training.probing import check_packing
from hpd.training.slicing import check_sliced_plan
from hpd.training.stopping import Interrupted, Signals
from hpd.training.tracking import Trackers
from hpd.training.trainer import DistillTrainer

__all__ = ["evaluate_task", "make_trainer", "open_together", "train_single"]


# Warnings that the verdicts on rows have said, with how many rows they are of.
_SAID_OF_ROWS = ("The tokenized prompt is not a prefix", "Token indices sequence length is longer")


class _EvaluatingTrainer(TaskEvaluation, DistillTrainer):
    """A `DistillTrainer` that does tasks while it trains."""


def open_together(folder: RunFolder, args: Any) -> None:
    """Open a run folder on the main process, when all processes have checked it.

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


def train_single(
    planned: Plan, folder: RunFolder, progress: Progress, baselines: bool, signals: Signals
) -> dict[str, Any]:
    """Run a planned recipe, which has no stages, to its end; returns the summary.

    Args:
        planned: the run, checked.
        folder: its folder, not opened yet.
        progress: told on the way.
        baselines: let teacher and untrained student do the tasks too.
        signals: the handler, which the trainer is told to.

    Raises:
        ValueError: a model or adapter that cannot be loaded; processes not joined, or not as many as before.
        Interrupted, TeacherUnavailable, OSError: as `ends_resumable` reads them.
    """
    recipe = planned.recipe
    _check_processes(planned, folder)
    progress.say(f"student {recipe.student.model}, teacher {recipe.teacher.title}")
    started = time.perf_counter()
    if int(os.environ.get("RANK", "0")) == 0:
        folder.check_inputs(input_fingerprints(planned))
    trackers = Trackers(planned.args, project_given="project" in recipe.train)
    student = _load_student(planned)
    teacher = planned.served or load_teacher(recipe.teacher)
    # Before tasks are done for minutes; the trainer probes the rest.
    check_packing(student, teacher, planned.args)
    # Not before the models are loaded: what cannot start leaves nothing behind.
    open_together(folder, planned.args)
    if PartialState().is_main_process:
        _note_inputs(planned, folder)
    resume = folder.checkpoint
    measured = folder.baselines()
    to_measure = resume is None and measured is None
    before = measured or {}
    if to_measure and baselines:
        before |= _task_baselines(planned, student, teacher, folder, progress)
    with saying_warnings(progress, known=_SAID_OF_ROWS):
        trainer = make_trainer(planned, student, teacher, folder, progress)
        trackers.join(trainer)
    before |= _loss_baselines(trainer, is_new=resume is None, to_measure=to_measure)
    if to_measure and trainer.is_world_process_zero():
        folder.write_json("baselines.json", before)
    train_began, evaluated = time.perf_counter(), trainer.evaluation_seconds
    with signals.stopping(trainer), saying_warnings(progress):
        trainer.train(resume_from_checkpoint=resume)
    trained = time.perf_counter() - train_began - (trainer.evaluation_seconds - evaluated)
    with _keeping_steps(trainer):
        after = _finish(planned, trainer, folder, progress)
    trackers.end()
    # Of this life of the run: without what was evaluated before, on the way and behind.
    after["train seconds"] = round(trained, 1)
    summary: dict[str, Any] = {"method": recipe.method or ("terms" if recipe.terms else "hpd")}
    summary |= before | after | {"seconds": round(time.perf_counter() - started, 1)} | _totals(trainer)
    if trainer.is_world_process_zero():
        folder.write_card(summary)
        folder.write_json("summary.json", summary)
    return summary


def _check_processes(planned: Plan, folder: RunFolder) -> None:
    """Refuse processes that are not those which the run needs, or that share rows which cannot be cut."""
    check_launch(planned.args)
    check_sliced_plan(planned)
    folder.check_processes(planned.args.world_size)


def _note_inputs(planned: Plan, folder: RunFolder) -> None:
    """Keep what another day or another server would change."""
    if planned.served is not None:
        folder.keep_teacher(planned.served.fingerprint)
    if planned.date is not None:
        folder.write_json(DATE, {"date": planned.date.isoformat()})


def _load_student(planned: Plan) -> Any:
    """The student, with the adapter that it goes on training, if that is what the recipe asks for."""
    recipe = planned.recipe
    if goes_on_adapter(recipe, planned.student_config):
        return load_adapted(recipe.student, "student", lora_of(recipe))
    student = load_model(recipe.student, "student", planned.args.seed)
    _check_lora(recipe, student)
    return student


def _task_baselines(
    planned: Plan, student: Any, teacher: Teacher, folder: RunFolder, progress: Progress
) -> dict[str, Any]:
    """The tasks of the untrained student, and of a teacher that is a model here."""
    if planned.evals and is_deepspeed_zero3_enabled():
        progress.say("ZeRO-3 loads models in pieces that run only in training: no task is done before it")
        return {}
    found = evaluate_task(planned, student, "student before", folder, progress)
    if isinstance(teacher, ModelTeacher):
        found |= evaluate_task(planned, teacher.model, "teacher", folder, progress)
    return found


def _loss_baselines(trainer: DistillTrainer, is_new: bool, to_measure: bool) -> dict[str, float]:
    """The untrained student's loss and KLs on the validation rows.

    Args:
        is_new: there is no checkpoint to go on from.
        to_measure: nothing was measured by an earlier life of the run either.
    """
    # FSDP2 and DeepSpeed take the student over together with its optimizer, when training starts.
    trainer.args.eval_on_start = trainer.eval_dataset is not None and is_new and _is_sharded(trainer)
    if trainer.eval_dataset is None or not is_new or _is_sharded(trainer):
        return {}
    if to_measure:
        return {f"{k} before": v for k, v in _eval_metrics(trainer, trainer.evaluate()).items()}
    # Measured by a life that left no checkpoint: its loaders drew numbers, on which the order of rows
    # depends.
    for name in validation_sets(trainer.eval_dataset):
        next(iter(trainer.get_eval_dataloader(name or None)))
    return {}


def _is_sharded(trainer: DistillTrainer) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def _totals(trainer: DistillTrainer) -> dict[str, Any]:
    """Figures of the whole run that the trainer kept."""
    found: dict[str, Any] = {"steps": trainer.state.global_step}
    if trainer.stopped_by:
        found["stopped"] = trainer.stopped_by
    if written := sum(log.get("rollouts/tokens", 0.0) for log in trainer.state.log_history):
        found["generated tokens"] = int(written)
    return found


def _finish(planned: Plan, trainer: DistillTrainer, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Evaluate the student after the last step, and save it."""
    if trainer.stop_reason is not None:
        raise Interrupted(trainer.stop_reason)
    found: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        for log in (log for log in trainer.state.log_history if log["step"] == 0):
            found |= {f"{k} before": v for k, v in _eval_metrics(trainer, log).items()}
        found |= {f"{k} after": v for k, v in _eval_metrics(trainer, trainer.evaluate()).items()}
    with writing(folder.path):
        trainer.save_model()
    student = trainer.accelerator.unwrap_model(trainer.model)
    return found | evaluate_task(
        planned, student, "student after", folder, progress, together=_is_sharded(trainer)
    )


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


def make_trainer(
    planned: Plan, student: Any, teacher: Teacher, folder: RunFolder, progress: Progress
) -> DistillTrainer:
    """The trainer of a planned run.

    Raises:
        ValueError: no row keeps a label.
    """
    recipe = planned.recipe
    make: Callable[..., DistillTrainer] = DistillTrainer
    if any(entry.config.every is not None for entry in planned.evals):
        make = functools.partial(_EvaluatingTrainer, evals=planned.evals, folder=folder.path)
    trainer = make(
        model=student,
        teacher=teacher,
        args=planned.args,
        method=recipe.method,
        method_kwargs=recipe.method_kwargs,
        terms=recipe.terms,
        train_dataset=planned.rows.train,
        eval_dataset=planned.rows.validation,
        processing_class=planned.tokenizer,
        # The plan has compared the two, where they should be one.
        teacher_tokenizer=planned.tokenizer if planned.other is None else planned.other.tokenizer,
        prefixes=recipe.prefixes,
        rollouts=recipe.rollouts,
        strategy=recipe.strategy,
        guards=recipe.guards,
        peft_config=None if isinstance(student, PeftModel) else lora_of(recipe),
        callbacks=[MetricsWriter(folder), *progress.callbacks()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    rows: Any = trainer.train_dataset
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError("Every label is masked: no row keeps a completion token within train.max_length.")
    writing_with = trainer.regime.rollouts
    if trainer.regime.prefixes.on_policy and writing_with.engine == "vllm":
        served = writing_with.vllm.get("mode") == "server"
        dtype = "the server's dtype" if served else rollout_dtype(writing_with, student)
        progress.say(f"rollouts: vLLM in {dtype}")
    return trainer


def _check_lora(recipe: Recipe, student: torch.nn.Module) -> None:
    """Refuse an adapter on a module that is not there; peft complains only if none is, and later."""
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
        linear = [name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)]
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"lora.target_modules names {', '.join(missing)}, which the student does not have; it has "
            f"{', '.join(known)}."
        )


def _eval_metrics(trainer: DistillTrainer, metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of a summary, of each validation set."""
    figures = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    sets = [f"{name}_" if name else "" for name in validation_sets(trainer.eval_dataset)]
    names = [f"{prefix}{figure}" for prefix in sets for figure in figures]
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
