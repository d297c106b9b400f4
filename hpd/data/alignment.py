"""Two token rows of one text, cut into chunks at the byte ends that both have.

Axes: S, T symbols (bytes, and the answer's end) of the two sides; C chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt16

__all__ = ["Chunks", "align"]

_Symbols = UInt16[np.ndarray, "s"]
_Ends = Int[np.ndarray, "n"]


class Chunks(NamedTuple):
    """The tokens of both sides in chunks, each with at least one token of either."""

    student: Int[np.ndarray, "C"]
    """Where each chunk ends among the student's tokens: the number of the first one behind it."""
    teacher: Int[np.ndarray, "C"]
    aligned: Bool[np.ndarray, "C"]
    """True where both sides have the same bytes; they are the same text in between the other chunks too."""
    unaligned_bytes: int
    """Bytes of the student's in chunks that are not aligned."""

    @property
    def tokens(self) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "C"]]:
        """The tokens of each chunk, of the student and of the teacher."""
        return np.diff(self.student, prepend=0), np.diff(self.teacher, prepend=0)


def align(student: tuple[_Symbols, _Ends], teacher: tuple[_Symbols, _Ends]) -> Chunks:
    r"""Cut two token rows at every place where both have a token's end.

    Where the bytes differ (a normalizer, a space that one side adds), what both begin with and what both end
    with is aligned, and one chunk in between is not. A token of no bytes belongs to the chunk before it.

    Linear in the length: a mark at each byte end of one side, looked up at those of the other.

    Args:
        student, teacher: symbols of the whole answer, and where each token ends, as `TokenBytes.of`; at
            least one token each.
    """
    (bytes_s, ends_s), (bytes_t, ends_t) = student, teacher
    size_s, size_t = len(bytes_s), len(bytes_t)
    head = _shared(bytes_s, bytes_t)
    same = head == size_s == size_t
    tail = 0 if same else min(_shared(bytes_s[::-1], bytes_t[::-1]), min(size_s, size_t) - head)
    marks = np.zeros(size_t + 1, dtype=bool)
    marks[ends_t] = True
    unique = ends_s[np.diff(ends_s, prepend=0) > 0]
    first = unique[unique <= head]
    last = unique[unique >= size_s - tail] if not same else unique[:0]
    shift = size_t - size_s
    first, last = first[marks[first]], last[marks[last + shift]]
    at_s = np.concatenate([first, last])
    at_t = np.concatenate([first, last + shift])
    in_tail = np.arange(len(at_s)) >= len(first)
    # The two ends are a boundary whatever the bytes say.
    if not len(at_s) or at_s[-1] != size_s or at_t[-1] != size_t:
        at_s, at_t, in_tail = np.append(at_s, size_s), np.append(at_t, size_t), np.append(in_tail, not same)
    tokens_s = np.searchsorted(ends_s, at_s, side="right")
    tokens_t = np.searchsorted(ends_t, at_t, side="right")
    tokens_s[-1], tokens_t[-1] = len(ends_s), len(ends_t)
    kept = _with_tokens(tokens_s, tokens_t)
    at_s, in_tail, tokens_s, tokens_t = at_s[kept], in_tail[kept], tokens_s[kept], tokens_t[kept]
    began_in_tail = np.concatenate([[False], in_tail[:-1]])
    aligned = in_tail == began_in_tail
    begins = np.concatenate([[0], at_s[:-1]])
    return Chunks(tokens_s, tokens_t, aligned, int((at_s - begins)[~aligned].sum()))


def _shared(a: _Symbols, b: _Symbols) -> int:
    """Symbols that both begin with."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def _with_tokens(student: Int[np.ndarray, "C"], teacher: Int[np.ndarray, "C"]) -> Bool[np.ndarray, "C"]:
    """The boundaries with a token of either side behind the one before; the last one stays.

    Bytes that one side alone has lie between two boundaries without a token of the other: they join the
    chunk behind them, at the end of the row the one before.
    """
    kept = np.concatenate([[True], (np.diff(student) > 0) & (np.diff(teacher) > 0)])
    kept[0] = student[0] > 0 and teacher[0] > 0
    if not kept[-1]:
        before = np.flatnonzero(kept)
        kept[before[-1:]] = False
        kept[-1] = True
    return kept
