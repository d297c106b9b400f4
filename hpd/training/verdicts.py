"""What the checks of a plan find: models beside each other, rows beside their rendering and the models."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hpd.config.schema import Recipe
from hpd.data.byte_rows import TwoTokenizers, byte_lengths, check_byte_rows
from hpd.data.context import check_context, context_of
from hpd.data.formats import FORMATS, RowFormat
from hpd.data.lengths import MEASURED_ROWS, Lengths, TeacherLengths, greatest_id
from hpd.data.reading import first_rows
from hpd.data.rendered import compare_rows
from hpd.data.rows import Rows, validation_sets
from hpd.data.teacher_rows import check_teacher_rows, own_lengths
from hpd.models.ends import end_tokens
from hpd.models.load import load_generation_config
from hpd.models.pairing import CheckResult, check_pair
from hpd.models.probe import check_savable
from hpd.teachers.cache import read_about
from hpd.teachers.remote.server import ServedTeacher
from hpd.training.adapting import adapter_verdicts, quantization_verdicts
from hpd.training.arguments import DistillConfig, label_policy
from hpd.training.precision import precision_verdicts
from hpd.training.probing import beyond_embeddings, packing_verdicts

__all__ = ["DescribedModels", "model_verdicts", "pair_verdicts", "row_verdicts"]


class DescribedModels(NamedTuple):
    """The models of a run, described without their weights."""

    tokenizer: PreTrainedTokenizerBase
    student_config: Any
    teacher_configs: Mapping[str, Any]
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase | None]
    """None: a server that does not tell its tokenizer."""
    served: ServedTeacher | None
    date: datetime.date | None
    other: TwoTokenizers | None = None
    """With train.vocabulary: bytes, the teacher's tokenizer and the bytes of both."""


def pair_verdicts(models: DescribedModels, conversational: bool, policy: str) -> list[CheckResult]:
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


def model_verdicts(models: DescribedModels, recipe: Recipe, args: DistillConfig) -> list[CheckResult]:
    """How the student is taken, and whether it can be saved and read packed rows."""
    generation = load_generation_config(recipe.student)
    return [
        *adapter_verdicts(recipe, models.student_config),
        *quantization_verdicts(recipe, models.student_config, args),
        *check_savable(models.student_config, generation, models.tokenizer),
        *packing_verdicts(args),
        *precision_verdicts(args),
        *_padding_verdicts(models, args),
    ]


def _padding_verdicts(models: DescribedModels, args: DistillConfig) -> list[CheckResult]:
    """A pad token that was added to the tokenizer and not to the models, which read it beside short rows."""
    if args.padding_free or (args.packing and args.packing_strategy != "wrapped"):
        return []
    tokenizer = models.tokenizer
    pad = tokenizer.convert_tokens_to_ids(args.pad_token) if args.pad_token else tokenizer.pad_token_id
    configs = {"student": models.student_config, **({} if models.other else models.teacher_configs)}
    return [
        CheckResult(
            "error",
            "padding",
            f"the pad token {tokenizer.convert_ids_to_tokens(pad)!r} has number {pad}, and the {role}'s "
            f"embeddings have {config.get_text_config().vocab_size} rows: set train.pad_token to one of "
            "theirs (the end token will do), or pad_token in tokenizer_config.json.",
        )
        for role, config in configs.items()
        if isinstance(pad, int) and pad >= config.get_text_config().vocab_size
    ][:1]


def row_verdicts(
    models: DescribedModels, rows: Rows, lengths: Lengths, recipe: Recipe, args: DistillConfig
) -> list[CheckResult]:
    """The rows' columns and lengths, and the rows beside their rendering and what the models read."""
    tokenizer, labels = models.tokenizer, label_policy(args)
    first = first_rows(rows.train, MEASURED_ROWS)
    ends = end_tokens(recipe.student, models.student_config)
    if args.eos_token is not None and ends:
        # TRL adds it to the generation configuration.
        ends |= frozenset([tokenizer.get_vocab()[args.eos_token]])
    looked_at = rows.train if isinstance(rows.train, Sized) else first
    own = recipe.teacher.reads_own_rows or models.other is not None
    configs = {"student": models.student_config, **({} if own else models.teacher_configs)}
    return [
        *_column_verdicts(rows),
        *_writer_verdicts(rows, recipe),
        *_length_verdicts(lengths, args),
        *_added_tokens(models, rows, labels),
        *compare_rows(first, tokenizer, labels, ends),
        *check_context(looked_at, tokenizer, labels, args.max_length, configs),
        *(_own_rows(models, rows, recipe, args) if own else ()),
    ]


def teacher_lengths(
    models: DescribedModels, rows: Rows, recipe: Recipe, args: DistillConfig
) -> TeacherLengths | None:
    """Tokens of the first rows as the teacher reads them; None where it reads the student's."""
    given = rows.train, models.tokenizer
    regime = recipe.choose_regime()
    new_tokens = regime.rollouts.max_new_tokens if regime.prefixes.on_policy else 0
    if models.other is not None:
        return byte_lengths(*given, models.other, label_policy(args), args.max_length, new_tokens)
    if not recipe.teacher.reads_own_rows:
        return None
    return own_lengths(*given, label_policy(args), args.max_length, new_tokens)


def _own_rows(models: DescribedModels, rows: Rows, recipe: Recipe, args: DistillConfig) -> list[CheckResult]:
    """Look at the rows of a teacher that has a prompt or a tokenizer of its own."""
    regime = recipe.choose_regime()
    limits: dict[str, int | None] = {
        role: context_of(config) for role, config in models.teacher_configs.items()
    }
    if models.served is not None:
        longest = models.served.max_row_tokens
        limits = {role: min(limit or longest, longest) for role, limit in limits.items()}
    new_tokens = regime.rollouts.max_new_tokens if regime.prefixes.on_policy else 0

    def look_at(part: Any, new_tokens: int) -> list[CheckResult]:
        if models.other is not None:
            return check_byte_rows(
                part,
                models.tokenizer,
                models.other,
                label_policy(args),
                args.max_length,
                limits,
                new_tokens,
                args.dataset_num_proc,
            )
        return check_teacher_rows(
            part,
            models.tokenizer,
            label_policy(args),
            args.max_length,
            limits,
            new_tokens,
            args.dataset_num_proc,
        )

    found = look_at(rows.train, new_tokens)
    for part in validation_sets(rows.validation).values():
        found += [verdict for verdict in look_at(part, 0) if verdict.topic == "context"]
    return found


def _column_verdicts(rows: Rows) -> list[CheckResult]:
    """How several datasets are mixed, and their columns that are not read, by name."""
    mixture = [] if rows.mixture is None else [CheckResult("ok", "mixture", rows.mixture)]
    found = (verdict for layout in rows.layouts for verdict in _unread_columns(layout))
    return [*mixture, *dict.fromkeys(found)]


def _writer_verdicts(rows: Rows, recipe: Recipe) -> list[CheckResult]:
    """Whether the rows that a model wrote are the teacher's; rollouts that are stored are the student's."""
    teacher, regime = recipe.teacher, recipe.choose_regime()
    writers = dict.fromkeys(name for layout in rows.layouts for name in layout.writers)
    name = read_about(str(teacher.path))["fingerprint"]["name"] if teacher.type == "cached" else teacher.model
    others = [writer for writer in writers if Path(writer).name != Path(str(name)).name]
    if not others or name is None or regime.prefixes.stored or regime.needs_prompts_only:
        return []
    text = (
        f"rows were written by {' and '.join(others)} (column model), and the teacher is {name}: labels are "
        "of one model and probabilities of another. Where the student is to be trained on its own text "
        "afterwards, take the same teacher for both."
    )
    return [CheckResult("warning", "writer", text)]


def _unread_columns(layout: RowFormat) -> list[CheckResult]:
    verdicts = []
    if layout.beside:
        names = " and ".join(layout.source[part] for part in FORMATS[layout.kind])
        text = (
            f"rows are read from {names}; {', '.join(layout.beside)} may hold another form of them, and has "
            "no effect: if that is what should be learned, map it in data.columns"
        )
        verdicts.append(CheckResult("warning", "columns", text))
    if layout.unread:
        verdicts.append(CheckResult("ok", "columns", f"not read: {', '.join(layout.unread)}"))
    return verdicts


def _added_tokens(models: DescribedModels, rows: Rows, labels: str) -> list[CheckResult]:
    """Look in the first rows for tokens that were added to the tokenizer and not to a model."""
    configs = {"student": models.student_config, **({} if models.other else models.teacher_configs)}
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
