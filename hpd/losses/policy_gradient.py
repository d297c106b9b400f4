r"""How a weight meets the gradient: directly, or as the advantage of a clipped policy gradient, from one
table of objectives.

Axes: N label positions, C positions of a chunk, K columns of a support, V vocabulary, R rows.

With A the objective's weight at a token (for drawn tokens divided by their probability), frozen when the
rollouts are new, and
:math:`r = q / q_{old}` the token's likelihood ratio, the loss of a token is

.. math:: -\min\big(r A,\; \mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A\big), \qquad
          \text{but never above } -c A \text{ where } A < 0 \text{ (dual clip)}

At r = 1 its gradient is that of the direct strategy, :math:`-A \nabla \log q`. Terms on whole distributions
(full, top_k) have no token to take a ratio of: their weights are computed anew at every update.

Unlike the reference's verl recipe, the draw for a label is compared with that label and not with the token
before it.

Reference:
    Schulman et al., PPO, 2017, arXiv 1707.06347; Ye et al., 2020, arXiv 1912.09729 (dual clip); Yu et al.,
    DAPO, 2025, arXiv 2503.14476 (two clip bounds); Zhu et al., PSFT, 2025, arXiv 2508.17784 (A = 1 at the
    label).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hpd.batch import TokenBatch
from hpd.losses.by_source import Part, parts_of
from hpd.losses.heads import Scores, TeacherScores
from hpd.losses.operator import LossOutput, default_chunk_bytes
from hpd.losses.products import logits
from hpd.losses.teacher_side import teacher_logits
from hpd.losses.tile import Sums, TileInputs, add, distribution_metrics, weigh
from hpd.methods.strategy import StrategyConfig
from hpd.methods.supports import LOGPROB_FLOOR, has_ratio
from hpd.methods.terms import Term

__all__ = ["clipped_surrogate", "discounted_returns", "policy_gradient_nll"]


def clipped_surrogate(ratio: Tensor, advantages: Tensor, strategy: StrategyConfig) -> tuple[Tensor, Tensor]:
    """What is maximised at each token, and where its gradient is cut off.

    >>> clipped_surrogate(torch.tensor([1.5, 0.5]), torch.tensor([1.0, 1.0]), StrategyConfig(type="policy_gradient"))
    (tensor([1.2000, 0.5000]), tensor([ True, False]))
    """
    held = ratio.clamp(1.0 - strategy.clip_low, 1.0 + strategy.clip_high)
    plain = ratio * advantages
    result = torch.minimum(plain, held * advantages)
    clipped = held * advantages < plain
    if strategy.dual_clip is not None:
        floor = strategy.dual_clip * advantages
        beyond = (advantages < 0) & (result < floor)
        result, clipped = torch.where(beyond, floor, result), clipped | beyond
    return result, clipped


def discounted_returns(values: Tensor, rows: Tensor, discount: float) -> Tensor:
    r""":math:`\sum_{k \ge 0} \gamma^k x_{n + k}` over the rest of each position's row, in log2(N) passes.

    >>> discounted_returns(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 0.5)
    tensor([2., 2., 4.])
    """
    out, distance = values.clone(), 1
    while distance < len(out):
        same = (rows[:-distance] == rows[distance:]).to(out.dtype)
        out[:-distance] = out[:-distance] + discount**distance * same * out[distance:]
        distance *= 2
    return out


def policy_gradient_nll(
    student: Scores,
    teacher: TeacherScores,
    batch: TokenBatch,
    terms: Sequence[Term],
    strategy: StrategyConfig,
    *,
    frozen: list[Any] | None,
    uniforms: Tensor | None,
    scale: Tensor | float,
    row_scale: Tensor | float,
    chunk_bytes: int | None = None,
    metric_stride: int = 1,
    teacher_share: float = 0.0,
) -> tuple[LossOutput, list[Any]]:
    """The loss of the `policy_gradient` strategy; its value is the objective's, its gradient the clipped
    surrogate's.

    One chunk of logits is alive at a time; it is computed again in the backward pass.

    Args:
        student, teacher, batch, terms: as for `loss_by_source`.
        strategy: clipping, mean and returns.
        frozen: tokens, advantages and old log-probabilities of this batch's first update; None: this is the
            first.
        uniforms: numbers of the draws, used at the first update.
        scale: 1 / (label tokens of the global batch); multiplies the value, and the gradient of a token mean.
        row_scale: 1 / (rows of the global batch), for a sequence mean.
        chunk_bytes: memory of one chunk of logits; None: `default_chunk_bytes`.
        metric_stride: full-distribution metrics on every n-th position; 0 for none.
        teacher_share: the teacher's share of the mixture that wrote the student's text.

    Returns:
        The loss, and what the further updates of the batch need (plain lists, dicts and tensors).
    """
    parts, sums, total = list(parts_of(batch, terms)), {}, student.hidden.new_zeros((), dtype=torch.float32)
    kept: list[Any] = []
    for number, part in enumerate(parts):
        data = _PartData(
            part, student, teacher, batch, uniforms, chunk_bytes or default_chunk_bytes(batch.labels.device)
        )
        seen = _look(data, strategy, sums, metric_stride if part.first else 0)
        state = _freeze(data, seen, strategy, teacher_share) if frozen is None else frozen[number]
        kept.append(state)
        total = total + _surrogate(
            data, state, _coefficients(data, strategy, scale, row_scale), strategy, sums
        )
    value = sum(term.weight * sums.get(f"value/{term.name}", 0.0) for term in terms)
    # The value is the objective, so that logs of both strategies are comparable; the gradient is the
    # surrogate's.
    return LossOutput(
        total - total.detach() + torch.as_tensor(value, device=total.device) * scale, sums
    ), kept


class _PartData:
    """One writer's positions, in chunks."""

    def __init__(
        self,
        part: Part,
        student: Scores,
        teacher: TeacherScores,
        batch: TokenBatch,
        uniforms: Tensor | None,
        chunk_bytes: int,
    ):
        at = part.positions
        self.part, self.student, self.teacher = part, student.at(at), teacher.at(at)
        self.labels, self.rows, self.behaviour, self.uniforms = (
            x if x is None or at is None else x[at]
            for x in (batch.labels, batch.rows, batch.behaviour, uniforms)
        )
        self.row_lengths = batch.row_lengths
        self.vocab = min(student.vocab, teacher.vocab)
        rows = max(1, chunk_bytes // (4 * self.vocab))
        assert self.labels is not None
        self.chunks = [slice(i, min(i + rows, len(self.labels))) for i in range(0, len(self.labels), rows)]

    def student_logprobs(self, chunk: slice) -> Tensor:
        """`[C, V]`, normalised over the common vocabulary."""
        return torch.log_softmax(logits(self.student.at(chunk), self.vocab), -1).clamp_min(LOGPROB_FLOOR)

    def teacher_logprobs(self, chunk: slice) -> Tensor:
        """The same of the teacher."""
        assert self.labels is not None
        found = teacher_logits(self.teacher.at(chunk), self.labels[chunk], self.vocab, self.student.hidden)
        return torch.log_softmax(found, -1).clamp_min(LOGPROB_FLOOR)

    def inputs(self, chunk: slice) -> TileInputs:
        assert self.labels is not None
        draws = self.labels[chunk, None] if self.part.given else None
        return TileInputs(self.labels[chunk], None if self.uniforms is None else self.uniforms[chunk], draws)


@torch.no_grad()
def _look(
    data: _PartData, strategy: StrategyConfig, sums: Sums, metric_stride: int
) -> list[dict[str, Tensor]]:
    """Values and metrics as they are now; tokens, weights and log-probabilities of each term that has
    ratios."""
    found: list[list[dict[str, Tensor]]] = [[] for _ in data.part.terms]
    for chunk in data.chunks:
        log_q, log_p = data.student_logprobs(chunk), data.teacher_logprobs(chunk)
        q = log_q.exp()
        for place, term in zip(found, data.part.terms, strict=True):
            columns, weights = weigh(term, log_p, log_q, q, data.inputs(chunk), sums)
            if has_ratio(term.support):
                assert columns.tokens is not None
                place.append(
                    {
                        "tokens": columns.tokens,
                        "advantages": weights,
                        "old": columns.student_logprobs,
                        "teacher": columns.teacher_logprobs[:, 0],
                    }
                )
            else:
                label = data.inputs(chunk).labels[:, None]
                place.append({"old": log_q.gather(1, label), "teacher": log_p.gather(1, label)[:, 0]})
        if data.part.first:
            add(sums, tokens=torch.ones_like(log_q[:, 0]))
            if metric_stride:
                rows = slice(-chunk.start % metric_stride, None, metric_stride)
                distribution_metrics(log_p[rows].clone(), log_q[rows].clone(), sums)
    return [
        {name: torch.cat([piece[name] for piece in place]) for name in place[0]} for place in found if place
    ]


@torch.no_grad()
def _freeze(
    data: _PartData, seen: list[dict[str, Tensor]], strategy: StrategyConfig, teacher_share: float
) -> list[dict[str, Tensor]]:
    """Advantages and the likelihood under whoever wrote the tokens, for all updates of a batch."""
    out = []
    for term, state in zip(data.part.terms, seen, strict=False):
        state = dict(state)
        teacher = state.pop("teacher")
        if term.support.given or term.support.label or not has_ratio(term.support):
            state["old"] = torch.cat(
                [_writer(data, term, state["old"][:, :1], teacher, teacher_share), state["old"][:, 1:]], 1
            )
        if term.support.given and strategy.discount:
            assert data.rows is not None
            state["advantages"] = _returns(state["advantages"][:, 0], data.rows, strategy)[:, None]
        out.append(state)
    return out


def _writer(data: _PartData, term: Term, own: Tensor, teacher: Tensor, teacher_share: float) -> Tensor:
    """Log-probability of the labels for whoever wrote them, `[N, 1]`."""
    if teacher_share and term.on == "student":
        return torch.logaddexp(own[:, 0] + math.log(1.0 - teacher_share), teacher + math.log(teacher_share))[
            :, None
        ]
    if data.behaviour is None:
        return own
    known = torch.isfinite(data.behaviour)
    return torch.where(known, data.behaviour, own[:, 0])[:, None].to(own.dtype)


def _returns(advantages: Tensor, rows: Tensor, strategy: StrategyConfig) -> Tensor:
    sums = discounted_returns(advantages, rows, strategy.discount)
    counts = discounted_returns(torch.ones_like(advantages), rows, 1.0)
    if strategy.later_only:
        sums, counts = sums - advantages, counts - 1
    return sums / counts.clamp_min(1.0) if strategy.normalize_returns else sums


def _coefficients(
    data: _PartData, strategy: StrategyConfig, scale: Tensor | float, row_scale: Tensor | float
) -> Tensor:
    """What each position counts, `[N]`."""
    assert data.labels is not None
    ones = torch.ones(len(data.labels), device=data.labels.device, dtype=torch.float32)
    if strategy.mean == "token":
        return ones * scale
    assert data.row_lengths is not None
    assert data.rows is not None
    return ones * row_scale / data.row_lengths[data.rows]


def _surrogate(
    data: _PartData,
    state: list[dict[str, Tensor]],
    coefficients: Tensor,
    strategy: StrategyConfig,
    sums: Sums,
) -> Tensor:
    """The differentiable loss of a part."""
    head = data.student.head
    total = data.student.hidden.new_zeros((), dtype=torch.float32)
    if not data.chunks and data.student.hidden.requires_grad:
        return total + 0.0 * data.student.hidden.sum()  # keeps the parameters in DDP's graph
    for chunk in data.chunks:
        pieces = [{name: values[chunk] for name, values in piece.items()} for piece in state]

        def run(
            hidden: Tensor,
            weight: Tensor | None,
            bias: Tensor | None,
            chunk: slice = chunk,
            pieces: Any = pieces,
        ) -> tuple[Tensor, ...]:
            side = Scores(hidden, head._replace(weight=weight, bias=bias))
            return _chunk_loss(data, side, chunk, pieces, coefficients[chunk], strategy)

        loss, clipped, drift = checkpoint(
            run,
            data.student.hidden[chunk],
            head.weight,
            head.bias,
            use_reentrant=False,
            preserve_rng_state=False,
        )  # type: ignore[misc]
        total = total + loss
        add(sums, **{"policy/clipped": clipped.detach(), "policy/kl_old": drift.detach()})
    return total


def _chunk_loss(
    data: _PartData,
    side: Scores,
    chunk: slice,
    pieces: Sequence[dict[str, Tensor]],
    coefficients: Tensor,
    strategy: StrategyConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    log_q = torch.log_softmax(logits(side, data.vocab), -1).clamp_min(LOGPROB_FLOOR)
    inputs = data.inputs(chunk)
    loss, clipped, drift = log_q.new_zeros(()), log_q.new_zeros(len(log_q)), log_q.new_zeros(len(log_q))
    for term, piece in zip(data.part.terms, pieces, strict=False):
        if has_ratio(term.support):
            log_ratio = log_q.gather(1, piece["tokens"]) - piece["old"]
            gained, cut = clipped_surrogate(log_ratio.exp(), piece["advantages"], strategy)
            loss = loss - term.weight * (gained.sum(-1) * coefficients).sum()
            clipped = clipped + cut.to(clipped.dtype).mean(-1)
            drift = drift + (torch.expm1(log_ratio) - log_ratio).mean(-1)
            continue
        with torch.no_grad():
            log_p = data.teacher_logprobs(chunk)
            _, weights = weigh(term, log_p, log_q, log_q.exp(), inputs, {})
            ratio = (
                (log_q.gather(1, inputs.labels[:, None]) - piece["old"])[:, 0]
                .exp()
                .clamp_max(1.0 + strategy.clip_high)
            )
            # 1 where the student itself wrote the text just now, and for the dataset's text.
            share = ratio if term.on == "student" else torch.ones_like(ratio)
        likelihood = weights * term.support.columns(log_p, log_q, inputs.labels).student_logprobs
        loss = loss - term.weight * (likelihood.sum(-1) * coefficients * share).sum()
    return loss, clipped, drift
