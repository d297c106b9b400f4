"""A collated batch taken apart into its rows, some of which the student then writes itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from hpd.batch import IGNORE_INDEX, OF_TEACHER, TEACHER_CHUNKS, TEACHER_PREFIXES

__all__ = ["TrainingRow", "rows_of"]


class TrainingRow(NamedTuple):
    """A row of the dataset as training sees it: tokenized, cut, labeled."""

    input_ids: list[int]
    labels: list[int]
    teacher_prefix: list[int] | None = None
    """Tokens that the teacher reads instead of those before the answer; None: the same ones."""
    teacher_chunks: list[list[int]] | None = None
    """With two tokenizers, for each token the teacher's tokens of the chunk that ends with it."""
    begin: int | None = None
    """With two tokenizers, the answer's first token, which need not be a label."""

    @property
    def first_label(self) -> int:
        """Its place; without a label, the place behind the row."""
        places = (i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)
        return next(places, len(self.labels))

    @property
    def answer(self) -> int:
        """The place of the answer's first token, before which the teacher reads `teacher_prefix`."""
        return self.first_label if self.begin is None else self.begin

    def teacher_columns(self) -> dict[str, list[Any]]:
        """What the collator makes the teacher's own row of; nothing where it reads the student's."""
        if self.teacher_prefix is None:
            return {}
        answer, prefix = self.answer, self.teacher_prefix
        out = {TEACHER_PREFIXES: [prefix if i == answer else [] for i in range(len(self.input_ids))]}
        return out if self.teacher_chunks is None else {**out, TEACHER_CHUNKS: self.teacher_chunks}


def rows_of(inputs: Mapping[str, Any]) -> list[TrainingRow]:
    """Take a collated batch apart again: padded, padding-free or packed (where filling tokens are left
    out)."""
    sides: list[list[Any]] = [_by_row(inputs, name) for name in ("input_ids", "labels")]
    own = {k.removeprefix(OF_TEACHER): value for k, value in inputs.items() if k.startswith(OF_TEACHER)}
    in_chunks = "label_chunk_of_token" in inputs
    if own:
        sides.append(_by_row(own, "input_ids"))
    if in_chunks:
        sides.append(_by_row(inputs, "label_chunk_of_token"))
        sides.append(_by_row({**own, "chunks": inputs["label_teacher_chunk_of_token"]}, "chunks"))
    rows = []
    # Filling tokens behind the last row are rows of one token, which the two sides need not have as many of.
    for ids, labels, *of_teacher in zip(*sides, strict=False):
        if "attention_mask" not in inputs and len(ids) < 2:
            continue
        row = TrainingRow(ids, labels)
        if in_chunks:
            row = _in_chunks(row, *of_teacher)
        elif own:
            behind = len(ids) - row.first_label
            read = of_teacher[0]
            row = row._replace(teacher_prefix=read[: len(read) - behind] if behind else [])
        rows.append(row)
    return rows


def _in_chunks(
    row: TrainingRow, read: list[int], chunks: list[int], teacher_chunks: list[int]
) -> TrainingRow:
    """A row of two tokenizers; one that was cut before its first chunk's end has no answer to begin."""
    ends: list[list[int]] = [[] for _ in row.input_ids]
    last = {number: place for place, number in enumerate(chunks) if number}
    for token, number in zip(read, teacher_chunks, strict=True):
        if number:
            ends[last[number]].append(token)
    begin = next((place for place, number in enumerate(chunks) if number), len(chunks))
    before = next((place for place, number in enumerate(teacher_chunks) if number), len(read))
    return row._replace(teacher_prefix=read[:before], teacher_chunks=ends, begin=begin)


def _by_row(inputs: Mapping[str, Tensor], name: str) -> list[list[int]]:
    """The values of each row, without padding."""
    lines: list[list[int]] = inputs[name].tolist()
    if "attention_mask" in inputs:
        masks = inputs["attention_mask"].tolist()
        return [list(itertools.compress(*pair)) for pair in zip(lines, masks, strict=True)]
    rows = []
    for line, positions in zip(lines, inputs["position_ids"].tolist(), strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(line)]
        rows += [line[a:b] for a, b in itertools.pairwise(starts)]
    return rows
