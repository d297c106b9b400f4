"""The oracle: the same loss from whole logits, with autograd. Slow, large, and obviously right."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.chunked import OperatorCall
from hpd.losses.heads import Head, Scores, TopKScores
from hpd.losses.measures import distribution_metrics
from hpd.losses.products import logits
from hpd.losses.teacher_side import known_metrics, tail_mass, teacher_logits_
from hpd.losses.tile import Sums, add, term_draws, weigh
from hpd.methods.supports import LOGPROB_FLOOR, raise_excluded_

__all__ = ["reference_reweighted_nll"]


def reference_reweighted_nll(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    head: Head,
    call: OperatorCall,
    sums: Sums,
) -> Float[Tensor, ""]:
    """`-sum_n sum_v sg[w] log q` through autograd; returns the terms' values, whose gradient it carries."""
    z = logits(Scores(hidden, head._replace(weight=weight, bias=bias)), call.vocab)
    t = _teacher_logits(call, z)
    loss = z[:0].sum()
    for term in call.terms:
        log_q = torch.log_softmax(z / term.temperature, -1).clamp_min(LOGPROB_FLOOR)
        log_p = raise_excluded_(torch.log_softmax(t / term.temperature, -1))
        fixed = log_q.detach()
        before = sums.get(f"value/{term.name}", torch.zeros(()))
        _, weights = weigh(term, log_p, fixed, fixed.exp(), call.inputs, sums)
        value = sums[f"value/{term.name}"] - before
        chosen = term.support.columns(
            log_p, log_q, call.inputs.labels, term_draws(term, log_p, fixed, fixed.exp(), call.inputs)
        )
        likelihood = (weights * chosen.student_logprobs).sum()
        loss = loss + term.weight * (value - likelihood + likelihood.detach())
    with torch.no_grad():
        log_q, log_p = torch.log_softmax(z, -1), torch.log_softmax(t, -1)
        if call.metric_stride:
            rows = slice(None, None, call.metric_stride)
            more: Sums = {}
            distribution_metrics(log_p[rows], log_q[rows], call.inputs.labels[rows], more)
            sums.update(known_metrics(call.teacher, more))
        add(sums, tokens=torch.ones_like(log_q[:, 0]))
        if call.teacher.vocab > call.vocab:
            everything = torch.softmax(_teacher_logits(call, z, call.teacher.vocab), -1)
            add(sums, teacher_mass_outside=everything[:, call.vocab :].sum(-1))
        if isinstance(call.teacher, TopKScores) and not call.teacher.drawn:
            add(sums, teacher_tail_mass=tail_mass(call.teacher, call.inputs.labels))
    return (loss * call.scale).to(z.dtype)


def _teacher_logits(call: OperatorCall, like: Tensor, vocab: int | None = None) -> Float[Tensor, "N V"]:
    vocab = vocab or call.vocab
    if isinstance(call.teacher, TopKScores):
        return teacher_logits_(call.teacher, call.inputs.labels, like.new_empty(len(like), vocab))
    return logits(call.teacher, vocab).detach()
