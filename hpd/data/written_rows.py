"""What the student wrote, as a teacher with another tokenizer reads it: the same bytes behind its prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpd.data.alignment import Chunks, align
from hpd.data.byte_rows import TwoTokenizers
from hpd.models.token_bytes import END

__all__ = ["AnswerReader", "ReadAnswer"]

# Bytes that are no UTF-8, as Python's surrogateescape shows them.
_NO_TEXT = re.compile("([\udc80-\udcff])")
# A line's end: what comes behind it is the beginning of nothing, for tokenizers that put a space there.
_BEFORE = "\n"
# Chunks that a word reaches back, at most, in which the student was cut.
_LAST_WORD = 4


class ReadAnswer(NamedTuple):
    """An answer of the student's in the teacher's tokens."""

    chunks: list[list[int]]
    """For each of the student's tokens, the teacher's tokens of the chunk that ends with it."""
    learned: list[bool]
    """True for the student's tokens in chunks that can be learned."""


class _Written(NamedTuple):
    """What the teacher is to read of the student's tokens."""

    ids: list[int]
    """The student's tokens up to where the teacher's text ends, without the answer's end."""
    parts: list[bytes | int]
    """Text, and special tokens of the teacher's that have the student's names."""
    ended: bool
    """The token behind `ids` ends the answer."""
    cut: bool
    """The student was stopped in the middle."""


class AnswerReader:
    """Reads what the student writes.

    The student's tokens stay as they are; the teacher's are those of their bytes, in the teacher's own
    tokenization. The answer's end is one event with two names. A special token of the student's is the
    teacher's of the same name, or its name as text; behind that, both would read something else, so nothing
    is learned there, nor behind a token without bytes. Bytes that are no UTF-8 are the teacher's tokens of
    single bytes. Where the student was stopped, the word that it was in is not learned: what it would have
    become decides the teacher's tokens of it.

    Args:
        both: the tokenizers.
        end: the teacher's token that ends an answer; None: it has none, and no end is learned.
    """

    def __init__(self, both: TwoTokenizers, end: int | None):
        self._both, self._end = both, end
        texts = both.teacher.texts()
        self._names = {texts[token]: token for token in both.teacher.special}
        self._bytes = {
            text[0]: token
            for token, text in enumerate(texts)
            if len(text) == 1 and text[0] >= 0x80 and token not in both.teacher.special
        }

    def read(self, answer: Sequence[int], ended: bool, given: int = 0) -> ReadAnswer:
        """An answer in both tokenizations.

        Args:
            answer: the student's tokens, from the answer's first on.
            ended: True if the last one ends it.
            given: the first tokens of it that the dataset wrote; a chunk of both writers is not learned.
        """
        out = ReadAnswer([[] for _ in answer], [False] * len(answer))
        written = self._written(answer, ended)
        read = [token for part in written.parts for token in self._tokens(part)]
        student, teacher = self._both.student.of(written.ids), self._both.teacher.of(read)
        size = len(written.ids)
        if written.ended and self._end is not None:
            size, read = size + 1, [*read, self._end]
            student, teacher = (_with_end(*side) for side in (student, teacher))
        if not size or not read:
            return out
        found = align(student, teacher)
        learned = found.aligned & ~self._unfinished(found, written)
        begin, other = 0, 0
        ends = zip(found.student.tolist(), found.teacher.tolist(), learned.tolist(), strict=True)
        for last, other_last, bit in ends:
            out.chunks[last - 1] = read[other:other_last]
            out.learned[begin:last] = [bit and not begin < given < last] * (last - begin)
            begin, other = last, other_last
        return out

    def _written(self, answer: Sequence[int], ended: bool) -> _Written:
        table = self._both.student
        parts: list[bytes | int] = []
        for place, token in enumerate(answer):
            if token in table.ends or (ended and place == len(answer) - 1):
                return _Written(list(answer[:place]), parts, True, False)
            text = table.bytes_of(token)
            if not text:
                return _Written(list(answer[:place]), parts, False, False)
            if token in table.special and text in self._names:
                parts.append(self._names[text])
                continue
            last = parts[-1] if parts else None
            parts[-1:] = [last + text] if isinstance(last, bytes) else [*parts[-1:], text]
            if token in table.special:
                return _Written(list(answer[: place + 1]), parts, False, False)
        if parts and isinstance(last := parts[-1], bytes):
            parts[-1] = _whole_characters(last)
        return _Written(list(answer), parts, False, True)

    def _tokens(self, part: bytes | int) -> Iterator[int]:
        """The teacher's tokens of a part. Of a byte that it has no token of there are none: then the bytes
        differ, as they would in a row of the dataset."""
        if isinstance(part, int):
            yield part
            return
        for piece in _NO_TEXT.split(part.decode("utf-8", "surrogateescape")):
            if _NO_TEXT.fullmatch(piece):
                yield from [self._bytes[byte]] if (byte := ord(piece) - 0xDC00) in self._bytes else []
            elif piece:
                yield from self._tokens_of_text(piece)

    def _tokens_of_text(self, text: str) -> list[int]:
        """Text as it stands, not at a text's beginning, where some tokenizers put a space."""
        whole = text.encode()
        ids = _encoded(self._both.tokenizer, text)
        if self._both.teacher.of(ids)[0].astype(np.uint8).tobytes() == whole:
            return ids
        behind = _encoded(self._both.tokenizer, _BEFORE + text)
        symbols, ends = self._both.teacher.of(behind)
        first = np.flatnonzero(ends == len(symbols) - len(whole))
        return behind[int(first[-1]) + 1 :] if len(first) else ids

    def _unfinished(self, found: Chunks, written: _Written) -> np.ndarray:
        """The chunks of the word in which the student was stopped."""
        out = np.zeros(len(found.student), dtype=bool)
        if written.cut:
            begins = [0, *found.student[:-1].tolist()][-_LAST_WORD:]
            texts = [self._both.student.bytes_of(written.ids[at]) for at in begins]
            of_word = (i for i, text in enumerate(texts) if text[:1].isspace())
            out[len(out) - len(begins) + max(of_word, default=0) :] = True
        return out


def _encoded(tokenizer: Any, text: str) -> list[int]:
    # What looks like a special token and was written in letters is text.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _with_end(symbols: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.append(symbols, np.uint16(END)), np.append(ends, len(symbols) + 1)


def _whole_characters(text: bytes) -> bytes:
    """Text without the beginning of a character at its end."""
    for size in range(1, min(4, len(text) + 1)):
        lead = text[-size]
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text[:-size] if size < needed else text
        if lead < 0x80:
            break
    return text
