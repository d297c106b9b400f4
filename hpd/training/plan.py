"""Everything known about a run before a weight is loaded, and whether it fits together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import peft
import transformers
from transformers import PreTrainedTokenizerBase

from hpd.config.check import check_recipe
from hpd.config.schema import DataConfig, EvalConfig, Recipe
from hpd.data.formats import FORMATS, RowFormat
from hpd.data.lengths import Lengths, check_ids, greatest_id, measure
from hpd.data.rows import Rows, load_rows
from hpd.data.templates import check_templates, read_template
from hpd.evaluate.task import Task
from hpd.evaluate.tasks import task_and_settings
from hpd.generation.settings import GenerationSettings
from hpd.models.adapters import find_adapter, has_shape_of
from hpd.models.load import load_config, load_generation_config, load_tokenizer
from hpd.models.pairing import CheckResult, check_pair
from hpd.models.probe import check_savable
from hpd.progress import quiet_libraries
from hpd.teachers.remote.server import ServedTeacher
from hpd.teachers.sources import check_caches, described_by
from hpd.training.arguments import DistillConfig, label_policy, train_arguments
from hpd.training.probing import beyond_embeddings, packing_verdicts
from hpd.training.settings import check_special_tokens

__all__ = ["Plan", "PlannedEval", "goes_on_adapter", "lora_of", "plan", "plan_evals", "steps_of"]


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

    def require_sound(self) -> None:
        """Raise ValueError with every verdict that would ruin the run."""
        errors = [f"{v.topic}: {v.text}" for v in self.verdicts if v.level == "error"]
        if errors:
            raise ValueError(" ".join(errors))

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


class _Comparison(NamedTuple):
    """The rows as the student reads them, and what the checks found."""

    rows: Rows
    lengths: Lengths
    verdicts: tuple[CheckResult, ...]


def plan(recipe: Recipe) -> Plan:
    """Read configurations, tokenizers and data, and check that they fit together.

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
    models = _describe_models(recipe, args)
    prompts = recipe.choose_regime().needs_prompts_only
    rows = load_rows(_text_column(recipe.data, args), recipe.teacher.column, prompts=prompts)
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
    )


def _describe_models(recipe: Recipe, args: DistillConfig) -> _Models:
    """Read configurations and tokenizers, and connect to a teacher elsewhere."""
    student_config = load_config(recipe.student, "student")
    tokenizer = load_tokenizer(recipe.student, "student")
    check_special_tokens(args, tokenizer)
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
    return _Models(tokenizer, student_config, configs, tokenizers, served)


def _compare(models: _Models, rows: Rows, recipe: Recipe, args: DistillConfig) -> _Comparison:
    """Check the models against each other, and the rows against the student."""
    verdicts = _pair_verdicts(models, rows.conversational, args.vocabulary)
    for verdict in verdicts:
        if verdict.level == "error" and verdict.topic.startswith("chat template"):
            raise ValueError(verdict.text)
    rows = _take_templates(rows, models.tokenizer, recipe, args)
    check_ids(rows.train, models.student_config.get_text_config().vocab_size)
    labels = label_policy(args)
    lengths = measure(rows.train, models.tokenizer, args.max_length, labels, args.truncation_mode)
    saving = check_savable(models.student_config, load_generation_config(recipe.student), models.tokenizer)
    found = (
        *verdicts,
        *_adapter_verdicts(recipe, models.student_config),
        *_column_verdicts(rows),
        *saving,
        *packing_verdicts(args),
        *_length_verdicts(lengths, args),
        *_added_tokens(models, rows, labels),
    )
    return _Comparison(rows, lengths, found)


def _text_column(data: DataConfig, args: DistillConfig) -> DataConfig:
    """The data, whose text stands in the column that `train.dataset_text_field` names."""
    if args.dataset_text_field == "text" or "text" in data.columns:
        return data
    return dataclasses.replace(data, columns={**data.columns, "text": args.dataset_text_field})


def _column_verdicts(rows: Rows) -> list[CheckResult]:
    """How several datasets are mixed, and their columns that are not read, by name."""
    mixture = [] if rows.mixture is None else [CheckResult("ok", "mixture", rows.mixture)]
    found = (verdict for layout in rows.layouts for verdict in _unread_columns(layout))
    return [*mixture, *dict.fromkeys(found)]


def _unread_columns(layout: RowFormat) -> list[CheckResult]:
    verdicts = []
    if layout.beside:
        names = " and ".join(layout.source[part] for part in FORMATS[layout.kind])
        text = (
            f"rows are read from {names}; {', '.join(layout.beside)} may hold another form of them, and has "
            "no effect: if that is what should be learnt, map it in data.columns"
        )
        verdicts.append(CheckResult("warning", "columns", text))
    if layout.unread:
        verdicts.append(CheckResult("ok", "columns", f"not read: {', '.join(layout.unread)}"))
    return verdicts


def _added_tokens(models: _Models, rows: Rows, labels: str) -> list[CheckResult]:
    """Look in the first rows for tokens that were added to the tokenizer and not to a model."""
    configs = {"student": models.student_config, **models.teacher_configs}
    limits = {role: config.get_text_config().vocab_size for role, config in configs.items()}
    greatest = max(models.tokenizer.get_vocab().values(), default=0)
    if greatest < min(limits.values()):
        return []
    seen = greatest_id(rows.train, models.tokenizer, labels)
    return [
        CheckResult("error", "vocabulary", beyond_embeddings(models.tokenizer, seen, role, limit))
        for role, limit in limits.items()
        if seen >= limit
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
    if recipe.lora is None:
        return None
    # Whoever loads the adapter needs the base of that revision.
    options = {**dataclasses.asdict(recipe.lora), "revision": recipe.student.revision}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def goes_on_adapter(recipe: Recipe, student_config: Any) -> bool:
    """True if the student is an adapter of the shape that `lora` asks for, which is then trained further.

    Any other adapter is merged into its base, and so is one whose run learns from `self`: with an adapter
    switched off, the base would be the teacher, not the student as it was before training.

    Args:
        student_config: of the student's base.
    """
    adapter = find_adapter(recipe.student, "student")
    teachers = (recipe.teacher, *recipe.teacher.teachers.values())
    if adapter is None or any(teacher.type == "self" for teacher in teachers):
        return False
    wanted = lora_of(recipe)
    return wanted is not None and has_shape_of(adapter, student_config, wanted)


def _adapter_verdicts(recipe: Recipe, student_config: Any) -> list[CheckResult]:
    """The way a student that is an adapter is taken."""
    adapter = find_adapter(recipe.student, "student")
    if adapter is None:
        return []
    if goes_on_adapter(recipe, student_config):
        text = f"lora has its shape: it is trained further, on the same base {adapter.base.model}"
    elif recipe.lora is None:
        text = f"merged into its base {adapter.base.model}; all weights are trained"
    else:
        text = (
            f"merged into its base {adapter.base.model}, and a new one is trained on the result, whose base "
            f"is {adapter.path}"
        )
    return [CheckResult("ok", "adapter", text)]


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
