"""Everything known about a run before a weight is loaded, and whether it fits together."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy

from hpd.config.check import check_recipe
from hpd.config.schema import DataConfig, EvalConfig, Recipe
from hpd.data.byte_rows import TwoTokenizers, two_tokenizers
from hpd.data.dates import set_date
from hpd.data.lengths import Lengths, check_ids, measure
from hpd.data.rows import Rows, load_rows, validation_sets
from hpd.data.teacher_prompts import TeacherContext
from hpd.data.templates import check_templates, read_template
from hpd.data.weighed import weight_column
from hpd.evaluate.task import Task
from hpd.evaluate.tasks import task_and_settings
from hpd.generation.settings import GenerationSettings
from hpd.methods.byte_forms import check_likeliest
from hpd.methods.table import name_terms
from hpd.models.load import load_config, load_tokenizer
from hpd.models.pairing import CheckResult
from hpd.progress import Progress, quiet_libraries
from hpd.teachers.remote.server import ServedTeacher
from hpd.teachers.sources import check_caches, described_by, knows_likeliest
from hpd.training.arguments import DistillConfig, label_policy, train_arguments
from hpd.training.dates import first_day
from hpd.training.hub import Push, push_asked
from hpd.training.metrics import evaluated_names
from hpd.training.preflight import check_best_metric, only_tokenizer
from hpd.training.scheduled import ScheduledTerms
from hpd.training.settings import check_special_tokens
from hpd.training.tracking import check_trackers, described
from hpd.training.verdicts import (
    DescribedModels,
    model_verdicts,
    pair_verdicts,
    row_verdicts,
    teacher_lengths,
)

__all__ = ["Plan", "PlannedEval", "plan", "plan_evals", "steps_of", "task_names"]


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


def task_names(evals: Sequence[PlannedEval]) -> set[str]:
    """Names of the metrics that tasks log while training, without `eval_`."""
    names = set()
    for planned in evals:
        base = planned.label.removesuffix(f"_{planned.task.metric}")
        names |= {planned.label, f"{base}_tokens", f"{base}_truncated"}
    return names


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
    other: TwoTokenizers | None = None
    """The teacher's tokenizer, where it reads its rows in one of its own."""

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


class _Comparison(NamedTuple):
    """The rows as the student reads them, and what the checks found."""

    rows: Rows
    lengths: Lengths
    verdicts: tuple[CheckResult, ...]


def plan(recipe: Recipe, fresh: bool = False) -> Plan:
    """Read configurations, tokenizers and data, and check that they fit together.

    Args:
        recipe: of the run.
        fresh: the run begins again, whatever its folder holds.

    Raises:
        FileNotFoundError, ValueError: with one paragraph that says what was given, what is allowed and what
            to do.
    """
    quiet_libraries()
    # A recipe that was built in Python has not been looked at as a whole.
    check_recipe(recipe)
    defaults = {} if "report_to" in recipe.train else {"report_to": "none"}
    args = train_arguments(recipe, disable_tqdm=True, **defaults)
    check_trackers(args)
    args.described = described(recipe)
    pushed = push_asked(recipe)
    args.push_to_hub = False  # the trainer would push the whole folder, before its card is written
    models = _describe_models(recipe, args, fresh)
    prompts = recipe.choose_regime().needs_prompts_only
    teacher = recipe.teacher
    rows = load_rows(
        _text_column(recipe.data, args),
        teacher.column,
        TeacherContext.of(teacher),
        weight=weight_column(name_terms(recipe.choose_terms())),
        stored=recipe.choose_regime().prefixes.stored,
        prompts=prompts,
    )
    compared = _compare(models, rows, recipe, args)
    return Plan(
        recipe,
        args,
        models.tokenizer,
        models.student_config,
        models.teacher_configs,
        compared.rows,
        compared.lengths,
        compared.verdicts if pushed is None else (*compared.verdicts, _push_verdict(pushed)),
        _check_evals(plan_evals(recipe.eval), recipe, args, models.student_config),
        models.served,
        models.date,
        models.other,
    )


def _describe_models(recipe: Recipe, args: DistillConfig, fresh: bool) -> DescribedModels:
    """Read configurations and tokenizers, and connect to a teacher elsewhere."""
    student_config = load_config(recipe.student, "student")
    tokenizer = load_tokenizer(recipe.student, "student")
    check_special_tokens(args, tokenizer)
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token  # as TRL does
    check_caches(recipe.teacher, tokenizer, args, recipe.choose_terms())
    if args.vocabulary == "bytes" and knows_likeliest(recipe.teacher):
        check_likeliest(recipe.choose_terms())
    served = None
    if recipe.teacher.type == "server":
        asked = load_tokenizer(recipe.teacher, "teacher") if recipe.teacher.tokenizer else None
        own = asked if args.vocabulary == "bytes" else None
        served = _connect(recipe, args, student_config, tokenizer, own)
        asked = asked or served.tokenizer
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
    date, other = set_date(tokenizer, day), None
    if args.vocabulary == "bytes":
        reads = only_tokenizer(tokenizers)
        set_date(reads, day)
        other = two_tokenizers(tokenizer, reads)
    if date is not None and args.chat_template_path is not None:
        args.chat_template_path = None  # the trainer would put the template without its date
    return DescribedModels(tokenizer, student_config, configs, tokenizers, served, date, other)


def _compare(models: DescribedModels, rows: Rows, recipe: Recipe, args: DistillConfig) -> _Comparison:
    """Check the models against each other, and the rows against the student."""
    verdicts = pair_verdicts(models, rows.conversational, args.vocabulary)
    for verdict in verdicts:
        if verdict.level == "error" and verdict.topic.startswith("chat template"):
            raise ValueError(verdict.text)
    rows = _take_templates(rows, models.tokenizer, recipe, args)
    check_ids(rows.train, models.student_config.get_text_config().vocab_size)
    # Packing that splits rows cuts nothing off.
    whole = args.packing and args.packing_strategy != "bfd"
    labels = label_policy(args)
    lengths = measure(
        rows.train, models.tokenizer, None if whole else args.max_length, labels, args.truncation_mode
    )
    lengths = lengths._replace(teacher=teacher_lengths(models, rows, recipe, args))
    found = (
        *verdicts,
        *model_verdicts(models, recipe, args),
        *row_verdicts(models, rows, lengths, recipe, args),
    )
    return _Comparison(rows, lengths, found)


def _text_column(data: DataConfig, args: DistillConfig) -> DataConfig:
    """The data, whose text stands in the column that `train.dataset_text_field` names."""
    if args.dataset_text_field == "text" or "text" in data.columns:
        return data
    return dataclasses.replace(data, columns={**data.columns, "text": args.dataset_text_field})


def _take_templates(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, args: DistillConfig
) -> Rows:
    """The rows, all of which the student's chat template takes; a stream's are looked at as they come."""
    if not rows.conversational:
        return rows
    drawn = isinstance(recipe.data.validation, float)

    def checked(part: Any, name: str) -> Any:
        return check_templates(part, tokenizer, recipe.data.labels, name=name, num_proc=args.dataset_num_proc)

    train = checked(rows.train, "of the training rows" if drawn else "")
    sets = {
        name: checked(part, f"of the validation rows{f' {name}' if name else ''}")
        for name, part in validation_sets(rows.validation).items()
    }
    return rows._replace(train=train, validation=sets.get("", sets or None))


def _connect(
    recipe: Recipe,
    args: DistillConfig,
    student_config: Any,
    student: PreTrainedTokenizerBase,
    own: PreTrainedTokenizerBase | None,
) -> ServedTeacher:
    """The server, which is sent ids of the student's tokenizer, or of the teacher's own."""
    in_bytes, tokenizer = args.vocabulary == "bytes", own or student
    vocab = len(tokenizer) if in_bytes else student_config.get_text_config().vocab_size
    served = ServedTeacher(recipe.teacher, vocab, "student" if own is None else "teacher")
    served.check_terms(recipe.choose_terms())
    served.connect(tokenizer)
    if not in_bytes:  # its own rows are measured in its own tokens
        served.check_rows(args.max_length)
    return served


def _push_verdict(pushed: Push) -> CheckResult:
    text = f"the finished student is pushed to the Hub as {pushed.repo}; before training this is tried"
    return CheckResult("ok", "hub", text)


def _check_evals(
    evals: tuple[PlannedEval, ...], recipe: Recipe, args: DistillConfig, student_config: Any
) -> tuple[PlannedEval, ...]:
    """The tasks; the best model is not chosen by one that is never run in training, or by what is not
    measured."""
    named = (args.metric_for_best_model or "").removeprefix("eval_")
    for planned in evals:
        if planned.label == named and planned.config.every is None:
            raise ValueError(
                f"train.metric_for_best_model names {named}, whose task has no `every`: it is not run in "
                "training."
            )
    if args.save_strategy == SaveStrategy.BEST and args.metric_for_best_model is None:
        raise ValueError(
            "train.save_strategy: best needs train.metric_for_best_model: name a metric of evaluations, such "
            "as forward_kl."
        )
    if args.metric_for_best_model is not None:
        if args.eval_strategy == "no" and not any(planned.config.every for planned in evals):
            raise ValueError(
                "train.metric_for_best_model has no effect where nothing is evaluated during training: give "
                "data.validation and train.eval_strategy: steps, or remove it."
            )
        terms = ScheduledTerms(recipe.choose_terms()).at(0.0)
        vocab = student_config.get_text_config().vocab_size
        found = evaluated_names(terms, vocab, args.kl_estimator)
        if isinstance(recipe.data.validation, Mapping):
            found = {f"{name}_{metric}" for name in recipe.data.validation for metric in found}
        check_best_metric(args, found | task_names(evals))
    return evals


def steps_of(planned: Plan) -> int | None:
    """Optimizer steps that the run will take on one process; None for a stream without max_steps."""
    args = planned.args
    rows = planned.rows.train
    if args.max_steps > 0:
        return args.max_steps
    if not hasattr(rows, "__len__"):
        return None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return math.ceil(len(rows) / batch * args.num_train_epochs)  # type: ignore[arg-type]
