"""The losses as plain functions, for people with a training loop of their own.

Axes: B rows, T tokens, V vocabulary, D hidden, N label positions.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpd.batch import IGNORE_INDEX
from hpd.losses.heads import POLICIES, Head, Scores
from hpd.losses.operator import LossOutput, reweighted_nll
from hpd.methods.names import new_keys
from hpd.methods.terms import ObjectiveLike, Term, TermConfig, parameters_of, with_parameters

__all__ = ["distillation_loss", "fused_distillation_loss"]

_REDUCTIONS = ("mean", "sum")

_DEFAULTS = {f.name: f.default for f in fields(TermConfig)}
# Fields of TermConfig that say how tokens are drawn; those that are given were drawn elsewhere, from the
# student as it is.
_OF_DRAWING = ("sample_fraction", "draw_temperature", "exclude_label")


def distillation_loss(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T Vt"],
    labels: Int[Tensor, "B T"],
    objective: ObjectiveLike = "hpd",
    draws: Int[Tensor, "B T-1"] | Int[Tensor, "B T-1 n"] | Literal["exact"] | None = None,
    vocabulary: str = "error",
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
        teacher_logits: never differentiated. A token that is masked (-inf, or a number that stands for it)
            has :math:`p_v = 0` and :math:`\log p_v` = -104 (`EXCLUDED_LOGPROB`), so no weight is infinite.
        labels: token ids; `ignore_index` marks positions without a label.
        objective: a name of OBJECTIVES, "package.module:name", an `Objective`, or a factory of one.
        draws: the student's tokens at positions 0 to T-2, drawn from its unchanged distribution, instead of
            fresh ones from `generator`; "exact": HPD's expectation over the draw.
        vocabulary: `error` refuses unequal vocabularies; `shared_prefix` cuts both to the shorter one and
            drops labels beyond it, as `train.vocabulary` does in a recipe.
        reduction: `mean` over the label tokens, or `sum`.
        **params: the objective's parameters, and fields of `TermConfig` (temperature, num_samples,
            sample_fraction, support, ...).

    Returns:
        The loss, and the mean of every metric over the label tokens, whatever the reduction;
        `stats["tokens"]` and `stats["metric_tokens"]` count them.

    Raises:
        ValueError: unknown name or parameter, one without effect, unequal shapes or vocabularies, or a
            label or draw that is not a token.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 3, 2, requires_grad=True), torch.tensor([[[1.0, 0.0]] * 3])
    >>> distillation_loss(student, teacher, torch.tensor([[0, 1, 0]]), "forward_kl").loss
    tensor(0.1110, grad_fn=<ReweightedNLLBackward>)
    """
    _check_shapes(labels, student=student_logits, teacher=teacher_logits)
    student = Scores(student_logits.flatten(0, 1), Head(None))
    teacher = Scores(teacher_logits.flatten(0, 1), Head(None))
    return _loss(
        student, teacher, labels, objective, draws, vocabulary, ignore_index, reduction, generator, params
    )


def fused_distillation_loss(
    student_hidden: Float[Tensor, "B T D"],
    student_head: Float[Tensor, "V D"] | Head | nn.Module,
    teacher_hidden: Float[Tensor, "B T Dt"],
    teacher_head: Float[Tensor, "Vt Dt"] | Head | nn.Module,
    labels: Int[Tensor, "B T"],
    objective: ObjectiveLike = "hpd",
    draws: Int[Tensor, "B T-1"] | Int[Tensor, "B T-1 n"] | Literal["exact"] | None = None,
    vocabulary: str = "error",
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    **params: Any,
) -> LossOutput:
    """`distillation_loss(hidden @ head.T, ...)` without any logits kept: only label positions reach a head,
    in chunks.

    Args:
        student_hidden: last hidden states, after the final norm; the gradient flows here and to the head.
        student_head: the output projection: an `nn.Linear` such as `model.lm_head`, its weight, or a `Head`
            with bias, logit scale and softcap, as `hpd.losses.head_of(model)` finds them.
        teacher_hidden: the teacher's, never differentiated.
        teacher_head: the teacher's projection, in one of the same forms.

    The other arguments, the result and the errors are those of `distillation_loss`.
    """
    _check_shapes(labels, student=student_hidden, teacher=teacher_hidden)
    student = Scores(student_hidden.flatten(0, 1), _as_head("student", student_head, student_hidden))
    teacher = Scores(teacher_hidden.flatten(0, 1), _as_head("teacher", teacher_head, teacher_hidden))
    return _loss(
        student, teacher, labels, objective, draws, vocabulary, ignore_index, reduction, generator, params
    )


def _loss(
    student: Scores,
    teacher: Scores,
    labels: Tensor,
    objective: ObjectiveLike,
    draws: Tensor | str | None,
    vocabulary: str,
    ignore_index: int,
    reduction: str,
    generator: torch.Generator | None,
    params: dict[str, Any],
) -> LossOutput:
    params = new_keys(params)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}.")
    if "vocab" in params:
        warnings.warn(
            "The parameter vocab is called vocabulary, as in DistillConfig.", DeprecationWarning, stacklevel=3
        )
        vocabulary = params["vocab"]
        params = {name: value for name, value in params.items() if name != "vocab"}
    if isinstance(draws, str):
        draws, params = None, {**params, "draws": draws}
    term = _term(objective, params)
    _check_used(term, draws, generator, params)
    index, chosen = _label_positions(labels, ignore_index, student.vocab, teacher.vocab, vocabulary)
    uniforms = None
    if draws is not None:
        draws = _aligned(draws, labels)[index]
        _check_draws(draws, _shared(student.vocab, teacher.vocab, vocabulary))
    elif term.support.num_uniforms:
        uniforms = torch.rand(
            len(index),
            term.support.num_uniforms,
            dtype=torch.float64,
            device=index.device,
            generator=generator,
        )
    scale = 1.0 / max(len(index), 1) if reduction == "mean" else 1.0
    loss, sums = reweighted_nll(
        Scores(student.hidden[index], student.head),
        Scores(teacher.hidden[index], teacher.head),
        chosen,
        [term],
        uniforms=uniforms,
        draws=draws,
        scale=scale,
    )
    return LossOutput(loss, _per_token(sums))


def _per_token(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over label tokens, and how many there were; nothing is read from the device."""
    counts = ("tokens", "metric_tokens")
    num_tokens = sums["tokens"].clamp(min=1) if "tokens" in sums else 1
    return {name: value if name in counts else value / num_tokens for name, value in sums.items()}


def _check_shapes(labels: Tensor, **scores: Tensor) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are token ids, and these are of type {labels.dtype}.")
    for role, values in scores.items():
        if values.ndim != 3 or labels.ndim != 2 or values.shape[:2] != labels.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)} and the {role}'s logits or hidden states "
                f"{tuple(values.shape)}: labels are [B, T], the others [B, T, ...], with the same B and T."
            )


def _as_head(role: str, head: Tensor | Head | nn.Module, hidden: Tensor) -> Head:
    if isinstance(head, nn.Linear):
        head = Head(head.weight, head.bias)
    elif isinstance(head, Tensor):
        head = Head(head)
    elif not isinstance(head, Head):
        raise ValueError(
            f"The {role}'s head is a {type(head).__name__}: give an nn.Linear, its weight, or a Head, as "
            "hpd.losses.head_of(model) makes it, which also reads adapters, logit scales and softcaps."
        )
    if head.weight is not None and head.weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"The {role}'s head has a weight of {tuple(head.weight.shape)} and its hidden states "
            f"{tuple(hidden.shape)}: their last dimensions must be equal."
        )
    return head


def _label_positions(
    labels: Tensor, ignore_index: int, num_student: int, num_teacher: int, policy: str
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Flattened positions that have a label within both vocabularies, and that label."""
    shared = _shared(num_student, num_teacher, policy)
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = torch.where(labels[:, 1:] == ignore_index, IGNORE_INDEX, labels[:, 1:])
    index = (targets != IGNORE_INDEX).flatten().nonzero().flatten()
    chosen = targets.flatten()[index]
    known = max(num_student, num_teacher)
    wrong = chosen[(chosen < 0) | (chosen >= known)]
    if len(wrong):
        raise ValueError(
            f"Label {int(wrong[0])} is not a token: the vocabulary has {known}. Mark positions without a "
            f"label with ignore_index ({ignore_index})."
        )
    within = chosen < shared
    return index[within], chosen[within]


def _term(objective: ObjectiveLike, params: dict[str, Any]) -> Term:
    term = with_parameters(TermConfig(objective=objective), params)
    known = {*parameters_of(objective), *(f.name for f in fields(term))}
    if unknown := [key for key in params if key not in known]:
        raise ValueError(f"Objective {term.name!r} has no parameter {unknown[0]!r}.")
    return term.build()


def _check_used(term: Term, draws: Tensor | None, generator: torch.Generator | None, params: Any) -> None:
    """Refuse arguments that would change nothing."""
    support, idle = term.support, []
    if term.positions is not None:
        raise ValueError(
            f"weight: a rule over positions ({term.positions}) reads rows as a trainer lays them out: give "
            "reweighted_nll position_weights, or set labels that weigh nothing to ignore_index."
        )
    why = f"the support {support} draws no tokens. Choose label+sampled or sampled, or"
    if not support.draws:
        idle = [name for name, value in (("draws", draws), ("generator", generator)) if value is not None]
    elif draws is None and support.given:
        raise ValueError(
            f"The support of {term.name!r} is the tokens that the student wrote: give them as draws."
        )
    elif draws is not None:
        why = "the tokens were drawn already. Leave out draws, or"
        idle = [name for name in _OF_DRAWING if params.get(name, _DEFAULTS[name]) != _DEFAULTS[name]]
        number = draws.shape[2] if draws.ndim > 2 else 1
        idle += ["num_samples"] if params.get("num_samples", number) != number else []
        idle += ["draws_of"] if support.draws_of == "teacher" and not support.importance else []
        idle += ["generator"] if generator is not None else []
    if not idle and "on" in params and not support.given:
        idle, why = ["on"], "it tells whose rows a trainer learns from, and these labels have no writer:"
    if idle:
        raise ValueError(f"{', '.join(idle)} has no effect: {why} remove {', '.join(idle)}.")


def _shared(student: int, teacher: int, policy: str) -> int:
    if policy not in POLICIES:
        raise ValueError(f"vocabulary must be one of {', '.join(POLICIES)}, got {policy!r}.")
    if policy == "error" and student != teacher:
        raise ValueError(
            f"The student has {student} tokens and the teacher {teacher}. If their tokenizers agree on the "
            "first of them, set vocabulary='shared_prefix' to cut both; labels beyond are then dropped."
        )
    return min(student, teacher)


def _check_draws(draws: Tensor, vocab: int) -> None:
    wrong = draws[(draws < 0) | (draws >= vocab)]
    if len(wrong):
        raise ValueError(f"Draw {int(wrong[0])} is not a token: the vocabulary has {vocab}.")


def _aligned(draws: Tensor, labels: Tensor) -> Int[Tensor, "BT n"]:
    """Draws of positions 0 to T-2, laid out like the flattened batch."""
    if draws.shape[:2] != (labels.shape[0], labels.shape[1] - 1):
        raise ValueError(
            f"draws must be [B, T-1] or [B, T-1, n] for labels {tuple(labels.shape)}, got "
            f"{tuple(draws.shape)}."
        )
    if draws.is_floating_point() or draws.dtype == torch.bool:
        raise ValueError(f"draws are token ids, and these are of type {draws.dtype}.")
    draws = draws.reshape(*draws.shape[:2], -1)
    return torch.nn.functional.pad(draws, (0, 0, 0, 1)).flatten(0, 1)
