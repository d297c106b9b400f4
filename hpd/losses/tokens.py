"""Terms that read a few tokens of each position: the label and draws of the student, as in HPD and SFT.

Axes: C positions of a chunk, K columns of a support, V vocabulary.

The student's logits are normalised, drawn from and turned into their gradient in place, in four passes over the chunk; the
teacher is asked for single log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.losses.tile import Sums, TileInputs, watch_draws, weigh_columns
from hpd.supports import LOGPROB_FLOOR, Columns, Draws
from hpd.terms import Term

__all__ = ["read_few_tokens", "token_gradient_"]

TeacherAt = Callable[[Int[Tensor, "C n"]], Float[Tensor, "C n"]]


def read_few_tokens(terms: Sequence[Term], kl_estimator: str = "exact") -> bool:
    """Whether `token_gradient_` can serve the terms; the others need both distributions side by side."""
    return kl_estimator == "exact" and all(term.temperature == 1.0 and term.support.is_few_tokens for term in terms)


def token_gradient_(
    student_logits: Float[Tensor, "C V"],
    teacher_at: TeacherAt,
    inputs: TileInputs,
    terms: Sequence[Term],
    sums: Sums,
    scale: Float[Tensor, ""],
) -> Float[Tensor, "C V"]:
    r"""Overwrite the student's logits with the gradient of the loss with respect to them; see `tile_gradient_`.

    Args:
        student_logits: scratch, and the result.
        teacher_at: the teacher's log-probabilities of given tokens.
        inputs, terms, sums, scale: as there.
    """
    labels = inputs.labels[:, None]
    log_q = torch.log_softmax(student_logits, -1, out=student_logits)
    label_logprobs = log_q.gather(1, labels)
    given = None if inputs.draws is None else Draws(inputs.draws, log_q.gather(1, inputs.draws))
    q = log_q.exp_()

    def student_at(tokens: Tensor) -> Tensor:
        # A drawn token has mass, so that its logarithm is exact; the label's may have underflowed and was kept.
        return torch.where(tokens == labels, label_logprobs, torch.log(q.gather(1, tokens)))

    mass = q.new_zeros(len(q), 1)
    updates = []
    for term in terms:
        draws = given
        if term.support.draws and draws is None:
            assert inputs.uniforms is not None, "a sampled support needs uniforms or draws"
            draws = term.support.draw(q, q, inputs.labels, inputs.uniforms)
        tokens, coefficients = term.support.token_columns(inputs.labels, draws if term.support.draws else None)
        log_p = teacher_at(tokens).to(q.dtype).clamp_min(LOGPROB_FLOOR)
        if given is not None and term.support.draws:
            log_q_at = torch.cat([label_logprobs, given.logprobs], 1) if term.support.label else given.logprobs
        else:
            log_q_at = student_at(tokens)
        columns = Columns(log_p, log_q_at.clamp_min(LOGPROB_FLOOR), tokens, coefficients)
        weights = weigh_columns(term, columns, sums)
        if term.support.draws:
            assert draws is not None
            watch_draws(term, draws.tokens, inputs, sums)
        factor = term.weight * scale
        mass = mass + factor * weights.sum(-1, keepdim=True)
        updates.append((tokens, weights * -factor))
    gradient = q.mul_(mass)
    for tokens, values in updates:
        gradient.scatter_add_(1, tokens, values)
    return gradient
