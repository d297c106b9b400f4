"""Terms that learn from one writer's text only: the label positions of each writer, and what they show.

Axes: N label positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.losses.heads import Scores, TeacherScores
from hpd.losses.products import logits
from hpd.losses.teacher_side import teacher_logits
from hpd.losses.tile import Sums
from hpd.methods.terms import Term

__all__ = ["SourcePart", "label_gaps", "parts_of", "weights_of"]


class SourcePart(NamedTuple):
    """Positions of one writer and the terms that learn from them in one call."""

    positions: Int[Tensor, "n"] | None
    """Indices among the N; None: all."""
    terms: tuple[Term, ...]
    given: bool
    """True if their draws are the labels."""
    first: bool
    """True if these positions are met for the first time, and so are counted."""


def parts_of(batch: TokenBatch, terms: Sequence[Term]) -> Iterator[SourcePart]:
    """Split positions by writer where any term asks for it, and terms by where their draws come from."""
    if all(term.on == "both" for term in terms):
        yield SourcePart(None, tuple(terms), False, True)
        return
    for source, positions in (("dataset", batch.by_dataset), ("student", batch.by_student)):
        of_source = [term for term in terms if term.on in (source, "both")]
        first = True
        for given in (False, True):
            chosen = tuple(term for term in of_source if term.support.given == given)
            if chosen:
                yield SourcePart(positions, chosen, given, first)
                first = False


def weights_of(
    part: SourcePart, weights: Mapping[str, Float[Tensor, "N"]] | None
) -> dict[str, Float[Tensor, "n"]]:
    """The weights by position of a part's terms, at its positions."""
    at = slice(None) if part.positions is None else part.positions
    named = weights or {}
    return {term.name: named[term.name][at] for term in part.terms if term.name in named}


@torch.no_grad()
def label_gaps(student: Scores, teacher: TeacherScores, batch: TokenBatch, stride: int) -> Sums:
    """Sums and number of the labels' log-probabilities by writer, on every `stride`-th of its positions."""
    found: Sums = {}
    for source, positions in (("dataset", batch.by_dataset), ("student", batch.by_student)):
        assert positions is not None
        rows = positions[:: max(stride, 1)]
        vocab, labels = min(student.vocab, teacher.vocab), batch.labels[rows, None]
        sides = {
            "student": logits(student.at(rows), vocab),
            "teacher": teacher_logits(teacher.at(rows), labels[:, 0], vocab, student.hidden),
        }
        for name, side in sides.items():
            found[f"gap/{source}/{name}"] = side.log_softmax(-1).gather(1, labels).sum()
        found[f"gap/{source}/rows"] = torch.ones_like(labels, dtype=torch.float32).sum()
    return found
