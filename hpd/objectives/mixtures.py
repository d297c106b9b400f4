r"""Divergences against a mixture of teacher and student: bounded where the plain ones blow up.

Axes and notation: see `hpd.objectives.objective`. Mixtures are formed from log-probabilities: log m is finite
even where p and q underflow.
"""

from __future__ import annotations

import math

import torch

from hpd.objectives.kl import forward_kl, reverse_kl
from hpd.objectives.objective import LogProbs, Objective, Weights, check_number

__all__ = ["generalized_jsd", "js", "skew_forward_kl", "skew_reverse_kl"]


def _log_mixture(teacher_logprobs: LogProbs, student_logprobs: LogProbs, teacher_share: float) -> LogProbs:
    """Log of `share * p + (1 - share) * q`, for a share strictly between 0 and 1."""
    return torch.logaddexp(
        teacher_logprobs + math.log(teacher_share), student_logprobs + math.log1p(-teacher_share)
    )


def generalized_jsd(beta: float = 0.5) -> Objective:
    r"""Generalized Jensen-Shannon divergence, between forward and reverse KL.

    .. math:: D = \beta\, KL(p \| m) + (1 - \beta)\, KL(q \| m), \quad m = \beta p + (1 - \beta) q, \qquad
              w_v = (1 - \beta)\, q_v (\log m_v - \log q_v)

    Towards either end D vanishes (D / beta tends to forward KL, D / (1 - beta) to reverse KL), so the ends
    are set by convention, as in GKD and TRL: 0 is forward KL and 1 is reverse KL, exactly. A temperature is
    applied outside.

    >>> import torch
    >>> teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> [round(generalized_jsd(beta).value(teacher, student).sum().item(), 3) for beta in (0.0, 0.5, 1.0)]
    [0.511, 0.102, 0.368]

    Args:
        beta: the teacher's share of the mixture, in [0, 1].

    Raises:
        ValueError: beta outside [0, 1].

    Reference:
        Agarwal et al., GKD, 2024, arXiv 2306.13649.
    """
    check_number("generalized_jsd: beta", beta, 0.0, 1.0)
    if beta == 0.0:
        return forward_kl()
    if beta == 1.0:
        return reverse_kl()

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_mixture = _log_mixture(teacher_logprobs, student_logprobs, beta)
        return (1 - beta) * student_logprobs.exp() * (log_mixture - student_logprobs)

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_mixture = _log_mixture(teacher_logprobs, student_logprobs, beta)
        teacher_part = teacher_logprobs.exp() * (teacher_logprobs - log_mixture)
        student_part = student_logprobs.exp() * (student_logprobs - log_mixture)
        return beta * teacher_part + (1 - beta) * student_part

    return Objective(weights, value, rule="generalized_jsd", arguments=(beta,))


def js(lam: float) -> Objective:
    r"""Skewed Jensen-Shannon divergence in DistiLLM's parametrization: `generalized_jsd(1 - lam)`.

    .. math:: D = (1 - \lambda)\, KL(p \| m) + \lambda\, KL(q \| m), \quad m = (1 - \lambda) p + \lambda q

    Args:
        lam: the student's share of the mixture, in (0, 1); at either end D would be zero for all p and q.

    Raises:
        ValueError: lam outside (0, 1).

    Reference:
        Ko et al., DistiLLM, 2024, arXiv 2402.03898 (code: `js_distance`).
    """
    check_number("js: lam", lam, 0.0, 1.0, open_low=True, open_high=True)
    return generalized_jsd(1.0 - lam)


def skew_forward_kl(lam: float = 0.1) -> Objective:
    r"""Forward KL against a teacher-student mixture; finite where the student has no mass.

    .. math:: D = KL(p \| m), \quad m = \lambda p + (1 - \lambda) q, \qquad w_v = (1 - \lambda)\, p_v q_v /
        m_v

    DistiLLM's code reports the cross-entropy of p against m: same gradient, a value larger by the teacher's
    entropy.

    Args:
        lam: the teacher's share of the mixture, in [0, 1); 0 is `forward_kl`.

    Raises:
        ValueError: lam outside [0, 1).

    Reference:
        Ko et al., DistiLLM, 2024, arXiv 2402.03898.
    """
    check_number("skew_forward_kl: lam", lam, 0.0, 1.0, open_high=True)
    if lam == 0.0:
        return forward_kl()

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_mixture = _log_mixture(teacher_logprobs, student_logprobs, lam)
        return (1 - lam) * (teacher_logprobs + student_logprobs - log_mixture).exp()

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_mixture = _log_mixture(teacher_logprobs, student_logprobs, lam)
        return teacher_logprobs.exp() * (teacher_logprobs - log_mixture)

    return Objective(weights, value, rule="skew_forward_kl", arguments=(lam,))


def skew_reverse_kl(lam: float = 0.1) -> Objective:
    r"""Reverse KL against a teacher-student mixture; finite where the teacher has no mass.

    .. math:: D = KL(q \| m), \quad m = (1 - \lambda) p + \lambda q, \qquad
              w_v = q_v \big(\log m_v - \log q_v - 1 + \lambda q_v / m_v\big)

    Args:
        lam: the student's share of the mixture, in [0, 1); 0 is `reverse_kl`.

    Raises:
        ValueError: lam outside [0, 1).

    Reference:
        Ko et al., DistiLLM, 2024, arXiv 2402.03898.
    """
    check_number("skew_reverse_kl: lam", lam, 0.0, 1.0, open_high=True)
    if lam == 0.0:
        return reverse_kl()

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_ratio = student_logprobs - _log_mixture(teacher_logprobs, student_logprobs, 1.0 - lam)
        return student_logprobs.exp() * (lam * log_ratio.exp() - log_ratio - 1)

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_mixture = _log_mixture(teacher_logprobs, student_logprobs, 1.0 - lam)
        return student_logprobs.exp() * (student_logprobs - log_mixture)

    return Objective(weights, value, rule="skew_reverse_kl", arguments=(lam,))
