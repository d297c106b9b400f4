r"""What the tokens of an answer weigh, by the rule of a term (`hpd.methods.position_rules.PositionRule`).

Axes: N label positions, R rows. Every rule reads the label positions of one row and nothing else, so the
weights do not depend on padding, packing, the order of rows, or how a batch is split over micro-batches and
processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.losses.heads import Scores, TeacherScores
from hpd.losses.operator import default_chunk_bytes
from hpd.losses.products import chunks, logits
from hpd.losses.teacher_side import is_known_by_token, log_normalizer, teacher_logits, token_logprobs
from hpd.losses.tile import sum_dtype
from hpd.methods.position_rules import PositionRule
from hpd.methods.supports import LOGPROB_FLOOR, raise_excluded_
from hpd.methods.terms import Term

__all__ = [
    "drift_weights",
    "first_positions",
    "highest_positions",
    "position_weights",
    "step_weights",
]

Parts = Sequence[tuple[Tensor | None, TeacherScores]]
"""Who answers for which positions; None: for all."""


def position_weights(
    terms: Sequence[Term], batch: TokenBatch, student: Scores, teachers: Parts, chunk_bytes: int | None = None
) -> dict[str, Float[Tensor, "N"]]:
    """The weights of every term that has a rule, by its name; constants for the gradient.

    The rules entropy, drift and steps read a row as a whole before any of its positions is weighed: one more
    product with the student's head, and for drift and steps one with the teacher's, unless it knows the label
    (caches and servers do).

    Args:
        terms: what is learned.
        batch: of whole rows.
        student, teachers: at its positions.
        chunk_bytes: memory of one chunk of logits; None: `default_chunk_bytes`.

    Raises:
        ValueError: a rule reads a column that the batch does not have.
    """
    found: dict[str, Tensor] = {}
    ruled = {term.name: term.positions for term in terms if term.positions is not None}
    if not ruled:
        return found
    assert batch.rows is not None, "rules over positions read whole rows"
    kinds = {rule.rule for rule in ruled.values()}
    gaps = entropies = None
    if kinds & {"entropy", "drift", "steps"}:
        chunk_bytes = chunk_bytes or default_chunk_bytes(batch.labels.device)
        with_gaps = bool(kinds & {"drift", "steps"})
        entropies, log_q = _of_student(student, batch.labels, teachers, chunk_bytes)
        gaps = _of_teachers(student, batch.labels, teachers, chunk_bytes) - log_q if with_gaps else None
    for name, rule in ruled.items():
        weights = _weights(rule, batch, entropies, gaps)
        found[name] = weights.to(torch.promote_types(student.hidden.dtype, torch.float32))
    return found


def _weights(
    rule: PositionRule, batch: TokenBatch, entropies: Tensor | None, gaps: Tensor | None
) -> Float[Tensor, "N"]:
    rows = batch.rows
    assert rows is not None
    if rule.rule == "column":
        if batch.position_weights is None:
            raise ValueError(
                f"A term is weighed by the column {rule.column}, and these rows were prepared without it: "
                "give the trainer a dataset that has it."
            )
        return batch.position_weights
    if rule.rule == "first":
        assert batch.row_lengths is not None
        return first_positions(rows, batch.row_lengths, rule.number("share")).float()
    if rule.rule == "entropy":
        assert entropies is not None
        return highest_positions(entropies, rows, rule.number("share")).float()
    assert gaps is not None
    if rule.rule == "drift":
        return drift_weights(gaps, rows, rule.number("gain"))
    assert batch.steps is not None
    return step_weights(gaps, rows, batch.steps, rule.number("epsilon"), rule.number("limit"))


def first_positions(rows: Int[Tensor, "N"], row_lengths: Int[Tensor, "R"], share: float) -> Bool[Tensor, "N"]:
    """True at the first ceil(share * T) of each row's T positions, so at one of them at least.

    >>> first_positions(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([4, 1]), 0.3)
    tensor([ True,  True, False, False,  True])

    Args:
        rows: of each position; ends of rows may be left out already.
        row_lengths: T of each row as a whole.
        share: in (0, 1].
    """
    _, starts = _extent(rows)
    place = torch.arange(len(rows), device=rows.device) - starts[rows]
    return place < _ceil(row_lengths, share)[rows]


def highest_positions(values: Float[Tensor, "N"], rows: Int[Tensor, "N"], share: float) -> Bool[Tensor, "N"]:
    """True at the ceil(share * T) of each row's T positions whose value is greatest; of equal ones the
    earlier.

    >>> highest_positions(torch.tensor([0.1, 0.9, 0.5, 0.5]), torch.tensor([0, 0, 0, 0]), 0.5)
    tensor([False,  True,  True, False])
    """
    counts, starts = _extent(rows)
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]  # by row, then by value
    rank = torch.arange(len(rows), device=rows.device) - starts[rows]
    chosen = rank < _ceil(counts, share)[rows]
    return torch.empty_like(chosen).scatter_(0, order, chosen)


def drift_weights(gaps: Float[Tensor, "N"], rows: Int[Tensor, "N"], gain: float) -> Float[Tensor, "N"]:
    r"""IW-OPD: :math:`1 + g (1 - \sum_{u<t} |A_u| / \sum_u |A_u|)` along each row, A being `gaps`.

    Where a row has no gap at all its answer has not drifted: the weight is 1 + g throughout.
    """
    sizes = gaps.abs().to(sum_dtype(gaps.device))
    _, starts = _extent(rows)
    through = sizes.cumsum(0)
    before = through - sizes
    before = before - before[starts[rows]] if len(rows) else before
    totals = sizes.new_zeros(len(starts)).index_add_(0, rows, sizes)[rows]
    share = torch.where(totals > 0, before / totals.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0)
    return 1.0 + gain * (1.0 - share.clamp(0.0, 1.0))


def step_weights(
    gaps: Float[Tensor, "N"], rows: Int[Tensor, "N"], steps: Int[Tensor, "N"], epsilon: float, limit: float
) -> Float[Tensor, "N"]:
    r"""SOD: :math:`\min((d_1 + \epsilon) / (d_k + \epsilon), limit)`, d_k the mean |gap| of a row's step k.

    Args:
        gaps: log p - log q of the labels, nats.
        rows: of each position.
        steps: its step, counted from 0 over all rows.
        epsilon, limit: as above.
    """
    sizes = gaps.abs().to(sum_dtype(gaps.device))
    counts, _ = _extent(steps)
    means = sizes.new_zeros(len(counts)).index_add_(0, steps, sizes) / counts.clamp_min(1)
    _, row_starts = _extent(rows)
    first = means[steps[row_starts[rows]]] if len(rows) else means[:0]
    return ((first + epsilon) / (means[steps] + epsilon)).clamp_max(limit)


def _extent(numbers: Int[Tensor, "N"]) -> tuple[Int[Tensor, "R"], Int[Tensor, "R"]]:
    """How many positions have each number (rising from 0, without gaps), and where its first one is.

    There are as many places as positions, the last of them empty: nothing waits for the device.
    """
    counts = numbers.new_zeros(len(numbers)).index_add_(0, numbers, torch.ones_like(numbers))
    return counts, (counts.cumsum(0) - counts).clamp_max(max(len(numbers) - 1, 0))


def _ceil(counts: Int[Tensor, "R"], share: float) -> Int[Tensor, "R"]:
    # 0.7 * 10 is a little above 7 in floating point.
    return torch.ceil(counts.to(sum_dtype(counts.device)) * share * (1.0 - 1e-6)).long().clamp_min(1)


@torch.no_grad()
def _of_student(
    student: Scores, labels: Int[Tensor, "N"], teachers: Parts, chunk_bytes: int
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Entropy of the student, and its log-probability of the label, nats."""
    vocab = _common(student, teachers)
    entropies, found = [], []
    for chunk in chunks(len(labels), 4 * vocab, chunk_bytes):
        log_q = torch.log_softmax(logits(student.at(chunk), vocab), -1).clamp_min(LOGPROB_FLOOR)
        found.append(log_q.gather(1, labels[chunk, None])[:, 0])
        entropies.append(-(log_q.exp() * log_q).sum(-1))
    return _joined(entropies, student), _joined(found, student)


@torch.no_grad()
def _of_teachers(
    student: Scores, labels: Int[Tensor, "N"], teachers: Parts, chunk_bytes: int
) -> Float[Tensor, "N"]:
    """The teacher's log-probability of the label, nats: of each position that of its own."""
    vocab = _common(student, teachers)
    out = _joined([], student).new_zeros(len(labels))
    for positions, scores in teachers:
        everything = torch.arange(len(labels), device=labels.device)
        for chunk in chunks(len(labels) if positions is None else len(positions), 4 * vocab, chunk_bytes):
            at = (everything if positions is None else positions)[chunk]
            out[at] = _label_logprobs(scores.at(chunk), labels[at], vocab, student.hidden).to(out.dtype)
    return out


def _label_logprobs(
    teacher: TeacherScores, labels: Int[Tensor, "C"], vocab: int, like: Tensor
) -> Float[Tensor, "C"]:
    if is_known_by_token(teacher):
        log_z = log_normalizer(teacher, labels, vocab)
        found = token_logprobs(teacher, log_z, labels, labels[:, None])
    else:
        known = teacher_logits(teacher, labels, vocab, like)
        found = torch.log_softmax(known, -1).gather(1, labels[:, None])
    return raise_excluded_(found.clone())[:, 0]


def _common(student: Scores, teachers: Parts) -> int:
    return min(student.vocab, *(scores.vocab for _, scores in teachers))


def _joined(pieces: list[Tensor], student: Scores) -> Float[Tensor, "N"]:
    dtype = torch.promote_types(student.hidden.dtype, torch.float32)
    return torch.cat([student.hidden.new_zeros(0, dtype=dtype), *pieces])
