r"""The reweighted log-likelihood between two tokenizers: events of bytes in the place of tokens.

Axes: N label positions of the student, M of the teacher, C chunks, K columns, V and T tokens of the two
vocabularies. Chunk j has the student's tokens I_j and the teacher's J_j, which are the same bytes.

.. math:: \log Q_j = \sum_{i \in I_j} \log q_i, \qquad \log P_j = \sum_{i \in J_j} \log p_i, \qquad
          \nabla L = -s \sum_j w_j \nabla \log Q_j

with w_j the objective's weight at :math:`P_j^{1/n}, Q_j^{1/n}`, n the larger number of tokens
(`geometric`), or at P_j, Q_j themselves (`product`). So a chunk's weight is that of each of its tokens, and
where every chunk is one token of either side this is `reweighted_nll` on the label.

At the first position of a chunk both models have read the same bytes. There a draw of the student is compared
as an event (`hpd.losses.byte_events`), and whole distributions are compared over the next byte.

Reference: this project (docs/any-teacher.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.losses.byte_events import ByteEvents
from hpd.losses.byte_weights import Pair, add_weights_, next_bytes
from hpd.losses.chunked import ReweightedNLL, finish
from hpd.losses.heads import Head, Scores, TeacherScores
from hpd.losses.measures import distribution_metrics
from hpd.losses.operator import LossOutput, default_chunk_bytes
from hpd.losses.products import accumulate, empty_gradients, for_products, leaves, project_, wide
from hpd.losses.teacher_side import is_known_by_token, log_normalizer, teacher_logits_, token_logprobs
from hpd.losses.tile import Sums, add
from hpd.methods.supports import LOGPROB_FLOOR, raise_excluded_
from hpd.methods.terms import Term

__all__ = ["LENGTHS", "byte_nll", "chunk_logprobs"]

LENGTHS = ("geometric", "product")
"""How a chunk's probability is made one of tokens."""


class _Call(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    teacher: TeacherScores
    batch: TokenBatch
    terms: Sequence[Term]
    events: ByteEvents
    uniforms: Float[Tensor, "N u"] | None
    scale: Tensor | float
    chunk_bytes: int
    metric_stride: int
    length: str


class _ChunkGroup(NamedTuple):
    """Some whole chunks: their positions on both sides."""

    student: slice
    teacher: slice
    counts: Int[Tensor, "C"]
    teacher_counts: Int[Tensor, "C"]
    number: int
    """Of the first of them among all."""


def byte_nll(
    student: Scores,
    teacher: TeacherScores,
    batch: TokenBatch,
    terms: Sequence[Term],
    events: ByteEvents,
    *,
    uniforms: Float[Tensor, "N u"] | None = None,
    scale: Tensor | float = 1.0,
    chunk_bytes: int | None = None,
    metric_stride: int = 1,
    length: str = "geometric",
) -> LossOutput:
    """The loss between two tokenizers and its gradient, without `[N, V]`.

    A chunk's value counts n times with `geometric`, so that its gradient is that of its tokens together.

    Args:
        student: at its N label positions; gradients flow to both.
        teacher: at its M; never differentiated. Of one that is known by its likeliest tokens, label terms
            alone.
        batch: labels and chunks of both.
        terms: what is learned, each with a byte form (`hpd.methods.byte_forms`).
        events: of the two vocabularies.
        uniforms: numbers in [0, 1) for the draws.
        scale: multiplies the loss.
        chunk_bytes: memory of the logits of one side at a time, at least a chunk's; None:
            `default_chunk_bytes`.
        metric_stride: metrics of the next byte at every n-th chunk; 0 for none.
        length: one of LENGTHS.
    """
    if isinstance(teacher, Scores):
        teacher = teacher._replace(hidden=teacher.hidden.detach())
    chunk_bytes = chunk_bytes or default_chunk_bytes(batch.labels.device)
    call = _Call(teacher, batch, terms, events, uniforms, scale, chunk_bytes, metric_stride, length)
    sums: Sums = {}
    loss: Any = _ByteNLL.apply(*leaves(student), student.head, call, sums)
    return LossOutput(loss, sums)


class _ByteNLL(ReweightedNLL):
    """Its backward is that of `ReweightedNLL`: gradients are computed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"] | None,
        bias: Float[Tensor, "V"] | None,
        head: Head,
        call: _Call,
        sums: Sums,
    ) -> Float[Tensor, ""]:
        """Loss; `sums` gains the statistics."""
        dtype, vocab = wide(hidden), Scores(hidden, head._replace(weight=weight)).vocab
        gradients = empty_gradients((hidden, weight, bias), ctx.needs_input_grad, vocab)
        student = for_products(Scores(hidden, head._replace(weight=weight, bias=bias)), vocab)
        scale = torch.ones((), dtype=dtype, device=hidden.device) * call.scale * head.scale
        teacher = call.teacher
        if isinstance(teacher, Scores):
            teacher = for_products(teacher, teacher.vocab)
        for group in _groups(call, vocab * dtype.itemsize, call.teacher.vocab * dtype.itemsize):
            scores = student.at(group.student)
            logits = project_(scores, hidden.new_empty(len(scores.hidden), vocab, dtype=dtype))
            slope = None if head.softcap is None else 1.0 - (logits / head.softcap).square_()
            pair = _read(call, group, torch.log_softmax(logits, -1, out=logits), teacher)
            _observe(call, group, pair, sums)
            uniforms = None if call.uniforms is None else call.uniforms[group.student][pair.first]
            gradient = add_weights_(logits, pair, call.terms, call.events, uniforms, scale, sums)
            if slope is not None:
                gradient.mul_(slope)
            if any(buffer is not None for buffer in gradients):
                accumulate(gradient, scores.hidden, student.head.weight, gradients, group.student)
        return finish(ctx, gradients, (hidden, weight, bias), call, sums)


def chunk_logprobs(token_logprobs: Float[Tensor, "n"], counts: Int[Tensor, "C"]) -> Float[Tensor, "C"]:
    """Log-probability of each chunk, in nats: the sum over its tokens.

    >>> chunk_logprobs(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1, 2]))
    tensor([-1., -6.])
    """
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return token_logprobs.new_zeros(len(counts)).index_add_(0, owner, token_logprobs)


def _groups(call: _Call, row_bytes: int, teacher_bytes: int) -> Iterator[_ChunkGroup]:
    """Whole chunks, as many at a time as the bytes allow."""
    chunks, others = cast(Tensor, call.batch.chunks), cast(Tensor, call.batch.teacher_chunks)
    counts, teacher_counts = torch.bincount(chunks), torch.bincount(others)
    sizes = list(zip(counts.tolist(), teacher_counts.tolist(), strict=True))
    most, most_teacher = call.chunk_bytes // row_bytes, call.chunk_bytes // teacher_bytes
    begin, place, other = 0, 0, 0
    while begin < len(sizes):
        end, rows, teacher_rows = begin, 0, 0
        while end < len(sizes):
            more, teacher_more = rows + sizes[end][0], teacher_rows + sizes[end][1]
            if end > begin and (more > most or teacher_more > most_teacher):
                break
            end, rows, teacher_rows = end + 1, more, teacher_more
        span = slice(begin, end)
        yield _ChunkGroup(
            slice(place, place + rows),
            slice(other, other + teacher_rows),
            counts[span],
            teacher_counts[span],
            begin,
        )
        begin, place, other = end, place + rows, other + teacher_rows


def _read(call: _Call, group: _ChunkGroup, log_q: Float[Tensor, "n V"], teacher: TeacherScores) -> Pair:
    """What both models say about the chunks of a group."""
    labels = call.batch.labels[group.student]
    of_student = log_q.gather(1, labels[:, None]).clamp_min(LOGPROB_FLOOR)[:, 0]
    labels_p = cast(Tensor, call.batch.teacher_labels)[group.teacher]
    part = teacher.at(group.teacher)
    first, teacher_first = (c.cumsum(0) - c for c in (group.counts, group.teacher_counts))
    reads_next = bool(call.metric_stride) or any(
        term.support.draws or term.support.whole or term.support.pairs for term in call.terms
    )
    next_teacher = None
    if is_known_by_token(part) and not (reads_next and isinstance(part, Scores)):
        log_z = log_normalizer(part, labels_p, part.vocab)
        of_teacher = token_logprobs(part, log_z, labels_p, labels_p[:, None])
    else:
        logits = teacher_logits_(part, labels_p, log_q.new_empty(len(labels_p), part.vocab))
        log_p = torch.log_softmax(logits, -1, out=logits)
        of_teacher = log_p.gather(1, labels_p[:, None])
        next_teacher = log_p[teacher_first].exp_() if reads_next else None
    of_teacher = raise_excluded_(of_teacher.to(log_q.dtype, copy=True))[:, 0]
    n = torch.maximum(group.counts, group.teacher_counts).to(log_q.dtype)
    n = n if call.length == "geometric" else torch.ones_like(n)
    whole_p = chunk_logprobs(of_teacher, group.teacher_counts)
    whole_q = chunk_logprobs(of_student, group.counts)
    return Pair(
        whole_p / n,
        whole_q / n,
        n,
        group.counts,
        labels,
        first,
        next_teacher,
        log_q[first].exp() if reads_next else None,
        whole_p - of_teacher[teacher_first],
        whole_q - of_student[first],
    )


def _observe(call: _Call, group: _ChunkGroup, pair: Pair, sums: Sums) -> None:
    """Add the number of tokens, those in chunks of one token each, and metrics of the next byte."""
    alone = (group.counts == 1) & (group.teacher_counts == 1)
    dtype = pair.student.dtype
    add(sums, tokens=torch.ones_like(pair.labels, dtype=dtype))
    add(sums, one_to_one=alone.to(dtype))
    if not call.metric_stride or pair.next_teacher is None:
        return
    rows = slice(-group.number % call.metric_stride, None, call.metric_stride)
    log_p, log_q = next_bytes(pair, call.events, rows)
    labels = call.events.student_cells[pair.labels[pair.first[rows]]]
    distribution_metrics(log_p, log_q, labels, sums)
