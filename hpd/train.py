"""From a recipe to a trained student: check, load, evaluate, train, evaluate, write down."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hpd.checkpoints import writing
from hpd.config import Recipe, train_arguments
from hpd.data import Lengths, Rows, check_ids, load_rows, measure
from hpd.interrupts import Interrupted, Signals
from hpd.models import load_config, load_model, load_tokenizer
from hpd.pairing import Verdict, check_pair
from hpd.runs import MetricsWriter, RunFolder
from hpd.stopping import RunStopped, ends_resumable
from hpd.teachers import ModelTeacher, Teacher, TeacherUnavailable
from hpd.teachers.server import ServedTeacher
from hpd.teachers.sources import check_caches, described_by, load_teacher
from hpd.templates import check_templates, read_template
from hpd.trainer import DistillConfig, DistillTrainer

__all__ = [
    "Plan",
    "Progress",
    "RunStopped",
    "evaluate_task",
    "lora_of",
    "open_together",
    "plan",
    "quiet_libraries",
    "steps_of",
    "train",
]


class Plan(NamedTuple):
    """Everything known about a run before a weight is loaded."""

    recipe: Recipe
    args: DistillConfig
    tokenizer: PreTrainedTokenizerBase
    student_config: Any
    teacher_configs: Mapping[str, Any]
    """Of each teacher, by its role in messages."""
    rows: Rows
    lengths: Lengths
    verdicts: tuple[Verdict, ...]
    evals: tuple[Any, ...] = ()
    """`hpd.evaluate.callback.PlannedEval` of each entry of the recipe's `eval`."""
    served: ServedTeacher | None = None
    """The connection to a teacher elsewhere."""

    def require_sound(self) -> None:
        """Raise ValueError with every verdict that would ruin the run."""
        errors = [f"{v.topic}: {v.text}" for v in self.verdicts if v.level == "error"]
        if errors:
            raise ValueError(" ".join(errors))


def plan(recipe: Recipe) -> Plan:
    """Read configurations, tokenizers and data, and check that they fit together.

    Raises:
        FileNotFoundError, ValueError: with one paragraph that says what was given, what is allowed and what to do.
    """
    quiet_libraries()
    defaults = {} if "report_to" in recipe.train else {"report_to": "none"}
    args = train_arguments(recipe, disable_tqdm=True, **defaults)
    _check_loggers(args)
    student_config = load_config(recipe.student, "student")
    tokenizer = load_tokenizer(recipe.student, "student")
    check_caches(recipe.teacher, tokenizer, args)
    served = _connect(recipe, args, student_config, tokenizer) if recipe.teacher.type == "server" else None
    teacher_configs, teacher_tokenizers = _describe_teachers(recipe, served)
    rows = load_rows(recipe.data, recipe.teacher.column)
    if args.chat_template_path is not None:
        # The trainer puts it there itself, and by then every row has been looked at.
        tokenizer.chat_template = read_template(args.chat_template_path)
    verdicts = []
    for role, config in teacher_configs.items():
        theirs = teacher_tokenizers[role]
        if theirs is None:
            assert served is not None
            found = served.verdicts()
        else:
            found = check_pair(
                tokenizer, theirs, student_config, config, policy=args.vocabulary, conversational=rows.conversational
            )
        several = len(teacher_configs) > 1
        verdicts += [dataclasses.replace(v, topic=f"{v.topic} ({role})") for v in found] if several else found
    for verdict in verdicts:
        if verdict.level == "error" and verdict.topic.startswith("chat template"):
            raise ValueError(verdict.text)
    rows = _take_templates(rows, tokenizer, recipe, args)
    check_ids(rows.train, student_config.get_text_config().vocab_size)
    lengths = measure(rows.train, tokenizer, args.max_length, recipe.data.labels)
    verdicts += _length_verdicts(lengths, args)
    evals = _plan_evals(recipe, args)
    return Plan(recipe, args, tokenizer, student_config, teacher_configs, rows, lengths, tuple(verdicts), evals, served)


def _take_templates(rows: Rows, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, args: DistillConfig) -> Rows:
    """The rows, all of which the student's chat template takes; a stream's are looked at as they come."""
    if not rows.conversational:
        return rows
    labels, drawn = recipe.data.labels, isinstance(recipe.data.validation, float)
    names = {"train": "of the training rows" if drawn else "", "validation": "of the validation rows"}
    train, validation = (
        check_templates(getattr(rows, part), tokenizer, labels, name=name, num_proc=args.dataset_num_proc)
        for part, name in names.items()
    )
    return rows._replace(train=train, validation=validation)


def _check_loggers(args: DistillConfig) -> None:
    """Unknown or missing trackers, which the Trainer would notice with all models loaded."""
    try:
        for make in transformers.integrations.get_reporting_integration_callbacks(args.report_to):
            make()
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"train.report_to: {' '.join(str(error).split())}") from None


def _describe_teachers(recipe: Recipe, served: ServedTeacher | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tokenizer of each teacher by its role; a server need not say which tokenizer it has (None)."""
    if served is not None:
        tokenizer = load_tokenizer(recipe.teacher, "teacher") if recipe.teacher.tokenizer else served.tokenizer
        return {"teacher": served.config}, {"teacher": tokenizer}
    sources = described_by(recipe)
    configs = {role: load_config(source, role) for role, source in sources.items()}
    return configs, {role: load_tokenizer(source, role) for role, source in sources.items()}


def _connect(recipe: Recipe, args: DistillConfig, student_config: Any, tokenizer: PreTrainedTokenizerBase) -> ServedTeacher:
    served = ServedTeacher(recipe.teacher, student_config.get_text_config().vocab_size)
    served.check_terms(recipe.choose_terms())
    served.connect(tokenizer)
    served.check_rows(args.max_length)
    return served


def _plan_evals(recipe: Recipe, args: DistillConfig) -> tuple[Any, ...]:
    """The recipe's tasks with their examples, so that a missing file is found before a model is loaded."""
    if not recipe.eval:
        return ()
    from hpd.evaluate.callback import plan_evals

    evals = plan_evals(recipe.eval)
    named = (args.metric_for_best_model or "").removeprefix("eval_")
    labels = {planned.label: planned.config.every for planned in evals}
    if named in labels and labels[named] is None:
        raise ValueError(f"train.metric_for_best_model names {named}, whose task has no `every`: it is not run in training.")
    return evals


def _length_verdicts(lengths: Lengths, args: DistillConfig) -> list[Verdict]:
    p = lengths.percentiles
    text = (
        f"tokens per row: median {p[50]}, 90 % {p[90]}, 99 % {p[99]}, longest {p[100]} (first {lengths.num_rows} rows); "
        f"max_length {args.max_length} cuts {lengths.cut_rows:.1%} and leaves {lengths.lost_rows:.1%} without a label"
    )
    verdicts = [Verdict("warning" if lengths.cut_rows > 0.05 else "ok", "lengths", text)]
    if lengths.ends_with_eos < 0.5:
        text = (
            f"only {lengths.ends_with_eos:.0%} of the rows end with an end-of-sequence label: the student may not learn to stop"
        )
        verdicts.append(Verdict("warning", "end of rows", text))
    return verdicts


class Progress:
    """What the command line shows; silent unless overridden (every method is optional to override)."""

    def say(self, text: str) -> None: ...

    def evaluating(self, name: str) -> Callable[[int, int], None] | None:
        return None

    def callbacks(self) -> Sequence[transformers.TrainerCallback]:
        return ()


def train(
    recipe: Recipe, *, overwrite: bool = False, progress: Progress | None = None, baselines: bool = True
) -> dict[str, Any]:
    """Run a recipe from start (or its last checkpoint) to finish; one with stages, stage by stage.

    Args:
        recipe: what to run.
        overwrite: delete an existing run first.
        progress: what is told on the way.
        baselines: let teacher and untrained student do the task too.

    Returns:
        The summary that is also written to the run folder: losses and KLs before and after, accuracies, seconds.

    Raises:
        FileNotFoundError, ValueError: as `plan`; or the run folder belongs to something else.
        RunStopped: SIGTERM or Ctrl-C (caught in the main thread only), a remote teacher that stays away, a disk that takes no
            more, or NaN: the steps done are saved, and the message says how to go on.
    """
    with ends_resumable(Path(recipe.output_dir)) as signals:
        if recipe.stages:
            from hpd.stages import train_stages

            return train_stages(recipe, overwrite=overwrite, progress=progress)
        folder = RunFolder(recipe, overwrite)
        planned = plan(recipe)
        planned.require_sound()
        try:
            return _run(planned, folder, progress or Progress(), baselines, signals)
        finally:
            if planned.served is not None:
                planned.served.close()


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
                f"Processes find different checkpoints in {folder.path}: {', '.join(sorted({str(name) for name in found}))}. "
                "All machines must see one output_dir: put it on shared storage."
            )


def _run(planned: Plan, folder: RunFolder, progress: Progress, baselines: bool, signals: Signals) -> dict[str, Any]:
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
        # Measured by a life that left no checkpoint: its loader drew a number, on which the order of rows depends.
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
) -> dict[str, Any]:  # fmt: skip
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


def _trainer(planned: Plan, student: Any, teacher: Teacher, folder: RunFolder, progress: Progress) -> DistillTrainer:
    recipe, args = planned.recipe, planned.args
    make: Callable[..., DistillTrainer] = DistillTrainer
    if any(entry.config.every is not None for entry in planned.evals):
        from hpd.evaluate.callback import EvaluatingTrainer

        make = functools.partial(EvaluatingTrainer, evals=planned.evals, folder=folder.path)
    trainer = make(
        model=student, teacher=teacher, args=args,
        method=recipe.method, method_kwargs=recipe.method_kwargs, terms=recipe.terms,
        train_dataset=planned.rows.train, eval_dataset=planned.rows.validation,
        processing_class=planned.tokenizer,
        prefixes=recipe.prefixes, rollouts=recipe.rollouts, strategy=recipe.strategy, guards=recipe.guards,
        peft_config=lora_of(recipe),
        callbacks=[MetricsWriter(folder), *progress.callbacks()],
    )  # fmt: skip
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
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing:
        known = sorted(
            {name.rpartition(".")[2] for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
        )
        raise ValueError(
            f"lora.target_modules names {', '.join(missing)}, which the student has not; it has {', '.join(known)}."
        )


def lora_of(recipe: Recipe) -> peft.LoraConfig | None:
    """The recipe's adapter as peft takes it."""
    return peft.LoraConfig(task_type="CAUSAL_LM", **dataclasses.asdict(recipe.lora)) if recipe.lora else None


def _eval_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    return {name: round(metrics[f"eval_{name}"], 6) for name in names if f"eval_{name}" in metrics}


def evaluate_task(
    planned: Plan, model: Any, name: str, folder: RunFolder, progress: Progress, together: bool = False
) -> dict[str, Any]:
    """The metric of each of the recipe's tasks, found by the main process.

    Args:
        together: all processes generate the same answers, since a sharded model runs on all of them or not at all.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    if not planned.evals or not (is_main or together):
        return {}
    from hpd.evaluate import evaluate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not together and not getattr(model, "hf_device_map", None) and not getattr(model, "quantization_method", None):
        model.to(device)
    found = {}
    for entry in planned.evals:
        result = evaluate(
            model, planned.tokenizer, entry.task, entry.settings,
            output_dir=folder.path if is_main else None, name=name, progress=progress.evaluating(name),
        )  # fmt: skip
        label = entry.label if len(planned.evals) > 1 else result.metric
        found[f"{name} {label}"] = round(result.value, 4)
    return found


def quiet_libraries() -> None:
    """Libraries' notices that a user of the command line cannot act on."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def steps_of(planned: Plan) -> int | None:
    """Optimiser steps that the run will take on one process; None for a stream without max_steps."""
    args, rows = planned.args, planned.rows.train
    if args.max_steps > 0:
        return args.max_steps
    if not hasattr(rows, "__len__"):
        return None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return math.ceil(len(rows) / batch * args.num_train_epochs)  # type: ignore[arg-type]
