r"""The label's likelihood, both directions of the Kullback-Leibler divergence, and their blends.

Axes and notation: see `hpd.objectives.objective`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hpd.objectives.objective import LogProbs, Objective, Weights, check_number

__all__ = ["blended_kl", "forward_kl", "nll", "reverse_kl", "symmetric_kl"]


def nll() -> Objective:
    r"""Negative log-likelihood of the label: supervised fine-tuning.

    .. math:: L = -\log q_y, \qquad w_v = 1[v = y]

    Column 0 is the label; the other columns have no weight.
    """

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        one_hot = torch.zeros_like(student_logprobs)
        one_hot[:, 0] = 1.0
        return one_hot

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return -weights(teacher_logprobs, student_logprobs) * student_logprobs

    return Objective(weights, value, domain="label", drop_safe=True, support="label", rule="nll")


def forward_kl() -> Objective:
    r"""Forward Kullback-Leibler divergence, mass-covering.

    .. math:: D = \sum_v p_v (\log p_v - \log q_v), \qquad w_v = p_v

    The cross-entropy of p against q, which DistiLLM's code reports, has the same gradient; its value is
    larger by the teacher's entropy.

    Reference:
        Hinton, Vinyals and Dean, 2015, arXiv 1503.02531.
    """

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return teacher_logprobs.exp()

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)

    return Objective(weights, value, drop_safe=True, rule="forward_kl")


def reverse_kl(baseline: float = 0.0) -> Objective:
    r"""Reverse Kullback-Leibler divergence, mode-seeking.

    .. math:: D = \sum_v q_v (\log q_v - \log p_v), \qquad w_v = q_v (\delta_v - 1 + b)

    The -1 changes nothing on the whole vocabulary, and makes the gradient exact on a truncated support. On
    tokens drawn from the student, weighted by 1 / q, the advantage is :math:`\delta_v - 1 + b`: a constant
    there has mean zero, and b = 1 leaves the log-ratio, whose variance vanishes where the distributions
    agree.

    Args:
        baseline: b; 0 is the exact weight, 1 suits draws of the student (a `sampled` or `rollout` support).

    Reference:
        Gu et al., MiniLLM, 2024, arXiv 2306.08543.
    """
    check_number("reverse_kl: baseline", baseline, -math.inf)
    offset = 1.0 - baseline

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return student_logprobs.exp() * (teacher_logprobs - student_logprobs - offset)

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return student_logprobs.exp() * (student_logprobs - teacher_logprobs)

    return Objective(weights, value, rule="reverse_kl", arguments=(baseline,))


def blended_kl(
    rule: str,
    forward_share: Callable[[LogProbs, LogProbs], Tensor | float],
    domain: Literal["token", "distribution"] = "token",
) -> Objective:
    r"""Forward and reverse KL blended by a share that is constant for the gradient.

    .. math:: D = \sum_v \big(\alpha_v p_v - (1 - \alpha_v) q_v\big) \delta_v, \qquad
              w_v = \alpha_v p_v + (1 - \alpha_v) q_v (\delta_v - 1)

    The -1 cancels on the whole vocabulary only where :math:`\alpha` is the same for every token.

    Args:
        rule: name of the factory that asks.
        forward_share: alpha in [0, 1] from (teacher_logprobs, student_logprobs): a number, or broadcasts to
            `[N, K]`.
        domain: "distribution" where the share depends on other columns.
    """

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        share = forward_share(teacher_logprobs, student_logprobs)
        reverse = student_logprobs.exp() * (teacher_logprobs - student_logprobs - 1)
        return share * teacher_logprobs.exp() + (1 - share) * reverse

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        share = forward_share(teacher_logprobs, student_logprobs.detach())
        mass = share * teacher_logprobs.exp() - (1 - share) * student_logprobs.exp()
        return mass * (teacher_logprobs - student_logprobs)

    return Objective(weights, value, domain=domain, rule=rule, arguments=(forward_share,))


def symmetric_kl(lam: float = 0.5) -> Objective:
    r"""Both directions at once; at one half, half of Jeffreys' divergence.

    .. math:: D = (1 - \lambda)\, KL(p \| q) + \lambda\, KL(q \| p), \qquad
              w_v = (1 - \lambda) p_v + \lambda q_v (\delta_v - 1)

    Args:
        lam: share of the reverse direction, in [0, 1]; 0 is `forward_kl`, 1 is `reverse_kl`.

    Raises:
        ValueError: lam outside [0, 1].

    Reference:
        Ko et al., DistiLLM, 2024, arXiv 2402.03898 (code: `symmetric_kl`, where the forward part is a
        cross-entropy).
    """
    check_number("symmetric_kl: lam", lam, 0.0, 1.0)
    if lam == 0.0:
        return forward_kl()
    if lam == 1.0:
        return reverse_kl()
    return blended_kl("symmetric_kl", lambda teacher_logprobs, student_logprobs: 1.0 - lam)
