"""Whether a loss has anything to say to a student that equals its teacher.

Axes: N rows of (label, draw), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.methods.supports import Draws, full
from hpd.methods.terms import Term, TermConfig

__all__ = ["rests_where_equal"]

_PROBS = (0.1, 0.2, 0.3, 0.4)
_DRAWS = 1000
_LEAST = 0.01
"""Of an expected gradient that is there; sums over so many equal shares of the unit interval are off by
less."""


def rests_where_equal(terms: Sequence[TermConfig | Term]) -> bool:
    r"""True if the terms leave a student that equals its teacher where it is.

    At p = q the gradient of every term with respect to the logits, in expectation over its draws,

    .. math:: E_a \Big[ q_v \sum_u w_u - w_v \Big]

    is zero for every label (of a rollout's own token: in expectation over the token). It is computed on a
    distribution of four tokens, at the start, the middle and the end of every schedule.
    """
    return all(_gradient(term).abs().max() < _LEAST for term in _in_time(terms) if term.weight)


def _in_time(terms: Sequence[TermConfig | Term]) -> Iterator[Term]:
    for term in terms:
        if isinstance(term, Term):
            yield term
        else:
            yield from (term.at(progress).build() for progress in (0.0, 0.5, 1.0))


def _gradient(term: Term) -> Float[Tensor, "labels V"]:
    """The expected gradient for each label; of a rollout, one row."""
    probs = torch.tensor(_PROBS, dtype=torch.float64)
    # Of one vocabulary and itself, pairs are all tokens (or, unshared, none).
    size, support = len(probs), full() if term.support.pairs else term.support
    labels = torch.arange(size).repeat_interleave(_DRAWS)
    uniforms = ((torch.arange(_DRAWS, dtype=torch.float64) + 0.5) / _DRAWS).repeat(size)[:, None]
    log_q = probs.log().repeat(len(labels), 1)
    draws = None
    if support.given:
        draws = Draws(labels[:, None], log_q.gather(1, labels[:, None]))
    elif support.draws:
        # The last number is the coin's, if there is one: every row gets draws.
        coins = torch.zeros_like(uniforms)
        numbers = torch.cat([uniforms.expand(-1, support.draws), coins], dim=1)
        draws = support.draw(log_q, log_q.exp(), labels, numbers)
    columns = support.columns(log_q, log_q, labels, draws)
    weights = term.objective.weights(columns.teacher_logprobs, columns.student_logprobs)
    if columns.coefficients is not None:
        weights = weights * columns.coefficients
    mass, at_tokens, beside = columns.logit_gradient(weights, log_q)
    gradient = log_q.exp() * mass
    if columns.tokens is None:
        gradient = gradient + at_tokens
    else:
        gradient = gradient.scatter_add(1, columns.tokens, at_tokens)
    if beside is not None:
        gradient = gradient + beside
    by_label = gradient.view(size, _DRAWS, -1).mean(1)
    return (probs @ by_label)[None] if support.given else by_label
