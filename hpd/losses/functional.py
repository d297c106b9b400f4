"""The losses as plain functions, for people with a training loop of their own.

Axes: B rows, T tokens, V vocabulary, D hidden, N label positions.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.batch import IGNORE_INDEX
from hpd.losses.heads import POLICIES, Head, Scores
from hpd.losses.operator import LossOutput, reweighted_nll
from hpd.methods.terms import ObjectiveLike, Term, TermConfig, parameters_of, with_parameters

__all__ = ["distillation_loss", "fused_distillation_loss"]

_REDUCTIONS = ("mean", "sum")


def distillation_loss(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T Vt"],
    labels: Int[Tensor, "B T"],
    objective: ObjectiveLike = "hpd",
    draws: Int[Tensor, "B T-1"] | Int[Tensor, "B T-1 n"] | Literal["exact"] | None = None,
    vocab: str = "shared_prefix",
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    **params: Any,
) -> LossOutput:
    r"""Any objective of the table on logits, with the next-token shift inside.

    .. math:: L = \frac{1}{N} \sum_n \sum_{v \in S} c_v d_v \quad\text{with gradient}\quad
              -\frac{1}{N} \sum_n \sum_{v \in S} c_v\, \mathrm{sg}[w_v] \nabla \log q_v

    Args:
        student_logits: position t predicts `labels[:, t + 1]`, as Hugging Face models return them; the
            gradient flows here.
        teacher_logits: never differentiated.
        labels: token ids; `ignore_index` marks positions without a label.
        objective: a name of OBJECTIVES, "package.module:name", an `Objective`, or a factory of one.
        draws: the student's tokens at positions 0 to T-2, instead of fresh ones from `generator`; "exact":
            HPD's expectation over the draw.
        vocab: `shared_prefix` cuts both to the shorter vocabulary and drops labels beyond; `error` refuses
            unequal ones.
        reduction: `mean` over the label tokens, or `sum`.
        **params: the objective's parameters, and fields of `TermConfig` (temperature, num_draws, draw_share,
            support, ...).

    Returns:
        The loss, and sums over label tokens of every metric (`stats["tokens"]` counts them).

    Raises:
        ValueError: unknown name or parameter, unequal shapes or vocabularies.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 3, 2, requires_grad=True), torch.tensor([[[1.0, 0.0]] * 3])
    >>> distillation_loss(student, teacher, torch.tensor([[0, 1, 0]]), "forward_kl").loss
    tensor(0.1110, grad_fn=<ReweightedNLLBackward>)
    """
    student = Scores(student_logits.flatten(0, 1), Head(None))
    teacher = Scores(teacher_logits.flatten(0, 1), Head(None))
    return _loss(
        student, teacher, labels, objective, draws, vocab, ignore_index, reduction, generator, params
    )


def fused_distillation_loss(
    student_hidden: Float[Tensor, "B T D"],
    student_head: Float[Tensor, "V D"] | Head,
    teacher_hidden: Float[Tensor, "B T Dt"],
    teacher_head: Float[Tensor, "Vt Dt"] | Head,
    labels: Int[Tensor, "B T"],
    objective: ObjectiveLike = "hpd",
    draws: Int[Tensor, "B T-1"] | Int[Tensor, "B T-1 n"] | Literal["exact"] | None = None,
    vocab: str = "shared_prefix",
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    **params: Any,
) -> LossOutput:
    """`distillation_loss(hidden @ head.T, ...)` without any logits kept: only label positions reach a head,
    in chunks.

    Args:
        student_hidden: last hidden states, after the final norm; the gradient flows here and to the head.
        student_head: the output projection's weight, or a `Head` with bias, logit scale and softcap.
        teacher_hidden, teacher_head: the same of the teacher; never differentiated.

    The other arguments, the result and the errors are those of `distillation_loss`.
    """
    heads = (head if isinstance(head, Head) else Head(head) for head in (student_head, teacher_head))
    hidden = (student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1))
    student, teacher = map(Scores, hidden, heads)
    return _loss(
        student, teacher, labels, objective, draws, vocab, ignore_index, reduction, generator, params
    )


def _loss(
    student: Scores,
    teacher: Scores,
    labels: Tensor,
    objective: ObjectiveLike,
    draws: Tensor | str | None,
    vocab: str,
    ignore_index: int,
    reduction: str,
    generator: torch.Generator | None,
    params: dict[str, Any],
) -> LossOutput:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}.")
    if len(student.hidden) != labels.numel() or len(teacher.hidden) != labels.numel():
        raise ValueError(
            f"labels are {tuple(labels.shape)}, but the student has {len(student.hidden)} positions and the "
            f"teacher {len(teacher.hidden)}: all three need the same B and T."
        )
    if isinstance(draws, str):
        draws, params = None, {**params, "draws": draws}
    term = _term(objective, params)
    shared = _shared(student.vocab, teacher.vocab, vocab)
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = torch.where(
        (labels[:, 1:] == ignore_index) | (labels[:, 1:] >= shared), IGNORE_INDEX, labels[:, 1:]
    )
    index = (targets != IGNORE_INDEX).flatten().nonzero().flatten()
    chosen = targets.flatten()[index]
    uniforms = None
    if draws is not None:
        draws = _aligned(draws, labels)[index]
    elif term.support.num_uniforms:
        uniforms = torch.rand(
            len(index),
            term.support.num_uniforms,
            dtype=torch.float64,
            device=index.device,
            generator=generator,
        )
    scale = 1.0 / max(len(index), 1) if reduction == "mean" else 1.0
    return reweighted_nll(
        Scores(student.hidden[index], student.head),
        Scores(teacher.hidden[index], teacher.head),
        chosen,
        [term],
        uniforms=uniforms,
        draws=draws,
        scale=scale,
    )


def _term(objective: ObjectiveLike, params: dict[str, Any]) -> Term:
    term = with_parameters(TermConfig(objective=objective), params)
    known = {*parameters_of(objective), *(f.name for f in fields(term))}
    if unknown := [key for key in params if key not in known]:
        raise ValueError(f"Objective {term.name!r} has no parameter {unknown[0]!r}.")
    return term.build()


def _shared(student: int, teacher: int, policy: str) -> int:
    if policy not in POLICIES:
        raise ValueError(f"vocab must be one of {', '.join(POLICIES)}, got {policy!r}.")
    if policy == "error" and student != teacher:
        raise ValueError(
            f"The student has {student} tokens and the teacher {teacher}: set vocab='shared_prefix' to cut."
        )
    return min(student, teacher)


def _aligned(draws: Tensor, labels: Tensor) -> Int[Tensor, "BT n"]:
    """Draws of positions 0 to T-2, laid out like the flattened batch."""
    if draws.shape[:2] != (labels.shape[0], labels.shape[1] - 1):
        raise ValueError(
            f"draws must be [B, T-1] or [B, T-1, n] beside labels {tuple(labels.shape)}, got "
            f"{tuple(draws.shape)}."
        )
    draws = draws.reshape(*draws.shape[:2], -1)
    return torch.nn.functional.pad(draws, (0, 0, 0, 1)).flatten(0, 1)
