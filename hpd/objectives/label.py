r"""One-token rules: weights of the dataset's label alone, no draw, no other token of the vocabulary.

Axes and notation: see `hpd.objectives.objective`. Column 0 is the label y; the other columns have no weight,
so a teacher that gives one log-probability a position serves every rule here. For labels that are drawn from
a distribution d, each value is a sample of :math:`\sum_v d_v D_v`; docs/theory.md says where each rule rests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.objectives.kl import reverse_kl
from hpd.objectives.mixtures import generalized_jsd
from hpd.objectives.objective import LogProbs, Objective, Weights, check_number

__all__ = ["alm", "label_forward_kl", "label_jsd", "label_reverse_kl", "masked_sft"]


# The most that a log-probability over the temperature may be: 1 - q must not be zero, and a weight of 1e6
# times the rounding of float32 is still small.
_CERTAIN = -1e-6


def alm(tau: float = 100.0) -> Objective:
    r"""Approximate likelihood matching: the label's probability as a coin's, flattened by a temperature.

    .. math:: L = a \log \frac{a}{b} + (1 - a) \log \frac{1 - a}{1 - b}, \quad a = p_y^{1 / \tau},\
              b = q_y^{1 / \tau}, \qquad w_y = \frac{a - b}{\tau\, (1 - b)}

    Between two tokenizers p and q are those of whole chunks (`train.byte_length: product`). Labels drawn from
    any distribution bring the student to p: the weight is zero where q = p only. A label that a model is
    certain of is given 1 - 1e-6 after the flattening.

    Args:
        tau: the temperature, > 0.

    Raises:
        ValueError: tau is no finite number > 0.

    Reference:
        Minixhofer, Vulić and Ponti, 2025, arXiv 2503.20083, without its debiasing of chunk ends.
    """
    check_number("alm: tau", tau, 0.0, open_low=True)

    def flat(logprobs: LogProbs) -> LogProbs:
        return (logprobs / tau).clamp_max(_CERTAIN)

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_a, log_b = flat(teacher_logprobs), flat(student_logprobs)
        # a - b from the ratio, which keeps the digits of two that are close to each other.
        ratio = log_a - log_b
        gap = ratio.sign() * torch.maximum(log_a, log_b).exp() * -torch.expm1(-ratio.abs())
        return gap / -torch.expm1(log_b) / tau

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_a, log_b = flat(teacher_logprobs), flat(student_logprobs)
        rest_a, rest_b = -torch.expm1(log_a), -torch.expm1(log_b)
        return log_a.exp() * (log_a - log_b) + rest_a * (rest_a.log() - rest_b.log())

    return _at_label("alm", weights, value, arguments=(tau,), whole_chunks=True)


def label_forward_kl() -> Objective:
    r"""The label's negative log-likelihood, weighted by the teacher's probability of the label.

    .. math:: L = -p_y \log q_y, \qquad w_y = p_y

    The weight of `forward_kl` at one token. Labels drawn from d bring the student to :math:`q_v \propto d_v
    p_v`: to the square of the teacher where the teacher wrote them.

    Reference:
        Zhu et al., Hybrid Policy Distillation, 2026, arXiv 2604.20244 (the baseline "SeqKD").
    """

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return teacher_logprobs.exp()

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return -teacher_logprobs.exp() * student_logprobs

    return _at_label("label_forward_kl", weights, value, drop_safe=True)


def label_reverse_kl() -> Objective:
    r"""The reverse direction at the label: the gap k of `hpd.objectives.hybrid`.

    .. math:: L = q_y (\log q_y - \log p_y) - q_y + p_y, \qquad w_y = q_y (\log p_y - \log q_y)

    L is the label's part of the reverse KL, in the form that is zero where q = p and positive elsewhere.

    Reference:
        Zhu et al., Hybrid Policy Distillation, 2026, arXiv 2604.20244 (the baseline "RKLD"; eq. 11).
    """
    objective = reverse_kl(baseline=1.0)

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        surplus = student_logprobs.exp() - teacher_logprobs.exp()
        return objective.value(teacher_logprobs, student_logprobs) - surplus

    return _at_label("label_reverse_kl", objective.weights, value)


def label_jsd(beta: float = 0.5) -> Objective:
    r"""The label's part of the generalized Jensen-Shannon divergence.

    .. math:: L = \beta\, p_y \log \frac{p_y}{m_y} + (1 - \beta)\, q_y \log \frac{q_y}{m_y}, \quad
              m = \beta p + (1 - \beta) q, \qquad w_y = (1 - \beta)\, q_y (\log m_y - \log q_y)

    Args:
        beta: the teacher's share of the mixture, in (0, 1). The ends are rules of their own:
            `label_forward_kl` and `label_reverse_kl`.

    Raises:
        ValueError: beta outside (0, 1).

    Reference:
        Zhu et al., Hybrid Policy Distillation, 2026, arXiv 2604.20244 (the baseline "JSD").
    """
    check_number("label_jsd: beta", beta, 0.0, 1.0, open_low=True, open_high=True)
    objective = generalized_jsd(beta)
    return _at_label("label_jsd", objective.weights, objective.value, arguments=(beta,))


def masked_sft() -> Objective:
    r"""Fine-tuning that stops at the teacher: the label counts while the student underestimates it.

    .. math:: L = \max(0, \log p_y - \log q_y), \qquad w_y = 1[q_y < p_y]

    A hinge, convex in the student's logits. Where the labels use every token that the teacher does, its
    expectation is zero at q = p only, whatever the labels' frequencies.

    Stats, per position:
        k1_positive: 1 where the student underestimates the label.

    Reference:
        this project; the mask is that of Zhu et al., 2026, arXiv 2604.20244.
    """

    def underestimates(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return (teacher_logprobs > student_logprobs).to(student_logprobs.dtype)

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return torch.relu(teacher_logprobs - student_logprobs)

    def stats(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> dict[str, Float[Tensor, "N"]]:
        return {"k1_positive": underestimates(teacher_logprobs[:, :1], student_logprobs[:, :1])[:, 0]}

    return _at_label("masked_sft", underestimates, value, stats=stats)


def _at_label(
    rule: str,
    weights: Callable[[LogProbs, LogProbs], Weights],
    value: Callable[[LogProbs, LogProbs], Weights],
    **about: Any,
) -> Objective:
    """An objective made of two functions of single tokens, which counts at the label only."""

    def only_there(
        function: Callable[[LogProbs, LogProbs], Weights],
    ) -> Callable[[LogProbs, LogProbs], Weights]:
        def at_label(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
            result = torch.zeros_like(student_logprobs)
            result[:, :1] = function(teacher_logprobs[:, :1], student_logprobs[:, :1])
            return result

        return at_label

    return Objective(
        only_there(weights), only_there(value), domain="label", support="label", rule=rule, **about
    )
