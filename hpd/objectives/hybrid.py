r"""Hybrid Policy Distillation: the paper's rule on label and draws, its expectation, and every token.

Axes and notation: see `hpd.objectives.objective`; in addition y is the label, a a token drawn from the
student, and :math:`k_v = q_v (\log p_v - \log q_v)` the gap at a token: positive where the student
underestimates it.

Signs of k are read off :math:`\log p - \log q`, which keeps them where q underflows to zero.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from hpd.objectives.objective import LogProbs, Objective, Weights, check_number, check_switch

__all__ = ["hpd", "hpd_expected", "hpd_full"]


def hpd(forward: float = 1.0, reverse: float = 1.0, mask: bool = True, reinforce: bool = True) -> Objective:
    r"""Hybrid Policy Distillation on the label (column 0) and n draws from the student (the other columns).

    With c_f, c_r the two coefficients and P the share of the n >= 0 draws that the student overestimates,
    :math:`k_a < 0`:

    .. math:: w_y &= (1 + P)\, c_f\, p_y + c_r k_y \;\text{ if } k_y > 0 \text{ (reinforce)}, \quad
                     c_r k_y \;\text{ otherwise (suppress)} \\
              w_a &= c_r \min(k_a, 0) / n \;\text{ (punish)}, \qquad L = -w_y \log q_y - \sum_a w_a \log q_a

    One draw is the paper's rule: P is 0 or 1. A draw that equals the label must not count twice; the support
    gives it coefficient 0, and it cannot trigger the reinforcement, since its gap is the label's.

    Stats, per position (a draw whose two log-probabilities equal the label's is taken to be the label):
        k1_positive: 1 where the student underestimates the label.
        reinforced: P there, 0 elsewhere and without `reinforce`.
        label_penalized: 1 where the forward weight is masked.
        sample_penalized: share of the draws, other than the label, that lose weight.
        total_weight: sum of the absolute weights: log-likelihood weight given to tokens plus weight taken
            from them.

    Args:
        forward: coefficient c_f of the forward part, p; >= 0.
        reverse: coefficient c_r of the reverse part, k; >= 0.
        mask: drop the forward part where k_y <= 0; without it w_y is c_f p_y + c_r k_y there.
        reinforce: send the mass taken from the draws to the label; without it P counts as 0 in w_y.

    Raises:
        ValueError: a negative coefficient, both zero, or a switch that is not a bool.

    Reference:
        Zhu et al., Hybrid Policy Distillation, 2026, arXiv 2604.20244, eq. 11-15.
    """
    _check("hpd", forward, reverse, mask, reinforce)

    def sample_fraction(draw_logprobs: Float[Tensor, "N n"]) -> float:
        return 1.0 / max(draw_logprobs.shape[1], 1)

    objective = _label_and_draws(sample_fraction, forward, reverse, mask, reinforce)
    return objective._replace(rule="hpd", arguments=(forward, reverse, mask, reinforce))


def hpd_expected(
    forward: float = 1.0, reverse: float = 1.0, mask: bool = True, reinforce: bool = True
) -> Objective:
    r"""The expectation of `hpd` over the draw: columns are the label, then every token in order (K = 1 + V).

    .. math:: P = \sum_v q_v 1[k_v < 0], \qquad w_{1 + v} = c_r\, q_v \min(k_v, 0)

    and w_y as in `hpd`. The support empties the label's second column. Arguments, errors and stats are those
    of `hpd`, with the draws' share of n replaced by their probability.
    """
    _check("hpd_expected", forward, reverse, mask, reinforce)
    objective = _label_and_draws(
        lambda draw_logprobs: draw_logprobs.exp(), forward, reverse, mask, reinforce, label_is_apart=True
    )
    return objective._replace(
        domain="label_and_vocabulary", rule="hpd_expected", arguments=(forward, reverse, mask, reinforce)
    )


def hpd_full(forward: float = 1.0, reverse: float = 1.0, mask: bool = True) -> Objective:
    r"""The hybrid rule at every token, without label or draw.

    .. math:: w_v = c_f\, p_v\, 1[k_v > 0] + c_r k_v, \qquad L = -\sum_v w_v \log q_v

    L is no distance, but its weights are those of one, :math:`w_v = -q_v\, \partial D / \partial q_v` up to a
    multiple of q:

    .. math:: D = c_f \sum_v p_v \max(0, \log p_v - \log q_v) + c_r\, KL(q \| p)

    D is zero at q = p only. All weights are zero there, and they jump: just below, a token weighs
    :math:`c_f p_v`; just above, nearly nothing. So a fixed step size leaves a student that hops about p.

    Args:
        forward: coefficient c_f of the forward part, p; >= 0.
        reverse: coefficient c_r of the reverse part, k; >= 0.
        mask: drop the forward part where k <= 0; without it the weight is c_f p + c_r k everywhere (a
            symmetric KL).

    Raises:
        ValueError: a negative coefficient, both zero, or a mask that is not a bool.
    """
    _check("hpd_full", forward, reverse, mask)

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        log_ratio = teacher_logprobs - student_logprobs
        forward_part = forward * teacher_logprobs.exp()
        if mask:
            forward_part = forward_part * (log_ratio > 0)
        return forward_part + reverse * student_logprobs.exp() * log_ratio

    return Objective(weights, _likelihood(weights), rule="hpd_full", arguments=(forward, reverse, mask))


def _label_and_draws(
    sample_fraction: Callable[[Tensor], Tensor | float],
    forward: float,
    reverse: float,
    mask: bool,
    reinforce: bool,
    label_is_apart: bool = False,
) -> Objective:
    """The rule shared by `hpd` and `hpd_expected`.

    Args:
        sample_fraction: what each draw column counts, one in sum.
        label_is_apart: no draw is the label.
    """

    def split(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> tuple[Tensor, Tensor, Tensor]:
        """Log-ratio of the label [N, 1] and of the draws [N, n]; share [N, n] of each overestimated draw."""
        log_ratio = teacher_logprobs - student_logprobs
        label, draws = log_ratio[:, :1], log_ratio[:, 1:]
        return label, draws, (draws < 0).to(draws.dtype) * sample_fraction(student_logprobs[:, 1:])

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        label, draws, share = split(teacher_logprobs, student_logprobs)
        coefficient = (label > 0).to(label.dtype) if mask else label.new_ones(())
        if reinforce:
            coefficient = coefficient + (label > 0) * share.sum(1, keepdim=True)
        result = reverse * student_logprobs.exp()  # [N, K]
        result[:, 1:] *= share * draws
        result[:, :1] = result[:, :1] * label + forward * coefficient * teacher_logprobs[:, :1].exp()
        return result

    def stats(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> dict[str, Float[Tensor, "N"]]:
        label, _, share = split(teacher_logprobs, student_logprobs)
        positive = (label > 0).to(label.dtype)[:, 0]
        same_student = student_logprobs[:, 1:] == student_logprobs[:, :1]
        is_other = ~(same_student & (teacher_logprobs[:, 1:] == teacher_logprobs[:, :1])) | label_is_apart
        size = weights(teacher_logprobs, student_logprobs).abs()
        return {
            "k1_positive": positive,
            "reinforced": positive * share.sum(1) * reinforce,
            "label_penalized": (1 - positive) * mask,
            "sample_penalized": (share * is_other).sum(1),
            "total_weight": size[:, 0] + (size[:, 1:] * is_other).sum(1),
        }

    return Objective(weights, _likelihood(weights), stats, domain="label")


def _likelihood(weights: Callable[[LogProbs, LogProbs], Weights]) -> Callable[[LogProbs, LogProbs], Weights]:
    """The reweighted log-likelihood itself (eq. 15), for rules that are no divergence's gradient."""

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return -weights(teacher_logprobs, student_logprobs.detach()) * student_logprobs

    return value


def _check(name: str, forward: float, reverse: float, *switches: bool) -> None:
    check_number(f"{name}: forward", forward, 0.0)
    check_number(f"{name}: reverse", reverse, 0.0)
    if forward == 0 and reverse == 0:
        raise ValueError(
            f"{name}: forward and reverse are both 0, so there is nothing to learn: raise one above 0."
        )
    for switch, given in zip(("mask", "reinforce"), switches, strict=False):
        check_switch(f"{name}: {switch}", given)
