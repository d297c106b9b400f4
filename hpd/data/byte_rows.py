"""Rows of a teacher with another tokenizer, beside the student's: the same text in chunks of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from hpd.batch import IGNORE_INDEX, TEACHER_CHUNKS, TEACHER_PREFIXES
from hpd.data.alignment import Chunks, align
from hpd.data.lengths import MEASURED_ROWS, TeacherLengths
from hpd.data.reading import first_rows
from hpd.data.rendering import Rendering, render
from hpd.data.teacher_prompts import TEACHER_PROMPT
from hpd.losses.byte_events import ByteEvents, VocabularyBytes, byte_events
from hpd.models.pairing import CheckResult
from hpd.models.token_bytes import TokenBytes, token_bytes

__all__ = [
    "ByteRow",
    "TwoTokenizers",
    "byte_lengths",
    "byte_row",
    "check_byte_rows",
    "row_in_chunks",
    "two_tokenizers",
]

# Above this share of bytes that differ, the two do not read the same text.
_MOST_UNALIGNED = 0.1


class TwoTokenizers(NamedTuple):
    """The teacher's tokenizer, and the bytes of the tokens of both."""

    tokenizer: Any
    student: TokenBytes
    teacher: TokenBytes

    def events(self, student_vocab: int, teacher_vocab: int) -> ByteEvents:
        """The events of bytes of both heads.

        Args:
            student_vocab, teacher_vocab: tokens of each head, which may have more rows than its tokenizer.
        """
        sides = (self.student, student_vocab), (self.teacher, teacher_vocab)
        return byte_events(
            *(VocabularyBytes(side.texts(), side.ends, side.special, size) for side, size in sides)
        )


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
    row: Mapping[str, Any],
    tokenizer: Any,
    other: TwoTokenizers,
    labels: str,
    index: int,
    writes: bool = False,
) -> ByteRow:
    """A row in both tokenizers, each with its own template, begin and end.

    Args:
        row: a prompt and its completion; the teacher's own prompt, if it has one, in `teacher_prompt`.
        tokenizer: the student's.
        other: the teacher's.
        labels: as `render` takes them.
        index: the row's number, for errors.
        writes: the student writes answers to the prompt, which then may stand alone.

    Raises:
        ValueError: the row is no prompt with one answer, or nothing stands before the answer for the teacher;
            or the student's answers would begin elsewhere for the teacher.
    """
    unanswered = writes and row.get("completion") is None
    if labels == "all" or row.get("prompt") is None or not (row.get("completion") or unanswered):
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
    if writes:
        _check_seam(student, teacher, other, index)
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


def _check_seam(student: Rendering, teacher: Rendering, other: TwoTokenizers, index: int) -> None:
    """Refuse a prompt whose last bytes one side alone reads as the answer's first, since tokens merge."""
    sides = (student, other.student), (teacher, other.teacher)
    lost = [table.of(rendered.lost_prompt_ids)[0].astype(np.uint8).tobytes() for rendered, table in sides]
    if lost[0] != lost[1]:
        shown = [text.decode(errors="backslashreplace") for text in lost]
        raise ValueError(
            f"Row {index}: tokens merge where prompt and answer meet, so that {shown[0]!r} of the prompt's "
            f"end is read with the answer by the student, and {shown[1]!r} by the teacher: an answer that "
            "the student writes would begin elsewhere for the teacher. Let prompts end at the end of a token "
            "of both (move a space or a line's end to the answer)."
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


def check_byte_rows(
    rows: Any,
    tokenizer: Any,
    other: TwoTokenizers,
    labels: str,
    max_length: int | None,
    limits: Mapping[str, int | None],
    new_tokens: int = 0,
    num_proc: int | None = None,
) -> list[CheckResult]:
    """Prepare the rows in both tokenizers as training will, and say how far they are the same text.

    Args:
        rows: of training; of a stream, the first ones are looked at.
        tokenizer, other, labels: as `byte_row` takes them.
        max_length: tokens that the student's row keeps; None: all.
        limits: tokens that each teacher reads, by its role in messages; None: not known.
        new_tokens: that the student may write behind a prompt; 0: it writes nothing.
        num_proc: processes, as `train.dataset_num_proc` says.

    Raises:
        ValueError: as `byte_row`.
    """
    given = {
        "tokenizer": tokenizer, "other": other, "labels": labels, "max_length": max_length,
        "new_tokens": new_tokens,
    }  # fmt: skip
    if isinstance(rows, Dataset):
        measured = rows.map(
            _measured, with_indices=True, fn_kwargs=given, remove_columns=rows.column_names, num_proc=num_proc
        )
        found: dict[str, Any] = {name: measured[name][:] for name in measured.column_names}
    else:
        each = [_measured(row, index, **given) for index, row in enumerate(first_rows(rows, MEASURED_ROWS))]
        found = {name: [one[name] for one in each] for name in each[0]}
    total = {name: int(np.sum(values)) for name, values in found.items()}
    lost, unaligned = int(np.count_nonzero(found["unaligned"])), total["unaligned"] / max(total["bytes"], 1)
    text = (
        f"{total['alone'] / max(total['chunks'], 1):.0%} of the chunks are one token of either side, the "
        f"longest has {max(found['longest'])} tokens; {total['ended'] / len(found['ended']):.0%} of the rows "
        "end with both models' end; draws whose sign is not certain are counted in training "
        "(draws_undecided)"
    )
    verdicts = [CheckResult("ok", "two tokenizers", text)]
    if lost:
        text = (
            f"{total['unaligned']:,} bytes of {lost:,} rows ({unaligned:.2%} of all) are not the same for "
            "both tokenizers, and are not learned"
        )
        level = "warning" if unaligned <= _MOST_UNALIGNED else "error"
        verdicts.append(CheckResult(level, "two tokenizers", text))
    for role, limit in limits.items():
        if limit is not None and (longest := max(found["teacher_tokens"])) > limit:
            text = (
                f"{sum(size > limit for size in found['teacher_tokens']):,} rows are longer in the {role}'s "
                f"tokens than it reads (up to {longest}, its context has {limit}): set train.max_length "
                "lower."
            )
            verdicts.append(CheckResult("error", "context", text))
    return verdicts


def _measured(
    row: Mapping[str, Any],
    index: int,
    tokenizer: Any,
    other: TwoTokenizers,
    labels: str,
    max_length: int | None,
    new_tokens: int,
) -> dict[str, int]:
    found = byte_row(row, tokenizer, other, labels, index, writes=new_tokens > 0)
    sizes, teacher_sizes = found.chunks.tokens
    kept = len(sizes)
    if max_length is not None:
        kept = int(np.searchsorted(found.chunks.student, max_length - found.start, side="right"))
    read = int(found.chunks.teacher[kept - 1]) if kept else 0
    stop = found.start + int(found.chunks.student[-1])
    learned = int(teacher_sizes[:kept][found.chunks.aligned[:kept]].sum())
    if new_tokens:
        room = new_tokens if max_length is None else min(new_tokens, max(max_length - found.start, 0))
        # As many of the teacher's for each of the student's as in the dataset's answer.
        written = math.ceil(room * len(found.teacher_ids) / (stop - found.start))
        read, learned = max(read, written), max(learned, written)
    return {
        "chunks": len(sizes),
        "alone": int(((sizes == 1) & (teacher_sizes == 1)).sum()),
        "longest": int(max(sizes.max(), teacher_sizes.max())),
        "bytes": len(other.student.of(found.ids[found.start : stop])[0]),
        "unaligned": found.chunks.unaligned_bytes,
        "ended": int(
            found.ids[stop - 1] in other.student.ends and found.teacher_ids[-1] in other.teacher.ends
        ),
        "teacher_tokens": len(found.prefix) + read,
        "teacher_labels": learned,
    }


def byte_lengths(
    rows: Any,
    tokenizer: Any,
    other: TwoTokenizers,
    labels: str,
    max_length: int | None,
    new_tokens: int = 0,
) -> TeacherLengths:
    """Tokens of the first rows as the teacher reads them.

    Args:
        rows, tokenizer, other, labels, max_length, new_tokens: as `check_byte_rows` takes them.
    """
    return TeacherLengths.of(
        rows, lambda row, index: _measured(row, index, tokenizer, other, labels, max_length, new_tokens)
    )


def row_in_chunks(
    rows: Any, tokenizer: Any, other: TwoTokenizers, labels: str
) -> list[tuple[list[str], list[str], bool]]:
    """The first row's answer, chunk by chunk: the student's tokens, the teacher's, and whether they align."""
    row = next(iter(first_rows(rows, 1)))
    found = byte_row(row, tokenizer, other, labels, 0, writes=row.get("completion") is None)
    out, texts = [], (other.student.texts(), other.teacher.texts())
    begin, other_begin = 0, 0
    for end, other_end, aligned in zip(*found.chunks[:3], strict=True):
        answer = found.ids[found.start + begin : found.start + int(end)]
        sides = answer, found.teacher_ids[other_begin : int(other_end)]
        mine, theirs = (
            [text[token].decode(errors="backslashreplace") for token in tokens]
            for text, tokens in zip(texts, sides, strict=True)
        )
        out.append((mine, theirs, bool(aligned)))
        begin, other_begin = int(end), int(other_end)
    return out
