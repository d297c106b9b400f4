"""Rows of every format of docs/reference/data-formats.md as token ids and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from hpd.batch import IGNORE_INDEX, TEACHER_PREFIXES
from hpd.data.byte_rows import TwoTokenizers, byte_row
from hpd.data.convert import convert
from hpd.data.formats import RowFormat
from hpd.data.rendering import tokenize
from hpd.data.teacher_prompts import TEACHER_PROMPT
from hpd.data.teacher_rows import prefixes_of, teacher_prefix

__all__ = ["label_rows"]


def label_rows(
    rows: Dataset | IterableDataset,
    layout: RowFormat,
    tokenizer: Any,
    labels: str,
    *,
    prompts: bool = False,
    num_proc: int | None = None,
    other: TwoTokenizers | None = None,
    writes: bool = False,
) -> Any:
    """Rows with `input_ids` and `labels`, uncut; with `teacher_prefixes` where they have a `teacher_prompt`,
    and with `teacher_chunks` too where the teacher has another tokenizer.

    Args:
        rows: of any format.
        layout: which one.
        tokenizer: the student's.
        labels: as `tokenize` takes them.
        prompts: prompts without completions are enough.
        num_proc: processes, as `train.dataset_num_proc` says.
        other: the teacher's tokenizer; None: it has the student's.
        writes: the student writes answers to these prompts.

    Raises:
        ValueError: a row that cannot be learned from.
    """
    given = {
        "layout": layout, "tokenizer": tokenizer, "labels": labels, "prompts": prompts, "other": other,
        "writes": writes,
    }  # fmt: skip
    options: Any = {} if isinstance(rows, IterableDataset) else {"num_proc": num_proc}
    return rows.map(_labeled, with_indices=True, fn_kwargs=given, **options)


def _labeled(
    row: Mapping[str, Any],
    index: int,
    layout: RowFormat,
    tokenizer: Any,
    labels: str,
    prompts: bool,
    other: TwoTokenizers | None,
    writes: bool,
) -> dict[str, list[Any]]:
    converted = convert(row, index, layout, labels, prompts=prompts)
    if other is not None:
        own = {**converted, TEACHER_PROMPT: row.get(TEACHER_PROMPT)}
        return byte_row(own, tokenizer, other, labels, index, writes).columns()
    if "input_ids" in converted and TEACHER_PROMPT not in row:
        return {name: converted[name] for name in ("input_ids", "labels")}
    ids, mask = tokenize(converted, tokenizer, labels)
    out: dict[str, list[Any]] = {
        "input_ids": ids,
        "labels": [token if bit else IGNORE_INDEX for token, bit in zip(ids, mask, strict=True)],
    }
    if TEACHER_PROMPT in row:
        own = {**converted, TEACHER_PROMPT: row[TEACHER_PROMPT]}
        out[TEACHER_PREFIXES] = prefixes_of(teacher_prefix(own, tokenizer, labels, index), len(ids))
    return out
