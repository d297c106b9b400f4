"""Rows that the teacher reads behind a prompt of its own, beside the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from hpd.batch import TEACHER_PREFIXES
from hpd.data.lengths import MEASURED_ROWS, TeacherLengths
from hpd.data.reading import first_rows
from hpd.data.rendering import render
from hpd.data.teacher_prompts import TEACHER_PROMPT
from hpd.models.pairing import CheckResult

__all__ = [
    "TeacherPrefix",
    "check_prefixes",
    "check_teacher_rows",
    "own_lengths",
    "prefixes_of",
    "teacher_prefix",
]

_SHOWN_TOKENS = 4


class TeacherPrefix(NamedTuple):
    """The prompt of a row as the teacher reads it, and where the answer begins for the student."""

    ids: list[int]
    start: int
    """The student's first label, before which the teacher reads `ids` and nothing else."""


def teacher_prefix(row: Mapping[str, Any], tokenizer: Any, labels: str, index: int) -> TeacherPrefix:
    """The teacher's prompt of a row, whose answer has the same tokens behind it as behind the student's.

    Args:
        row: prompt and completion, with the teacher's prompt in `teacher_prompt`; null: the student's.
        tokenizer: the one of both models.
        labels: as `render` takes them.
        index: the row's number, for errors.

    Raises:
        ValueError: the row has no prompt, its own or the teacher's has no token, or tokens merge where
            prompt and answer meet.
    """
    prompt, own = row.get("prompt"), row.get(TEACHER_PROMPT)
    if labels == "all":
        raise ValueError(
            f"Every token of a row is learned (data.labels: all), and a {TEACHER_PROMPT} gives the teacher "
            "another prompt: learn completions only (data.labels: completion)."
        )
    if prompt is None or (own is not None and isinstance(own, list) != isinstance(prompt, list)):
        raise ValueError(
            f"Row {index} has a {TEACHER_PROMPT} and no prompt of that form with it: both are texts, or "
            "both are messages, in front of a completion."
        )
    student = render(row, tokenizer, labels)
    teacher = student if own is None else render({**row, "prompt": own}, tokenizer, labels)
    start, behind = _first(student.mask), _first(teacher.mask)
    if behind == 0:
        raise ValueError(
            f"Row {index}: the teacher's prompt has no token, so nothing stands before the answer's first: "
            "give teacher.prompt some text."
        )
    if student.ids[start:] != teacher.ids[behind:] or student.mask[start:] != teacher.mask[behind:]:
        shown = [tokenizer.decode(ids[:_SHOWN_TOKENS]) for ids in (student.ids[start:], teacher.ids[behind:])]
        raise ValueError(
            f"Row {index}: the answer has other tokens behind the teacher's prompt than behind the "
            f"student's (it begins {shown[1]!r} and {shown[0]!r}), since tokens merge where prompt and "
            "answer meet. Let "
            "teacher.prompt end as the student's prompt does, at the end of a token."
        )
    return TeacherPrefix(teacher.ids[:behind], start)


def prefixes_of(prefix: TeacherPrefix, num_tokens: int) -> list[list[int]]:
    """The column `hpd.batch.TEACHER_PREFIXES` of a row, which survives cuts and packing as a label does."""
    return [prefix.ids if place == prefix.start else [] for place in range(num_tokens)]


def check_prefixes(rows: Any, truncation_mode: str) -> None:
    """Refuse prepared rows with prompts of the teacher's own that training would cut, or that have no effect.

    Args:
        rows: with the column `hpd.batch.TEACHER_PREFIXES`; a stream's are not read.
        truncation_mode: as `train.truncation_mode`.

    Raises:
        ValueError: rows are cut in front, or the teacher reads what the student does.
    """
    if truncation_mode == "keep_end":
        raise ValueError(
            "train.truncation_mode: keep_end cuts prompts, and in rows of its own the teacher's answer "
            "would begin elsewhere than the student's: set keep_start, and train.max_length as long "
            "as the "
            "rows."
        )
    if isinstance(rows, Dataset) and len(rows) and not any(map(_differs, rows)):
        raise ValueError(
            f"The column {TEACHER_PROMPT} leaves every row as the student reads it, so it has no effect: "
            "let the teacher's prompts say something more, or remove the column."
        )


def _differs(row: Any) -> bool:
    start = next((place for place, prefix in enumerate(row[TEACHER_PREFIXES]) if prefix), 0)
    return list(row[TEACHER_PREFIXES][start]) != list(row["input_ids"][:start])


def check_teacher_rows(
    rows: Any,
    tokenizer: Any,
    labels: str,
    max_length: int | None,
    limits: Mapping[str, int | None],
    new_tokens: int = 0,
    num_proc: int | None = None,
) -> list[CheckResult]:
    """Prepare the teacher's rows as training will, to refuse prompts without effect or beyond its context.

    Args:
        rows: with a teacher's prompt; of a stream, the first ones are looked at.
        tokenizer, labels: as `teacher_prefix` takes them.
        max_length: tokens that the student's row keeps; None: all.
        limits: tokens that each teacher reads, by its role in messages; None: not known.
        new_tokens: that the student may write behind a prompt.
        num_proc: processes, as `train.dataset_num_proc` says.

    Raises:
        ValueError: as `teacher_prefix`.
    """
    given = {
        "tokenizer": tokenizer, "labels": labels, "max_length": max_length, "new_tokens": new_tokens,
    }  # fmt: skip
    if isinstance(rows, Dataset):
        measured = rows.map(
            _measured, with_indices=True, fn_kwargs=given, remove_columns=rows.column_names, num_proc=num_proc
        )
        lengths, differs = measured["teacher_tokens"], measured["differs"]
    else:
        found = [_measured(row, index, **given) for index, row in enumerate(first_rows(rows, MEASURED_ROWS))]
        lengths, differs = ([one[name] for one in found] for name in ("teacher_tokens", "differs"))
    changed = sum(differs)
    if not changed:
        text = (
            "teacher.prompt and teacher.system_prompt leave every row as the student reads it, so they "
            "have no effect: let them say something more, or remove them."
        )
        return [CheckResult("error", "teacher's rows", text)]
    text = (
        f"{changed:,} of {len(lengths):,} rows have a prompt of the teacher's own; its longest row has "
        f"{max(lengths):,} tokens"
    )
    return [CheckResult("ok", "teacher's rows", text), *_beyond(lengths, limits)]


def own_lengths(
    rows: Any, tokenizer: Any, labels: str, max_length: int | None, new_tokens: int = 0
) -> TeacherLengths:
    """Tokens of the first rows as the teacher reads them.

    Args:
        rows, tokenizer, labels, max_length, new_tokens: as `check_teacher_rows` takes them.
    """
    return TeacherLengths.of(
        rows, lambda row, index: _measured(row, index, tokenizer, labels, max_length, new_tokens)
    )


def _measured(
    row: Mapping[str, Any], index: int, tokenizer: Any, labels: str, max_length: int | None, new_tokens: int
) -> dict[str, Any]:
    prefix = teacher_prefix(row, tokenizer, labels, index)
    ids = render(row, tokenizer, labels).ids
    answer = max(len(ids) - prefix.start, new_tokens)
    if max_length is not None:
        answer = min(answer, max(max_length - prefix.start, 0))
    return {
        "teacher_tokens": len(prefix.ids) + answer,
        "teacher_labels": answer,
        "differs": prefix.ids != ids[: prefix.start],
    }


def _beyond(lengths: list[int], limits: Mapping[str, int | None]) -> list[CheckResult]:
    return [
        CheckResult(
            "error",
            "context",
            f"{sum(length > context for length in lengths):,} rows of the {role} are longer than it reads, "
            f"with its own prompt (up to {max(lengths)} tokens, its context has {context}): shorten "
            "teacher.prompt, "
            "or set train.max_length lower, which shortens answers.",
        )
        for role, context in limits.items()
        if context is not None and max(lengths) > context
    ]


def _first(mask: list[bool]) -> int:
    return next((place for place, bit in enumerate(mask) if bit), len(mask))
