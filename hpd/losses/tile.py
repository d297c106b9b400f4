"""The arithmetic between the products: logits in, their gradient and sums of statistics out.

Axes: R positions of a tile, K columns of a support, V vocabulary. Everything here runs on tiles small enough
for the processor's cache, so a pass costs a fraction of what it costs over the whole chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.losses.softmax import StudentSoftmax
from hpd.methods.supports import LOGPROB_FLOOR, Columns, Draws, raise_excluded_
from hpd.methods.terms import Term
from hpd.objectives.estimators import kl_estimate
from hpd.objectives.fused import FUSED, Weighed, Whole

__all__ = [
    "Sums",
    "TileInputs",
    "add",
    "is_on_whole_vocabulary",
    "merge",
    "normalized_gradient_",
    "read_few_tokens",
    "softened",
    "sum_dtype",
    "term_draws",
    "tile_gradient_",
    "token_gradient",
    "weigh",
    "weigh_columns",
    "weigh_whole",
]

Sums = dict[str, Tensor]


class TileInputs(NamedTuple):
    """A tile's inputs beside the logits, row for row."""

    labels: Int[Tensor, "R"]
    uniforms: Float[Tensor, "R u"] | None
    draws: Int[Tensor, "R n"] | None
    kl_estimator: str = "exact"
    """Further estimate of the reverse KL at the drawn tokens; exact: none."""
    known: Int[Tensor, "R k"] | None = None
    """The tokens that a top-k teacher knows beside the label; None: the teacher knows all."""
    position_weights: dict[str, Float[Tensor, "R"]] | None = None
    """By term, what its weights and value are multiplied by; None: every position counts the same."""

    def rows(self, rows: slice) -> TileInputs:
        """The part that belongs to some positions."""
        uniforms, draws, known = (
            None if x is None else x[rows] for x in (self.uniforms, self.draws, self.known)
        )
        weights = self.position_weights and {name: x[rows] for name, x in self.position_weights.items()}
        return TileInputs(self.labels[rows], uniforms, draws, self.kl_estimator, known, weights)

    def weight_of(self, term: Term) -> Float[Tensor, "R"] | None:
        """What the term's weights and value are multiplied by; None: by nothing."""
        return None if self.position_weights is None else self.position_weights.get(term.name)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Sums run over millions of tokens: float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def add(sums: Sums, **values: Tensor) -> None:
    """Add the sum of each of the `values` to the running sum of its name, on the device."""
    # Rows in their own dtype: a wider sum over the vocabulary would first copy it into that width. Then all
    # names in one operation: on a CPU, starting one costs more than these sums do.
    rows = [value if value.dim() == 1 else value.sum(-1) for value in values.values()]
    widest = functools.reduce(torch.promote_types, (row.dtype for row in rows))
    totals = torch.stack([row.to(widest) for row in rows]).sum(-1, dtype=sum_dtype(rows[0].device))
    merge(sums, dict(zip(values, totals.unbind(), strict=True)))


def merge(sums: Sums, more: Mapping[str, Tensor]) -> None:
    """Add each sum to the one of its name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def tile_gradient_(
    student_logits: Float[Tensor, "R V"],
    teacher_logits: Float[Tensor, "R V"],
    inputs: TileInputs,
    terms: Sequence[Term],
    sums: Sums,
    scale: Float[Tensor, ""],
    finite: bool = False,
) -> Float[Tensor, "R V"]:
    r"""Overwrite the student's logits with the gradient of the loss with respect to them.

    .. math:: \frac{\partial L}{\partial z_v} = s \Big[\Big(\sum_u w_u\Big) q_v - w_v\Big]

    Both arguments are used as scratch space. `sums` gains the value of every term and the objectives' own
    statistics. `scale` is s; `finite` promises that no logit is -inf, which saves two passes. Returns
    `student_logits`.
    """
    torch.log_softmax(student_logits, -1, out=student_logits)
    torch.log_softmax(teacher_logits, -1, out=teacher_logits)
    return normalized_gradient_(student_logits, teacher_logits, inputs, terms, sums, scale, finite)


def normalized_gradient_(
    log_q: Float[Tensor, "R V"],
    log_p: Float[Tensor, "R V"],
    inputs: TileInputs,
    terms: Sequence[Term],
    sums: Sums,
    scale: Float[Tensor, ""],
    finite: bool = False,
) -> Float[Tensor, "R V"]:
    """`tile_gradient_` from log-probabilities (nats), in the place of the student's."""
    if not finite and any(term.support.whole for term in terms):
        log_q.clamp_(min=LOGPROB_FLOOR)
        raise_excluded_(log_p)
    q = torch.exp(log_q)
    if len(terms) == 1 and is_on_whole_vocabulary(terms[0]):
        whole = Whole(log_p, log_q, q, inputs.labels)
        return _whole_gradient_(terms[0], whole, inputs.weight_of(terms[0]), sums, scale)
    dense: list[tuple[Tensor, Tensor]] = []
    sparse: list[tuple[Tensor, Tensor]] = []
    softened: list[Tensor] = []
    mass = q.new_zeros(len(q), 1)
    for term in terms:
        if term.temperature != 1.0:
            softened.append(_softened_gradient(term, log_p, log_q, inputs, sums))
            continue
        columns, weights = weigh(term, log_p, log_q, q, inputs, sums)
        factor = term.weight * scale
        if columns.tokens is None:
            mass = mass + factor * weights.sum(-1, keepdim=True)
            dense.append((weights, -factor))
            continue
        share, at_tokens, beside = columns.logit_gradient(weights, log_q)
        mass = mass + factor * share
        sparse.append((columns.tokens, at_tokens * factor))
        if beside is not None:
            dense.append((beside, factor))
    gradient = torch.mul(q, mass, out=log_q)
    for values, factor in dense:
        gradient.addcmul_(values, factor)
    for tokens, values in sparse:
        gradient.scatter_add_(1, tokens, values)
    for values in softened:
        gradient.addcmul_(values, scale)
    return gradient


def is_on_whole_vocabulary(term: Term) -> bool:
    """True if a second form of the objective does all the work between the logits and their gradient."""
    if term.objective.rule not in FUSED or term.temperature != 1.0:
        return False
    return term.support.whole and (
        term.support.is_distribution or term.objective.domain == "label_and_vocabulary"
    )


def _whole_gradient_(
    term: Term, whole: Whole, by_position: Float[Tensor, "R"] | None, sums: Sums, scale: Tensor
) -> Tensor:
    """The gradient in the place of the student's log-probabilities."""
    weights, _, weights_factor, mass, _ = weigh_whole(term, whole, by_position, sums)
    if mass is None:
        mass = weights.sum(-1) * weights_factor
    factor = term.weight * scale
    if by_position is not None:
        factor = (factor * by_position).to(mass.dtype)
    scaled = whole.student_probs.mul_((mass * factor)[:, None])
    factor = factor if by_position is None else factor[:, None]
    return torch.addcmul(scaled, weights, -factor * weights_factor, out=whole.student_logprobs)


def weigh_whole(term: Term, whole: Whole, by_position: Float[Tensor, "R"] | None, sums: Sums) -> Weighed:
    """The term's weights at every token; adds its value and metrics."""
    weighed = FUSED[term.objective.rule](whole, *term.objective.arguments)
    value = weighed.value if by_position is None else weighed.value * by_position
    add(sums, **{f"value/{term.name}": value}, **(weighed.stats or {}))
    return weighed


def weigh(
    term: Term, log_p: Tensor, log_q: Tensor, q: Tensor, inputs: TileInputs, sums: Sums
) -> tuple[Columns, Float[Tensor, "R K"]]:
    """Columns of the term's support and the weights there, coefficients included; adds value and metrics."""
    draws = term_draws(term, log_p, log_q, q, inputs)
    columns = term.support.columns(log_p, log_q, inputs.labels, draws)
    weights = weigh_columns(term, columns, inputs, sums)
    if draws is not None and inputs.kl_estimator != "exact" and term.support.draws_student_exactly:
        estimate = kl_estimate(inputs.kl_estimator, log_p, log_q, draws.tokens)
        add(sums, **{f"reverse_kl_{inputs.kl_estimator}": estimate})
    if draws is not None:
        watch_draws(term, draws.tokens, inputs, sums)
    return columns, weights


def watch_draws(term: Term, tokens: Int[Tensor, "R n"], inputs: TileInputs, sums: Sums) -> None:
    """Add the shares of drawn tokens that equal the label, and that a top-k teacher can only bound."""
    labels = inputs.labels[:, None]
    if term.support.label:
        add(sums, sampled_label=(tokens == labels).float().mean(-1))
    if inputs.known is not None:
        known = (tokens[:, :, None] == inputs.known[:, None, :]).any(-1) | (tokens == labels)
        add(sums, draws_off_top_k=(~known).float().mean(-1))


def weigh_columns(term: Term, columns: Columns, inputs: TileInputs, sums: Sums) -> Float[Tensor, "R K"]:
    """The term's weights at its columns, with coefficients and the position's weight; adds its value and
    metrics."""
    objective = term.objective
    pair = columns.teacher_logprobs, columns.student_logprobs
    weights = objective.weights(*pair)
    value = objective.value(*pair)
    if columns.coefficients is not None:
        coefficients = columns.coefficients
        if objective.domain == "label" and term.support.importance and term.support.draws > 1:
            # Such an objective averages over its draws itself, and importance weights do so too.
            coefficients = torch.cat([coefficients[:, :1], coefficients[:, 1:] * term.support.draws], dim=1)
        weights = weights * coefficients
        value = value * coefficients
    if (by_position := inputs.weight_of(term)) is not None:
        by_position = by_position.to(weights.dtype)[:, None]
        weights, value = weights * by_position, value * by_position
    stats = {} if objective.stats is None else objective.stats(*pair)
    add(sums, **{f"value/{term.name}": value}, **stats)
    return weights


def term_draws(term: Term, log_p: Tensor, log_q: Tensor, q: Tensor, inputs: TileInputs) -> Draws | None:
    """The term's draws: those given, or fresh ones from the position's uniforms."""
    if not term.support.draws:
        return None
    from_student = term.support.draws_of == "student"
    logprobs = log_q if from_student else log_p
    if inputs.draws is not None:
        return Draws(inputs.draws, logprobs.gather(1, inputs.draws))
    assert inputs.uniforms is not None, "a sampled support needs uniforms or draws"
    return term.support.draw(
        logprobs, q if from_student else torch.exp(log_p), inputs.labels, inputs.uniforms
    )


def _softened_gradient(term: Term, log_p: Tensor, log_q: Tensor, inputs: TileInputs, sums: Sums) -> Tensor:
    """The gradient of a term whose distributions are softened: d/dz of softmax(z / T) brings 1 / T."""
    log_p, log_q, q = softened(term, log_p, log_q)
    columns, weights = weigh(term, log_p, log_q, q, inputs, sums)
    share, at_tokens, beside = columns.logit_gradient(weights, log_q)
    gradient = q.mul_(share)
    if columns.tokens is None:
        gradient.add_(at_tokens)
    else:
        gradient.scatter_add_(1, columns.tokens, at_tokens)
    if beside is not None:
        gradient.add_(beside)
    return gradient.mul_(term.weight / term.temperature)


def softened(term: Term, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides' log-probabilities at the term's temperature, and the student's probabilities."""
    log_p, log_q = (torch.log_softmax(side / term.temperature, -1) for side in (log_p, log_q))
    return log_p, log_q, torch.exp(log_q)


TeacherAt = Callable[[Int[Tensor, "C n"]], Float[Tensor, "C n"]]


def read_few_tokens(terms: Sequence[Term], kl_estimator: str = "exact") -> bool:
    """True if `token_gradient` can serve the terms; the others need both distributions side by side."""
    return kl_estimator == "exact" and all(
        term.temperature == 1.0 and term.support.is_few_tokens for term in terms
    )


def token_gradient(
    student: StudentSoftmax,
    teacher_at: TeacherAt,
    inputs: TileInputs,
    terms: Sequence[Term],
    sums: Sums,
    scale: Float[Tensor, ""],
) -> Float[Tensor, "C V"]:
    r"""The gradient of `tile_gradient_`, for terms that read a few tokens only.

    Args:
        student: its softmax; used up.
        teacher_at: the teacher's log-probabilities of given tokens.
        inputs, terms, sums, scale: as there.
    """
    labels = inputs.labels[:, None]
    mass = torch.zeros_like(labels, dtype=student.dtype)
    updates = []
    for term in terms:
        draws = None
        if term.support.draws:
            draws = student.given
            if draws is None:
                assert inputs.uniforms is not None, "a sampled support needs uniforms or draws"
                draws = student.draw(term.support, inputs.uniforms)
        tokens, coefficients = term.support.token_columns(inputs.labels, draws)
        log_p = raise_excluded_(teacher_at(tokens).to(student.dtype, copy=True))
        if draws is not None and student.given is not None:
            log_q = student.given.logprobs
            if term.support.label:
                log_q = torch.cat([student.logprobs(labels), log_q], 1)
        else:
            log_q = student.logprobs(tokens)
        columns = Columns(log_p, log_q.clamp_min(LOGPROB_FLOOR), tokens, coefficients)
        weights = weigh_columns(term, columns, inputs, sums)
        if draws is not None:
            watch_draws(term, draws.tokens, inputs, sums)
        factor = term.weight * scale
        mass = mass + factor * weights.sum(-1, keepdim=True)
        updates.append((tokens, weights * -factor))
    return student.gradient(mass, updates)
