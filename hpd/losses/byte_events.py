r"""Tokens of two vocabularies as events over the next bytes.

Axes: V tokens of one vocabulary, C positions, n events per position, 258 cells.

The event :math:`E_b` of a token with bytes b is that the next bytes begin with b. A model has it by several
paths: by any token that begins with b, and by tokens that are shorter than b, then the rest. At one position
only the first kind is known in full, and of the second kind no more than its first token:

.. math:: \sum_{v:\ b \le v} p_v \;\le\; P(E_b) \;\le\; \sum_{v:\ b \le v} p_v + \sum_{v < b} p_v

where :math:`b \le v` says that v begins with b, and :math:`v < b` that v is a part of b's beginning.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["NUM_CELLS", "ByteEvents", "EventTokens", "VocabularyBytes", "byte_events", "cell_mass"]

NUM_CELLS = 258
"""Of the next byte: one for each of the 256, one for the end, and one for all other special tokens."""
_END, _OTHER = 256, 257
# One above every symbol: whatever begins with b comes before b and this.
_ABOVE = "\u0101"


class VocabularyBytes(NamedTuple):
    """A vocabulary as its tokens' bytes."""

    texts: Sequence[bytes]
    """Of each token; those beyond, and tokens of no bytes, are no text."""
    ends: frozenset[int]
    special: frozenset[int]
    size: int
    """Tokens of the model's head."""

    def keys(self) -> list[str | None]:
        """Each token's symbols as characters, which sort like bytes; an end is one symbol above them; None
        for tokens that are no text."""
        found: list[str | None] = [text.decode("latin-1") or None for text in self.texts[: self.size]]
        found += [None] * (self.size - len(found))
        for token in self.special:
            if token < self.size:
                found[token] = chr(_END) if token in self.ends else None
        return found


class EventTokens(NamedTuple):
    """For the event of each token of the student: the tokens of one vocabulary that it reads.

    In one row of token ids, event v has those from `starts[v, k]` on, `counts[v, k]` of them: with k = 0
    those that begin with its bytes, with k = 1 those that its bytes begin with.
    """

    tokens: Int[Tensor, "E"]
    starts: Int[Tensor, "V 2"]
    counts: Int[Tensor, "V 2"]

    def bounds(
        self, probs: Float[Tensor, "C T"], events: Int[Tensor, "C n"]
    ) -> tuple[Float[Tensor, "C n"], Float[Tensor, "C n"]]:
        """Lower and upper bound of each event's probability.

        Args:
            probs: of the next token, over this vocabulary.
            events: tokens of the student.
        """
        low, shorter = (self._mass(probs, self.starts[events, k], self.counts[events, k]) for k in (0, 1))
        return low, low + shorter

    def _mass(
        self, probs: Float[Tensor, "C T"], starts: Int[Tensor, "C n"], counts: Int[Tensor, "C n"]
    ) -> Float[Tensor, "C n"]:
        flat, sizes = starts.flatten(), counts.flatten()
        owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), sizes)
        within = torch.arange(len(owner), device=flat.device) - (sizes.cumsum(0) - sizes)[owner]
        mass = probs[owner // starts.shape[1], self.tokens[flat[owner] + within]]
        out = mass.new_zeros(len(flat), dtype=torch.float64)
        return out.index_add_(0, owner, mass.double()).view_as(starts)

    def to(self, device: torch.device) -> EventTokens:
        """The same on a device."""
        return EventTokens(*(tensor.to(device) for tensor in self))


class ByteEvents(NamedTuple):
    """The events of the student's tokens for both models, and the cell of every token."""

    of_student: EventTokens
    of_teacher: EventTokens
    known: Float[Tensor, "V"]
    """1 for tokens of the student that are text or the end, whose events the teacher has too."""
    student_cells: Int[Tensor, "V"]
    teacher_cells: Int[Tensor, "T"]
    shared: Int[Tensor, "2 S"]
    """Tokens of student and teacher that are the same bytes, or the end; one of several that are."""
    student_rest: Int[Tensor, "U"]
    """The student's other tokens."""
    teacher_rest: Int[Tensor, "W"]

    def to(self, device: torch.device) -> ByteEvents:
        """The same on a device."""
        return ByteEvents(*(part.to(device) for part in self))  # type: ignore[arg-type]


def byte_events(student: VocabularyBytes, teacher: VocabularyBytes) -> ByteEvents:
    """Tables for two vocabularies: each sorted by bytes once, where the tokens that begin with some bytes are
    one range, which two searches find."""
    keys, other = student.keys(), teacher.keys()
    known = torch.tensor([0.0 if key is None else 1.0 for key in keys])
    shared = _shared(keys, other)
    rest = (
        torch.tensor(sorted({*range(len(side))} - {*row.tolist()}), dtype=torch.int64)
        for side, row in zip((keys, other), shared, strict=True)
    )
    return ByteEvents(
        _events(keys, keys),
        _events(keys, other),
        known,
        torch.tensor(_cells(keys)),
        torch.tensor(_cells(other)),
        shared,
        *rest,
    )


def _shared(keys: Sequence[str | None], other: Sequence[str | None]) -> Int[Tensor, "2 S"]:
    named = {key: token for token, key in reversed([*enumerate(other)])}
    found = {key: token for token, key in reversed([*enumerate(keys)]) if key is not None and key in named}
    pairs = sorted((token, named[key]) for key, token in found.items())
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous()


def _cells(keys: Sequence[str | None]) -> list[int]:
    return [_OTHER if key is None else ord(key[0]) for key in keys]


def _events(events: Sequence[str | None], vocabulary: Sequence[str | None]) -> EventTokens:
    named = sorted((key, token) for token, key in enumerate(vocabulary) if key is not None)
    ordered = [key for key, _ in named]
    same = defaultdict(list)
    for key, token in named:
        same[key].append(token)
    tokens = [token for _, token in named]
    starts, counts = [], []
    for key in events:
        if key is None:
            starts.append((0, 0))
            counts.append((0, 0))
            continue
        first = bisect.bisect_left(ordered, key)
        shorter = [token for size in range(1, len(key)) for token in same.get(key[:size], ())]
        starts.append((first, len(tokens)))
        counts.append((bisect.bisect_left(ordered, key + _ABOVE, first) - first, len(shorter)))
        tokens += shorter
    return EventTokens(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(starts, dtype=torch.int64).view(-1, 2),
        torch.tensor(counts, dtype=torch.int64).view(-1, 2),
    )


def cell_mass(probs: Float[Tensor, "C V"], cells: Int[Tensor, "V"]) -> Float[Tensor, "C 258"]:
    """The distribution of the next byte (or the end, or another special token): exact, since every token has
    one first byte. What a divergence is on it, it is at least on tokens (data processing)."""
    return probs.new_zeros(len(probs), NUM_CELLS).index_add_(1, cells, probs)
