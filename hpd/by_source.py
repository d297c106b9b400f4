"""Terms that learn from one writer's text only: the operator runs on the label positions of each writer with the terms for it.

Axes: N label positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.losses import LossOutput, Scores, TeacherScores, reweighted_nll
from hpd.losses.heads import TopKScores
from hpd.losses.reference import logits
from hpd.losses.teacher_side import teacher_logits_
from hpd.supports import Support
from hpd.terms import Term

__all__ = [
    "Part", "as_evaluated", "label_gaps", "loss_by_source", "num_uniforms", "parts_of", "sources_used",
    "teacher_logits",
]  # fmt: skip


class Part(NamedTuple):
    """Positions of one writer and the terms that learn from them in one call."""

    positions: Tensor | None
    """Which of the N; None: all."""
    terms: tuple[Term, ...]
    given: bool
    """Whether their draws are the labels."""
    first: bool
    """Whether these positions are met for the first time, and so are counted."""


def sources_used(terms: Sequence[Term]) -> set[str]:
    """The writers that any term learns from."""
    return {source for source in ("dataset", "student") if any(term.on in (source, "both") for term in terms)}


def num_uniforms(terms: Sequence[Term]) -> int:
    """Uniform numbers that a position needs."""
    return max((term.support.num_uniforms for term in terms), default=0)


def as_evaluated(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms as they are measured on held-out rows: all of them on the dataset's prefixes.

    The tokens there are not the student's, so a term on its own tokens reads a fresh draw instead.
    """
    return tuple(term._replace(on="both", support=_redrawn(term)) for term in terms)


def _redrawn(term: Term) -> Support:
    return replace(term.support, given=False) if term.support.given else term.support


def parts_of(batch: TokenBatch, terms: Sequence[Term]) -> Iterator[Part]:
    """Split positions by writer where any term asks for it, and terms by where their draws come from."""
    if all(term.on == "both" for term in terms):
        yield Part(None, tuple(terms), False, True)
        return
    for source, positions in (("dataset", batch.by_dataset), ("student", batch.by_student)):
        mine = [term for term in terms if term.on in (source, "both")]
        first = True
        for given in (False, True):
            chosen = tuple(term for term in mine if term.support.given == given)
            if chosen:
                yield Part(positions, chosen, given, first)
                first = False


def loss_by_source(
    student: Scores, teacher: TeacherScores, batch: TokenBatch, terms: Sequence[Term], *, uniforms: Tensor | None = None,
    metric_stride: int = 1, **options: Any,
) -> LossOutput:  # fmt: skip
    """`reweighted_nll`, each term on the positions that it learns from.

    Args:
        student, teacher: at all N positions.
        batch: says who wrote what.
        terms: what is learnt.
        uniforms: `num_uniforms(terms)` numbers per position.
        metric_stride, options: as for `reweighted_nll`.
    """
    total, stats = student.hidden.new_zeros(()), {}
    for part in parts_of(batch, terms):
        labels, numbers = (x if x is None or part.positions is None else x[part.positions] for x in (batch.labels, uniforms))
        assert labels is not None
        loss, sums = reweighted_nll(
            student.at(part.positions), teacher.at(part.positions), labels, part.terms,
            uniforms=numbers, draws=labels[:, None] if part.given else None,
            metric_stride=metric_stride if part.first else 0, **options,
        )  # fmt: skip
        if not part.first:
            sums = {name: value for name, value in sums.items() if name.startswith("value/")}
        total = total + loss
        for name, value in sums.items():
            stats[name] = stats[name] + value if name in stats else value
    return LossOutput(total, stats)


@torch.no_grad()
def label_gaps(student: Scores, teacher: TeacherScores, batch: TokenBatch, stride: int) -> dict[str, Tensor]:
    """Sums of the labels' log-probabilities by writer, on every `stride`-th of its positions, and their number."""
    found = {}
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


def teacher_logits(scores: TeacherScores, labels: Tensor, vocab: int, like: Tensor) -> Tensor:
    """`[N, vocab]` logits of a teacher, never differentiated.

    Args:
        scores: what the teacher knows at N positions.
        labels: the label of each.
        vocab: of the first so many tokens.
        like: a tensor of the student's, whose device and dtype count.
    """
    if isinstance(scores, TopKScores):
        return teacher_logits_(scores, labels, like.new_empty(len(labels), vocab, dtype=torch.float32))
    return logits(scores, vocab).detach()
