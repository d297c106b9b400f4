"""Everything known about a run before a weight is loaded, and whether it fits together."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NamedTuple

import peft
import transformers
from transformers import PreTrainedTokenizerBase

from hpd.config.check import check_recipe
from hpd.config.schema import EvalConfig, Recipe
from hpd.data.context import check_context
from hpd.data.dates import set_date
from hpd.data.lengths import MEASURED_ROWS, Lengths, check_ids, measure
from hpd.data.reading import first_rows
from hpd.data.rendered import compare_rows
from hpd.data.rows import Rows, load_rows
from hpd.data.templates import check_templates, read_template
from hpd.evaluate.task import Task
from hpd.evaluate.tasks import task_and_settings
from hpd.generation.settings import GenerationSettings
from hpd.models.ends import end_tokens
from hpd.models.load import load_config, load_tokenizer
from hpd.models.pairing import CheckResult, check_pair
from hpd.progress import Progress, quiet_libraries
from hpd.teachers.remote.server import ServedTeacher
from hpd.teachers.sources import check_caches, described_by
from hpd.training.arguments import DistillConfig, train_arguments
from hpd.training.dates import first_day

__all__ = ["Plan", "PlannedEval", "lora_of", "plan", "plan_evals", "steps_of"]


class PlannedEval(NamedTuple):
    """An entry of a recipe's `eval`, with its examples read."""

    config: EvalConfig
    task: Task
    settings: GenerationSettings

    @property
    def label(self) -> str:
        """The name of its metric in logs: gsm8k_accuracy, humaneval_plus_accuracy, ..."""
        name = self.task.name.replace("+", "_plus").replace("-", "_")
        return f"{name}_{self.task.metric}"


def plan_evals(evals: Sequence[EvalConfig]) -> tuple[PlannedEval, ...]:
    """Read the tasks of a recipe.

    Raises:
        FileNotFoundError, ValueError: as `task_and_settings`.
    """
    return tuple(PlannedEval(config, *task_and_settings(config)) for config in evals)


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
    verdicts: tuple[CheckResult, ...]
    evals: tuple[PlannedEval, ...] = ()
    """Of each entry of the recipe's `eval`."""
    served: ServedTeacher | None = None
    """The connection to a teacher elsewhere."""
    date: datetime.date | None = None
    """The day that the chat template prints; None where it prints none."""

    def require_sound(self) -> None:
        """Raise ValueError with every verdict that would ruin the run."""
        errors = [f"{v.topic}: {v.text}" for v in self.verdicts if v.level == "error"]
        if errors:
            raise ValueError(" ".join(errors))

    def say_warnings(self, progress: Progress) -> None:
        """Say what is to be known about the run before it starts."""
        for verdict in self.verdicts:
            if verdict.level == "warning":
                progress.say(f"warning, {verdict.topic}: {verdict.text}")

    def close(self) -> None:
        """Let go of a teacher elsewhere."""
        if self.served is not None:
            self.served.close()


class _Models(NamedTuple):
    """The models of a run, described without their weights."""

    tokenizer: PreTrainedTokenizerBase
    student_config: Any
    teacher_configs: Mapping[str, Any]
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase | None]
    """None: a server that does not tell its tokenizer."""
    served: ServedTeacher | None
    date: datetime.date | None


class _Comparison(NamedTuple):
    """The rows as the student reads them, and what the checks found."""

    rows: Rows
    lengths: Lengths
    verdicts: tuple[CheckResult, ...]


def plan(recipe: Recipe, fresh: bool = False) -> Plan:
    """Read configurations, tokenizers and data, and check that they fit together.

    Args:
        recipe: of the run.
        fresh: the run begins anew, whatever its folder holds.

    Raises:
        FileNotFoundError, ValueError: with one paragraph that says what was given, what is allowed and what
            to do.
    """
    quiet_libraries()
    # A recipe that was built in Python has not been looked at as a whole.
    check_recipe(recipe)
    defaults = {} if "report_to" in recipe.train else {"report_to": "none"}
    args = train_arguments(recipe, disable_tqdm=True, **defaults)
    _check_loggers(args)
    models = _describe_models(recipe, args, fresh)
    rows = load_rows(recipe.data, recipe.teacher.column)
    compared = _compare(models, rows, recipe, args)
    return Plan(
        recipe,
        args,
        models.tokenizer,
        models.student_config,
        models.teacher_configs,
        compared.rows,
        compared.lengths,
        compared.verdicts,
        _check_evals(plan_evals(recipe.eval), args),
        models.served,
        models.date,
    )


def _describe_models(recipe: Recipe, args: DistillConfig, fresh: bool) -> _Models:
    """Read configurations and tokenizers, and connect to a teacher elsewhere."""
    student_config = load_config(recipe.student, "student")
    tokenizer = load_tokenizer(recipe.student, "student")
    check_caches(recipe.teacher, tokenizer, args)
    served = None
    if recipe.teacher.type == "server":
        served = _connect(recipe, args, student_config, tokenizer)
        asked = load_tokenizer(recipe.teacher, "teacher") if recipe.teacher.tokenizer else served.tokenizer
        configs = {"teacher": served.config}
        tokenizers = {"teacher": asked}
    else:
        sources = described_by(recipe)
        configs = {role: load_config(source, role) for role, source in sources.items()}
        tokenizers = {role: load_tokenizer(source, role) for role, source in sources.items()}
    if args.chat_template_path is not None:
        # The trainer puts it there itself, and by then every row has been looked at.
        tokenizer.chat_template = read_template(args.chat_template_path)
    day = first_day(recipe, fresh)
    date = day if set_date(tokenizer, day, recipe.data.labels) else None
    return _Models(tokenizer, student_config, configs, tokenizers, served, date)


def _compare(models: _Models, rows: Rows, recipe: Recipe, args: DistillConfig) -> _Comparison:
    """Check the models against each other, and the rows against the student."""
    verdicts = _pair_verdicts(models, rows.conversational, args.vocabulary)
    for verdict in verdicts:
        if verdict.level == "error" and verdict.topic.startswith("chat template"):
            raise ValueError(verdict.text)
    rows = _take_templates(rows, models.tokenizer, recipe, args)
    check_ids(rows.train, models.student_config.get_text_config().vocab_size)
    if args.eos_token in models.tokenizer.get_vocab():
        models.tokenizer.eos_token = args.eos_token  # as TRL does
    # Packing that splits rows cuts nothing off.
    whole = args.packing and args.packing_strategy != "bfd"
    lengths = measure(
        rows.train,
        models.tokenizer,
        None if whole else args.max_length,
        recipe.data.labels,
        args.truncation_mode,
    )
    verdicts += _length_verdicts(lengths, args)
    return _Comparison(rows, lengths, (*verdicts, *_row_verdicts(models, rows, recipe, args)))


def _row_verdicts(models: _Models, rows: Rows, recipe: Recipe, args: DistillConfig) -> list[CheckResult]:
    """The rendered rows beside the rows, and beside what the models read."""
    tokenizer, labels = models.tokenizer, recipe.data.labels
    first = first_rows(rows.train, MEASURED_ROWS)
    ends = end_tokens(recipe.student, models.student_config)
    if args.eos_token in models.tokenizer.get_vocab() and ends:
        # TRL adds it to the generation configuration.
        ends |= frozenset([models.tokenizer.get_vocab()[args.eos_token]])
    looked_at = rows.train if isinstance(rows.train, Sized) else first
    configs = {"student": models.student_config, **models.teacher_configs}
    return [
        *compare_rows(first, tokenizer, labels, ends),
        *check_context(looked_at, tokenizer, labels, args.max_length, configs),
    ]


def _pair_verdicts(models: _Models, conversational: bool, policy: str) -> list[CheckResult]:
    """The student beside each teacher."""
    verdicts: list[CheckResult] = []
    for role, config in models.teacher_configs.items():
        teacher = models.teacher_tokenizers[role]
        if teacher is None:
            assert models.served is not None
            found = models.served.verdicts()
        else:
            found = check_pair(
                models.tokenizer,
                teacher,
                models.student_config,
                config,
                policy=policy,
                conversational=conversational,
            )
        if len(models.teacher_configs) > 1:
            found = [dataclasses.replace(v, topic=f"{v.topic} ({role})") for v in found]
        verdicts += found
    return verdicts


def _take_templates(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, args: DistillConfig
) -> Rows:
    """The rows, all of which the student's chat template takes; a stream's are looked at as they come."""
    if not rows.conversational:
        return rows
    drawn = isinstance(recipe.data.validation, float)
    names = {"train": "of the training rows" if drawn else "", "validation": "of the validation rows"}
    train, validation = (
        check_templates(
            getattr(rows, part), tokenizer, recipe.data.labels, name=name, num_proc=args.dataset_num_proc
        )
        for part, name in names.items()
    )
    return rows._replace(train=train, validation=validation)


def _check_loggers(args: DistillConfig) -> None:
    """Refuse unknown or missing trackers, which the Trainer would notice with all models loaded."""
    try:
        for make in transformers.integrations.get_reporting_integration_callbacks(args.report_to):
            make()
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"train.report_to: {' '.join(str(error).split())}") from None


def _connect(
    recipe: Recipe, args: DistillConfig, student_config: Any, tokenizer: PreTrainedTokenizerBase
) -> ServedTeacher:
    served = ServedTeacher(recipe.teacher, student_config.get_text_config().vocab_size)
    served.check_terms(recipe.choose_terms())
    served.connect(tokenizer)
    served.check_rows(args.max_length)
    return served


def _check_evals(evals: tuple[PlannedEval, ...], args: DistillConfig) -> tuple[PlannedEval, ...]:
    """The tasks, of which the best model is not chosen by one that is never run in training."""
    named = (args.metric_for_best_model or "").removeprefix("eval_")
    for planned in evals:
        if planned.label == named and planned.config.every is None:
            raise ValueError(
                f"train.metric_for_best_model names {named}, whose task has no `every`: it is not run in "
                "training."
            )
    return evals


def _length_verdicts(lengths: Lengths, args: DistillConfig) -> list[CheckResult]:
    p = lengths.percentiles
    text = (
        f"tokens per row: median {p[50]}, 90 % {p[90]}, 99 % {p[99]}, longest {p[100]} (first "
        f"{lengths.num_rows} rows); max_length {args.max_length} cuts {lengths.cut_rows:.1%} and leaves "
        f"{lengths.lost_rows:.1%} without a label"
    )
    verdicts = [CheckResult("warning" if lengths.cut_rows > 0.05 else "ok", "lengths", text)]
    if lengths.ends_with_eos < 0.5:
        text = (
            f"only {lengths.ends_with_eos:.0%} of the rows end with an end-of-sequence label: the student "
            "may not learn to stop"
        )
        verdicts.append(CheckResult("warning", "end of rows", text))
    return verdicts


def lora_of(recipe: Recipe) -> peft.LoraConfig | None:
    """Return the recipe's adapter as peft takes it."""
    return peft.LoraConfig(task_type="CAUSAL_LM", **dataclasses.asdict(recipe.lora)) if recipe.lora else None


def steps_of(planned: Plan) -> int | None:
    """Optimiser steps that the run will take on one process; None for a stream without max_steps."""
    args = planned.args
    rows = planned.rows.train
    if args.max_steps > 0:
        return args.max_steps
    if not hasattr(rows, "__len__"):
        return None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return math.ceil(len(rows) / batch * args.num_train_epochs)  # type: ignore[arg-type]
