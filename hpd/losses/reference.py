"""The oracle: the same loss from whole logits, with autograd. Slow, large, and obviously right."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.chunked import Plan
from hpd.losses.heads import Scores, TopKScores
from hpd.losses.products import logits
from hpd.losses.teacher_side import tail_mass, teacher_logits_
from hpd.losses.tile import Sums, add, distribution_metrics, term_draws, weigh
from hpd.methods.supports import LOGPROB_FLOOR

__all__ = ["reference_reweighted_nll"]


def reference_reweighted_nll(student: Scores, plan: Plan) -> tuple[Float[Tensor, ""], Sums]:
    """`-sum_n sum_v sg[w] log q` through autograd; returns the terms' values, whose gradient it carries."""
    sums: Sums = {}
    z = logits(student, plan.vocab)
    t = _teacher_logits(plan, z)
    loss = z[:0].sum()
    for term in plan.terms:
        log_q = torch.log_softmax(z / term.temperature, -1).clamp_min(LOGPROB_FLOOR)
        log_p = torch.log_softmax(t / term.temperature, -1).clamp_min(LOGPROB_FLOOR)
        fixed = log_q.detach()
        before = sums.get(f"value/{term.name}", torch.zeros(()))
        _, weights = weigh(term, log_p, fixed, fixed.exp(), plan.inputs, sums)
        value = sums[f"value/{term.name}"] - before
        chosen = term.support.columns(
            log_p, log_q, plan.inputs.labels, term_draws(term, log_p, fixed, fixed.exp(), plan.inputs)
        )
        likelihood = (weights * chosen.student_logprobs).sum()
        loss = loss + term.weight * (value - likelihood + likelihood.detach())
    with torch.no_grad():
        log_q, log_p = torch.log_softmax(z, -1), torch.log_softmax(t, -1)
        if plan.metric_stride:
            rows = slice(None, None, plan.metric_stride)
            distribution_metrics(log_p[rows], log_q[rows], sums)
        add(sums, tokens=torch.ones_like(log_q[:, 0]))
        if plan.teacher.vocab > plan.vocab:
            everything = torch.softmax(_teacher_logits(plan, z, plan.teacher.vocab), -1)
            add(sums, teacher_mass_outside=everything[:, plan.vocab :].sum(-1))
        if isinstance(plan.teacher, TopKScores):
            add(sums, teacher_tail_mass=tail_mass(plan.teacher, plan.inputs.labels))
    return (loss * plan.scale).to(z.dtype), sums


def _teacher_logits(plan: Plan, like: Tensor, vocab: int | None = None) -> Float[Tensor, "N V"]:
    vocab = vocab or plan.vocab
    if isinstance(plan.teacher, TopKScores):
        return teacher_logits_(plan.teacher, plan.inputs.labels, like.new_empty(len(like), vocab))
    return logits(plan.teacher, vocab).detach()
