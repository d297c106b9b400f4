r"""How a weight meets the gradient: directly, or as the advantage of a clipped policy gradient.

Axes: N label positions, C positions of a chunk, K columns of a support, V vocabulary, R rows.

With A the objective's weight at a token (for drawn tokens divided by their probability), frozen when the
rollouts are new, and :math:`r = q / q_{old}` the token's likelihood ratio, the loss of a token is

.. math:: -\min\big(r A,\; \mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A\big), \qquad
          \text{but never above } -c A \text{ where } A < 0 \text{ (dual clip)}

At r = 1 its gradient is that of the direct strategy, :math:`-A \nabla \log q`. Terms on whole distributions
(full, top_k) have no token to take a ratio of: their weights are computed again at every update.

Unlike the reference's verl recipe, the draw for a label is compared with that label and not with the token
before it.

Reference:
    Schulman et al., PPO, 2017, arXiv 1707.06347; Ye et al., 2020, arXiv 1912.09729 (dual clip); Yu et al.,
    DAPO, 2025, arXiv 2503.14476 (two clip bounds); Zhu et al., PSFT, 2025, arXiv 2508.17784 (A = 1 at the
    label).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hpd.batch import TokenBatch
from hpd.losses.by_source import SourcePart, parts_of, weights_of
from hpd.losses.heads import Scores, TeacherScores
from hpd.losses.measures import distribution_metrics
from hpd.losses.operator import LossOutput, default_chunk_bytes
from hpd.losses.products import chunks, logits
from hpd.losses.teacher_side import teacher_logits
from hpd.losses.tile import Sums, TileInputs, add, weigh
from hpd.methods.strategy import StrategyConfig
from hpd.methods.supports import LOGPROB_FLOOR, has_ratio, raise_excluded_
from hpd.methods.terms import Term

__all__ = ["Frozen", "clipped_surrogate", "discounted_returns", "policy_gradient_nll"]

Frozen: TypeAlias = list[list[dict[str, Tensor]]]
"""State of a batch's first update for its further ones, by part and term: tokens, advantages and
old_logprobs (of a term without ratios the labels' old_logprobs only)."""


def clipped_surrogate(
    ratio: Float[Tensor, "..."], advantages: Float[Tensor, "..."], strategy: StrategyConfig
) -> tuple[Float[Tensor, "..."], Bool[Tensor, "..."]]:
    """The gain to be maximized at each token, and True where its gradient is cut off.

    >>> ratio, advantages = torch.tensor([1.5, 0.5]), torch.tensor([1.0, 1.0])
    >>> clipped_surrogate(ratio, advantages, StrategyConfig(type="policy_gradient"))
    (tensor([1.2000, 0.5000]), tensor([ True, False]))
    """
    held = ratio.clamp(1.0 - strategy.clip_low, 1.0 + strategy.clip_high)
    plain = ratio * advantages
    result = torch.minimum(plain, held * advantages)
    clipped = held * advantages < plain
    if strategy.dual_clip is not None:
        floor = strategy.dual_clip * advantages
        beyond = (advantages < 0) & (result < floor)
        result = torch.where(beyond, floor, result)
        clipped = clipped | beyond
    return result, clipped


def discounted_returns(
    values: Float[Tensor, "N"], rows: Int[Tensor, "N"], discount: float
) -> Float[Tensor, "N"]:
    r""":math:`\sum_{k \ge 0} \gamma^k x_{n + k}` over the rest of each position's row, in log2(N) passes.

    >>> discounted_returns(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 0.5)
    tensor([2., 2., 4.])
    """
    out = values.clone()
    distance = 1
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
    frozen: Frozen | None,
    uniforms: Float[Tensor, "N u"] | None,
    scale: Tensor | float,
    row_scale: Tensor | float,
    position_weights: Mapping[str, Float[Tensor, "N"]] | None = None,
    chunk_bytes: int | None = None,
    metric_stride: int = 1,
    teacher_share: float = 0.0,
) -> tuple[LossOutput, Frozen]:
    """The objective's value, with the gradient of the clipped surrogate.

    One chunk of logits is alive at a time; it is computed again in the backward pass.

    Args:
        student, teacher, batch, terms: as for `loss_by_source`.
        strategy: clipping, mean and returns.
        frozen: of this batch's first update; None: this is the first.
        uniforms: for the draws of the first update.
        scale: 1 / (label tokens of the global batch); multiplies the value, and the gradient of a token mean.
        row_scale: 1 / (rows of the global batch), for a sequence mean.
        position_weights: by term; they multiply its advantages, or the weights of one without ratios.
        chunk_bytes: memory of one chunk of logits; None: `default_chunk_bytes`.
        metric_stride: full-distribution metrics on every n-th position; 0 for none.
        teacher_share: the teacher's share of the mixture that wrote the student's text.

    Returns:
        The loss, and what the further updates of the batch need.
    """
    sums: Sums = {}
    kept: Frozen = []
    total = student.hidden.new_zeros((), dtype=torch.float32)
    chunk_bytes = chunk_bytes or default_chunk_bytes(batch.labels.device)
    for number, part in enumerate(parts_of(batch, terms)):
        weights = weights_of(part, position_weights)
        data = _PartData(part, student, teacher, batch, uniforms, chunk_bytes, weights)
        now = _measure(data, sums, metric_stride if part.first else 0)
        if frozen is None:
            kept.append(_freeze(data, now, strategy, teacher_share))
        else:
            kept.append([_renamed(state) for state in frozen[number]])
        total = total + _surrogate(
            data, kept[-1], _coefficients(data, strategy, scale, row_scale), strategy, sums
        )
    value = sum(term.weight * sums.get(f"value/{term.name}", 0.0) for term in terms)
    # The value is the objective, so that logs of both strategies are comparable.
    loss = total - total.detach() + torch.as_tensor(value, device=total.device) * scale
    return LossOutput(loss, sums), kept


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the names of today: older checkpoints say old."""
    return {"old_logprobs" if name == "old" else name: values for name, values in state.items()}


class _PartData:
    """One writer's positions, in chunks."""

    def __init__(
        self,
        part: SourcePart,
        student: Scores,
        teacher: TeacherScores,
        batch: TokenBatch,
        uniforms: Tensor | None,
        chunk_bytes: int,
        weights: dict[str, Tensor],
    ):
        at = slice(None) if part.positions is None else part.positions
        self.part = part
        self.student = student.at(part.positions)
        self.teacher = teacher.at(part.positions)
        self.labels = batch.labels[at]
        self.rows, self.behavior_logprobs, self.uniforms = (
            None if x is None else x[at] for x in (batch.rows, batch.behavior_logprobs, uniforms)
        )
        self.row_lengths = batch.row_lengths
        self.weights = weights
        self.vocab = min(student.vocab, teacher.vocab)
        self.chunks = list(chunks(len(self.labels), 4 * self.vocab, chunk_bytes))

    def student_logprobs(self, chunk: slice) -> Float[Tensor, "C V"]:
        """Normalized over the common vocabulary."""
        return torch.log_softmax(logits(self.student.at(chunk), self.vocab), -1).clamp_min(LOGPROB_FLOOR)

    def teacher_logprobs(self, chunk: slice) -> Float[Tensor, "C V"]:
        """The same of the teacher."""
        found = teacher_logits(self.teacher.at(chunk), self.labels[chunk], self.vocab, self.student.hidden)
        return raise_excluded_(torch.log_softmax(found, -1))

    def inputs(self, chunk: slice) -> TileInputs:
        draws = self.labels[:, None] if self.part.given else None
        whole = TileInputs(self.labels, self.uniforms, draws, position_weights=self.weights or None)
        return whole.rows(chunk)


@torch.no_grad()
def _measure(data: _PartData, sums: Sums, metric_stride: int) -> list[dict[str, Tensor]]:
    """Values and metrics as they are now; tokens, weights and log-probabilities of terms that have ratios."""
    found: list[list[dict[str, Tensor]]] = [[] for _ in data.part.terms]
    for chunk in data.chunks:
        log_q, log_p = data.student_logprobs(chunk), data.teacher_logprobs(chunk)
        q = log_q.exp()
        inputs = data.inputs(chunk)
        for pieces, term in zip(found, data.part.terms, strict=True):
            columns, weights = weigh(term, log_p, log_q, q, inputs, sums)
            if has_ratio(term.support):
                assert columns.tokens is not None
                piece = {
                    "tokens": columns.tokens,
                    "advantages": weights,
                    "old_logprobs": columns.student_logprobs,
                    "teacher": columns.teacher_logprobs[:, 0],
                }
            else:
                label = inputs.labels[:, None]
                piece = {"old_logprobs": log_q.gather(1, label), "teacher": log_p.gather(1, label)[:, 0]}
            pieces.append(piece)
        if data.part.first:
            add(sums, tokens=torch.ones_like(log_q[:, 0]))
            if metric_stride:
                rows = slice(-chunk.start % metric_stride, None, metric_stride)
                distribution_metrics(log_p[rows].clone(), log_q[rows].clone(), inputs.labels[rows], sums)
    return [
        {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        for pieces in found
        if pieces
    ]


@torch.no_grad()
def _freeze(
    data: _PartData, now: list[dict[str, Tensor]], strategy: StrategyConfig, teacher_share: float
) -> list[dict[str, Tensor]]:
    """Advantages and the likelihood under the behavior policy, for all updates of a batch."""
    out = []
    for term, state in zip(data.part.terms, now, strict=False):
        state = dict(state)
        teacher_logprobs = state.pop("teacher")
        if term.support.given or term.support.label or not has_ratio(term.support):
            # The first column is the label, which the behavior policy wrote; the others are fresh draws.
            label, draws = state["old_logprobs"].split([1, state["old_logprobs"].shape[1] - 1], 1)
            written = _behavior_logprobs(data, term, label[:, 0], teacher_logprobs, teacher_share)
            state["old_logprobs"] = torch.cat([written[:, None], draws], 1)
        if term.support.given and strategy.discount:
            assert data.rows is not None
            state["advantages"] = _returns(state["advantages"][:, 0], data.rows, strategy)[:, None]
        out.append(state)
    return out


def _behavior_logprobs(
    data: _PartData,
    term: Term,
    student_logprobs: Float[Tensor, "N"],
    teacher_logprobs: Float[Tensor, "N"],
    teacher_share: float,
) -> Float[Tensor, "N"]:
    """Log-probability of the labels under the policy that wrote them."""
    if teacher_share and term.on == "student":
        return torch.logaddexp(
            student_logprobs + math.log(1.0 - teacher_share), teacher_logprobs + math.log(teacher_share)
        )
    if data.behavior_logprobs is None:
        return student_logprobs
    known = torch.isfinite(data.behavior_logprobs)
    return torch.where(known, data.behavior_logprobs, student_logprobs).to(student_logprobs.dtype)


def _returns(
    advantages: Float[Tensor, "N"], rows: Int[Tensor, "N"], strategy: StrategyConfig
) -> Float[Tensor, "N"]:
    sums = discounted_returns(advantages, rows, strategy.discount)
    counts = discounted_returns(torch.ones_like(advantages), rows, 1.0)
    if strategy.later_only:
        sums = sums - advantages
        counts = counts - 1
    return sums / counts.clamp_min(1.0) if strategy.normalize_returns else sums


def _coefficients(
    data: _PartData, strategy: StrategyConfig, scale: Tensor | float, row_scale: Tensor | float
) -> Float[Tensor, "N"]:
    """The factor of each position."""
    ones = torch.ones(len(data.labels), device=data.labels.device, dtype=torch.float32)
    if strategy.mean == "token":
        return ones * scale
    assert data.row_lengths is not None
    assert data.rows is not None
    return ones * row_scale / data.row_lengths[data.rows]


def _surrogate(
    data: _PartData,
    state: list[dict[str, Tensor]],
    coefficients: Float[Tensor, "N"],
    strategy: StrategyConfig,
    sums: Sums,
) -> Float[Tensor, ""]:
    """The differentiable loss of a part."""
    head = data.student.head
    total = data.student.hidden.new_zeros((), dtype=torch.float32)
    if not data.chunks and data.student.hidden.requires_grad:
        return total + 0.0 * data.student.hidden.sum()  # keeps the parameters in DDP's graph

    def run(
        hidden: Tensor, weight: Tensor | None, bias: Tensor | None, chunk: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = Scores(hidden, head._replace(weight=weight, bias=bias))
        pieces = [{name: values[chunk] for name, values in piece.items()} for piece in state]
        return _chunk_loss(data, scores, chunk, pieces, coefficients[chunk], strategy)

    for chunk in data.chunks:
        loss, clipped_ratio, approx_kl = checkpoint(
            run,
            data.student.hidden[chunk],
            head.weight,
            head.bias,
            chunk,
            use_reentrant=False,
            preserve_rng_state=False,
        )  # type: ignore[misc]
        total = total + loss
        add(sums, **{"policy/clipped": clipped_ratio.detach(), "policy/kl_old": approx_kl.detach()})
    return total


def _chunk_loss(
    data: _PartData,
    student: Scores,
    chunk: slice,
    pieces: Sequence[dict[str, Tensor]],
    coefficients: Float[Tensor, "C"],
    strategy: StrategyConfig,
) -> tuple[Float[Tensor, ""], Float[Tensor, "C"], Float[Tensor, "C"]]:
    """Loss; share of clipped ratios, and Schulman's k3 estimate of KL(old || new), at each position."""
    log_q = torch.log_softmax(logits(student, data.vocab), -1).clamp_min(LOGPROB_FLOOR)
    inputs = data.inputs(chunk)
    loss = log_q.new_zeros(())
    clipped_ratio, approx_kl = log_q.new_zeros(2, len(log_q))
    for term, piece in zip(data.part.terms, pieces, strict=False):
        if has_ratio(term.support):
            log_ratio = log_q.gather(1, piece["tokens"]) - piece["old_logprobs"]
            gained, clipped = clipped_surrogate(log_ratio.exp(), piece["advantages"], strategy)
            loss = loss - term.weight * (gained.sum(-1) * coefficients).sum()
            clipped_ratio = clipped_ratio + clipped.to(clipped_ratio.dtype).mean(-1)
            approx_kl = approx_kl + (torch.expm1(log_ratio) - log_ratio).mean(-1)
            continue
        with torch.no_grad():
            log_p = data.teacher_logprobs(chunk)
            _, weights = weigh(term, log_p, log_q, log_q.exp(), inputs, {})
            log_ratio = (log_q.gather(1, inputs.labels[:, None]) - piece["old_logprobs"])[:, 0]
            ratio = log_ratio.exp().clamp_max(1.0 + strategy.clip_high)
            # 1 where the student itself wrote the text just now, and for the dataset's text.
            share = ratio if term.on == "student" else torch.ones_like(ratio)
        likelihood = weights * term.support.columns(log_p, log_q, inputs.labels).student_logprobs
        loss = loss - term.weight * (likelihood.sum(-1) * coefficients * share).sum()
    return loss, clipped_ratio, approx_kl
