"""Rows of a teacher with another tokenizer, beside the student's: the same text in chunks of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpd.batch import IGNORE_INDEX, TEACHER_CHUNKS, TEACHER_PREFIXES
from hpd.data.alignment import Chunks, align
from hpd.data.rendering import render
from hpd.data.teacher_prompts import TEACHER_PROMPT
from hpd.models.token_bytes import TokenBytes, token_bytes

__all__ = ["ByteRow", "TwoTokenizers", "byte_row", "two_tokenizers"]


class TwoTokenizers(NamedTuple):
    """The teacher's tokenizer, and the bytes of the tokens of both."""

    tokenizer: Any
    student: TokenBytes
    teacher: TokenBytes


class ByteRow(NamedTuple):
    """A row as both models read it."""

    ids: list[int]
    """The student's tokens, before train.max_length."""
    labels: list[int]
    """The same where they are learned: those of aligned chunks."""
    prefix: list[int]
    """What the teacher reads before the answer."""
    start: int
    """The student's first token of the answer."""
    teacher_ids: list[int]
    """The teacher's tokens of the answer."""
    chunks: Chunks
    """Of the answer, up to its end."""

    def columns(self) -> dict[str, list[Any]]:
        """The prepared row: what the teacher reads stands at the student's tokens, so that cuts and packing
        move it as they move labels."""
        prefixes: list[list[int]] = [[] for _ in self.ids]
        chunks: list[list[int]] = [[] for _ in self.ids]
        prefixes[self.start : self.start + 1] = [self.prefix]
        begin = 0
        for last, end in zip(self.chunks.student.tolist(), self.chunks.teacher.tolist(), strict=True):
            chunks[self.start + last - 1] = self.teacher_ids[begin:end]
            begin = end
        return {
            "input_ids": self.ids,
            "labels": self.labels,
            TEACHER_PREFIXES: prefixes,
            TEACHER_CHUNKS: chunks,
        }


def two_tokenizers(student: Any, teacher: Any) -> TwoTokenizers:
    """Read the bytes of both.

    Raises:
        ValueError: as `token_bytes`.
    """
    return TwoTokenizers(teacher, token_bytes(student, "student"), token_bytes(teacher, "teacher"))


def byte_row(
    row: Mapping[str, Any], tokenizer: Any, other: TwoTokenizers, labels: str, index: int
) -> ByteRow:
    """A row in both tokenizers, each with its own template, begin and end.

    Args:
        row: a prompt and its completion; the teacher's own prompt, if it has one, in `teacher_prompt`.
        tokenizer: the student's.
        other: the teacher's.
        labels: as `render` takes them.
        index: the row's number, for errors.

    Raises:
        ValueError: the row is no prompt with one answer, or nothing stands before the answer for the teacher.
    """
    if labels == "all" or row.get("prompt") is None or not row.get("completion"):
        raise ValueError(
            f"Row {index} is not a prompt and its completion, the latter learned, which two tokenizers "
            "need (train.vocabulary: bytes): set data.labels: last_turn for conversations, completion for "
            "text, or map the columns prompt and completion."
        )
    own = row.get(TEACHER_PROMPT)
    student = render(row, tokenizer, labels)
    teacher = render({**row, "prompt": row["prompt"] if own is None else own}, other.tokenizer, labels)
    start, stop = _answer(student.mask, index)
    begin, end = _answer(teacher.mask, index)
    if begin == 0:
        raise ValueError(
            f"Row {index}: the teacher's tokenizer gives the prompt no token, so nothing stands before the "
            "answer's first: give the row a prompt, or teacher.prompt some text."
        )
    answers = other.student.answer(student.ids[start:stop]), other.teacher.answer(teacher.ids[begin:end])
    found = align(*answers)
    learned = np.zeros(len(student.ids), dtype=bool)
    counts, _ = found.tokens
    learned[start : start + int(found.student[-1])] = np.repeat(found.aligned, counts)
    return ByteRow(
        student.ids,
        [token if bit else IGNORE_INDEX for token, bit in zip(student.ids, learned, strict=True)],
        teacher.ids[:begin],
        start,
        teacher.ids[begin : begin + int(found.teacher[-1])],
        found,
    )


def _answer(mask: Sequence[bool], index: int) -> tuple[int, int]:
    """The first label and the place behind the last."""
    places = np.flatnonzero(mask)
    if not len(places) or int(places[-1]) - int(places[0]) + 1 != len(places):
        raise ValueError(
            f"Row {index} has {'several answers' if len(places) else 'no answer'}, and two tokenizers are "
            "compared on one (train.vocabulary: bytes): set data.labels: last_turn, or split the "
            "conversation."
        )
    return int(places[0]), int(places[-1]) + 1
