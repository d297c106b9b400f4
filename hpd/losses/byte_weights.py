r"""What chunks of bytes are worth: from both models' probabilities to the gradient of the student's logits.

Axes: n positions of the student, C chunks, K columns, V and T tokens of the two vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hpd.losses.byte_events import ByteEvents, cell_mass
from hpd.losses.tile import Sums, add
from hpd.methods.columns import LOGPROB_FLOOR, Draws, raise_excluded_
from hpd.methods.terms import Term

__all__ = ["EventBounds", "Pair", "add_weights_", "compare_draws", "next_bytes"]


class Pair(NamedTuple):
    """What both models say about some chunks."""

    teacher: Float[Tensor, "C"]
    """Log-probability of each chunk, in nats; over n where that is asked for."""
    student: Float[Tensor, "C"]
    n: Float[Tensor, "C"]
    """What it was divided by; a chunk's value counts as often."""
    counts: Int[Tensor, "C"]
    """The student's tokens in each."""
    labels: Int[Tensor, "n"]
    """The student's tokens, chunk by chunk."""
    first: Int[Tensor, "C"]
    """Where each chunk begins among them."""
    next_teacher: Float[Tensor, "C T"] | None
    """Probabilities of the next token at each chunk's beginning; None where no term reads them."""
    next_student: Float[Tensor, "C V"] | None
    later_teacher: Float[Tensor, "C"]
    """Log-probability of all but each chunk's first token; 0 where there is one."""
    later_student: Float[Tensor, "C"]

    @property
    def owner(self) -> Int[Tensor, "n"]:
        """The chunk of each of the student's tokens."""
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.counts.device), self.counts)

    @property
    def inside(self) -> Bool[Tensor, "n"]:
        """True for the student's tokens that no chunk begins with."""
        found = torch.ones(len(self.labels), dtype=torch.bool, device=self.labels.device)
        found[self.first] = False
        return found


class EventBounds(NamedTuple):
    """Draws of the student as events of bytes, where the sign of log P - log Q is certain."""

    teacher_logprobs: Float[Tensor, "C n"]
    student_logprobs: Float[Tensor, "C n"]
    """The two bounds that are nearest to each other; equal where the sign is not certain."""
    undecided: Bool[Tensor, "C n"]


def compare_draws(
    next_teacher: Float[Tensor, "C T"],
    next_student: Float[Tensor, "C V"],
    draws: Int[Tensor, "C n"],
    events: ByteEvents,
) -> EventBounds:
    r"""Compare the event of each draw's bytes b between the models.

    The student overestimates it for certain where even its lower bound is above the teacher's upper one,
    :math:`Q_{low}(E_b) > P_{up}(E_b)`, and underestimates it for certain where :math:`P_{low} > Q_{up}`.
    """
    teacher_low, teacher_up = events.of_teacher.bounds(next_teacher, draws)
    student_low, student_up = events.of_student.bounds(next_student, draws)
    known = events.known[draws] > 0
    above, below = (student_low > teacher_up) & known, (teacher_low > student_up) & known
    undecided = ~(above | below)
    tiny = torch.finfo(next_student.dtype).tiny
    of_student = torch.where(below, student_up, student_low).clamp_min(tiny).log()
    of_teacher = torch.where(below, teacher_low, teacher_up).clamp_min(tiny).log()
    of_teacher = torch.where(undecided, of_student, of_teacher)
    dtype = next_student.dtype
    return EventBounds(of_teacher.to(dtype), of_student.to(dtype), undecided)


def next_bytes(
    pair: Pair, events: ByteEvents, rows: slice = slice(None)
) -> tuple[Float[Tensor, "C 258"], Float[Tensor, "C 258"]]:
    """Log-probabilities of the next byte under teacher and student, in nats, never below the least number."""
    assert pair.next_teacher is not None
    assert pair.next_student is not None
    masses = (
        cell_mass(pair.next_teacher[rows], events.teacher_cells),
        cell_mass(pair.next_student[rows], events.student_cells),
    )
    of_teacher, of_student = (mass.clamp_min(torch.finfo(mass.dtype).tiny).log() for mass in masses)
    return of_teacher, of_student


def add_weights_(
    log_q: Float[Tensor, "n V"],
    pair: Pair,
    terms: Sequence[Term],
    events: ByteEvents,
    uniforms: Float[Tensor, "C u"] | None,
    scale: Float[Tensor, ""],
    sums: Sums,
) -> Float[Tensor, "n V"]:
    r"""Overwrite the student's log-probabilities with the gradient of the loss with respect to its logits.

    Each token of a chunk has the chunk's weight, a draw its own at the chunk's first position. Pairs of
    tokens have theirs there, and the chunk's later tokens the sum of them. A cell of the next byte spreads
    its weight over its tokens by their share of it, as a bucket does:

    .. math:: \frac{\partial L}{\partial z_v} = s \Big[q_v \sum_c w_c - w_{c(v)} \frac{q_v}{Q_{c(v)}}\Big]

    `sums` gains values and metrics.
    """
    mass = log_q.new_zeros(len(log_q), 1)
    updates = []
    cells = None
    for term in terms:
        factor = term.weight * scale
        if term.support.whole:
            beside = _of_cells(term, pair, events, sums).mul_(factor)
            cells = beside if cells is None else cells.add_(beside)
            continue
        if term.support.pairs:
            beside, of_later = (part.mul_(factor) for part in _of_pairs(term, pair, events, sums))
            cells = beside if cells is None else cells.add_(beside)
            mass = mass + of_later
            updates.append((pair.labels[:, None], -of_later))
            continue
        tokens, weights = _of_chunks(term, pair, events, uniforms, sums)
        mass = mass + factor * weights.sum(-1, keepdim=True)
        updates.append((tokens, weights * -factor))
    gradient = log_q.exp_().mul_(mass)
    for tokens, values in updates:
        gradient.scatter_add_(1, tokens, values)
    return gradient if cells is None else gradient.index_add_(0, pair.first, cells)


def _of_cells(term: Term, pair: Pair, events: ByteEvents, sums: Sums) -> Float[Tensor, "C V"]:
    """The gradient at the chunks' first positions of a term on whole distributions, of the next byte."""
    log_p, log_q = next_bytes(pair, events)
    weights, value = term.objective.weights(log_p, log_q), term.objective.value(log_p, log_q)
    stats = {} if term.objective.stats is None else term.objective.stats(log_p, log_q)
    add(sums, **{f"value/{term.name}": value}, **{k: v * pair.counts for k, v in stats.items()})
    assert pair.next_student is not None
    per_token = weights.sum(-1, keepdim=True) - weights / log_q.exp()
    return pair.next_student * per_token[:, events.student_cells]


def _of_pairs(
    term: Term, pair: Pair, events: ByteEvents, sums: Sums
) -> tuple[Float[Tensor, "C V"], Float[Tensor, "n 1"]]:
    r"""The gradient at the chunks' first positions of a term on pairs of tokens, and the weights of their
    later tokens.

    Of a chunk of several tokens, what is compared is :math:`q_v \prod_{i > 1} q_i`: the first token's
    distribution times the probability of the later ones, as GOLD merges them. So each of these has the
    sum of the weights.
    """
    assert pair.next_student is not None
    tokens, p, q = _paired(term, pair, events)
    log_p = raise_excluded_(p.log() + pair.later_teacher[:, None])
    log_q = (q.log() + pair.later_student[:, None]).clamp_min(LOGPROB_FLOOR)
    weights, value = term.objective.weights(log_p, log_q), term.objective.value(log_p, log_q)
    stats = {} if term.objective.stats is None else term.objective.stats(log_p, log_q)
    add(sums, **{f"value/{term.name}": value}, **{k: v * pair.counts for k, v in stats.items()})
    mass = weights.sum(-1, keepdim=True)
    beside = pair.next_student * mass
    beside.scatter_add_(1, tokens, -weights[:, : tokens.shape[1]])
    return beside, mass[pair.owner] * pair.inside[:, None]


def _paired(
    term: Term, pair: Pair, events: ByteEvents
) -> tuple[Int[Tensor, "C Kt"], Float[Tensor, "C K"], Float[Tensor, "C K"]]:
    """The student's tokens, and the probabilities of teacher and student in pairs, zeros where one side has
    fewer."""
    assert pair.next_teacher is not None
    assert pair.next_student is not None
    p, q, kind = pair.next_teacher, pair.next_student, term.support.pairs
    if kind == "shared":
        mine, theirs = events.shared
        return mine.expand(len(q), -1), p[:, theirs], q[:, mine]
    if kind == "unshared":
        p, q = p[:, events.teacher_rest], q[:, events.student_rest]
    p, (q, tokens) = p.sort(-1, descending=True).values, q.sort(-1, descending=True)
    size = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(side, (0, size - side.shape[1])) for side in (p, q))
    return events.student_rest[tokens] if kind == "unshared" else tokens, p, q


def _of_chunks(
    term: Term, pair: Pair, events: ByteEvents, uniforms: Float[Tensor, "C u"] | None, sums: Sums
) -> tuple[Int[Tensor, "n K"], Float[Tensor, "n K"]]:
    """Tokens and weights at every position of a term on the label, and on draws where it has them."""
    log_p, log_q = pair.teacher[:, None], pair.student[:, None]
    tokens, coefficients, watched = pair.labels[:, None], None, {}
    draws = _draws(term, pair, uniforms)
    if draws is not None:
        assert pair.next_teacher is not None
        assert pair.next_student is not None
        found = compare_draws(pair.next_teacher, pair.next_student, draws.tokens, events)
        is_label = draws.tokens == pair.labels[pair.first, None]
        # A draw that is the label counts once, in the label's column.
        beside = (
            torch.where(is_label, column, drawn)
            for column, drawn in zip((log_p, log_q), found[:2], strict=True)
        )
        log_p, log_q = (torch.cat(pair, 1) for pair in zip((log_p, log_q), beside, strict=True))
        coefficients = torch.cat([torch.ones_like(log_q[:, :1]), (~is_label).to(log_q.dtype)], 1)
        undecided = (found.undecided & ~is_label).to(log_q.dtype)
        watched = {"sampled_label": is_label.to(log_q.dtype).mean(-1), "draws_undecided": undecided.mean(-1)}
        at_all = tokens.expand(-1, 1 + draws.tokens.shape[1]).clone()
        at_all[pair.first, 1:] = draws.tokens
        tokens = at_all
    weights, value = term.objective.weights(log_p, log_q), term.objective.value(log_p, log_q)
    if coefficients is not None:
        weights, value = weights * coefficients, value * coefficients
    value = torch.cat([value[:, :1] * pair.n[:, None], value[:, 1:]], 1)
    stats = {} if term.objective.stats is None else term.objective.stats(log_p, log_q)
    counted = {name: number * pair.counts for name, number in {**stats, **watched}.items()}
    add(sums, **{f"value/{term.name}": value}, **counted)
    spread = weights[pair.owner]
    if draws is not None:
        spread[pair.inside, 1:] = 0.0
    return tokens, spread


def _draws(term: Term, pair: Pair, uniforms: Float[Tensor, "C u"] | None) -> Draws | None:
    """The student's draws at each chunk's first position."""
    if not term.support.draws:
        return None
    assert uniforms is not None
    assert pair.next_student is not None
    q = pair.next_student
    return term.support.draw(
        q.log() if term.support.temperature != 1.0 else q, q, pair.labels[pair.first], uniforms
    )
