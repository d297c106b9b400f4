r"""Weights and value of an objective on the whole vocabulary at once, without gradient, in few passes.

Axes: N label positions, V vocabulary; notation as in `hpd.objectives.objective`. Every function here is a
second form of the factory of its name, whose parameters follow the distributions; `FUSED` is the table. The
logarithms are scratch and may be overwritten; a test holds the two forms together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.objectives.objective import PerPosition

__all__ = ["FUSED", "Weighed", "Whole"]


class Whole(NamedTuple):
    """Both distributions over the whole vocabulary, every token in order."""

    teacher_logprobs: Float[Tensor, "N V"]
    """Scratch: may be overwritten."""
    student_logprobs: Float[Tensor, "N V"]
    """Scratch: may be overwritten."""
    student_probs: Float[Tensor, "N V"]
    """Their exponentials, q; to be left as they are."""
    labels: Int[Tensor, "N"]


class Weighed(NamedTuple):
    """Weights and value on the whole vocabulary."""

    weights: Float[Tensor, "N V"]
    """To be multiplied by `factor`: a pass saved."""
    value: PerPosition
    """Sum of the columns' values."""
    factor: float = 1.0
    mass: PerPosition | None = None
    """Sum of the weights, factor included, where it is known without a pass."""
    stats: dict[str, PerPosition] | None = None


def forward_kl(whole: Whole) -> Weighed:
    p = whole.teacher_logprobs.exp()
    return Weighed(p, whole.teacher_logprobs.sub_(whole.student_logprobs).mul_(p).sum(-1))


def reverse_kl(whole: Whole, baseline: float) -> Weighed:
    q = whole.student_probs
    gap = whole.teacher_logprobs.sub_(whole.student_logprobs).mul_(q)
    divergence = -gap.sum(-1)
    return Weighed(gap.sub_(q, alpha=1.0 - baseline), divergence)


def blended_kl(whole: Whole, forward_share: Callable[[Tensor, Tensor], Tensor | float]) -> Weighed:
    share = forward_share(whole.teacher_logprobs, whole.student_logprobs)
    forward = whole.teacher_logprobs.exp().mul_(share)
    log_ratio = whole.teacher_logprobs.sub_(whole.student_logprobs)
    reverse = torch.mul(whole.student_probs, 1 - share, out=whole.student_logprobs)
    # w = F + R (d - 1) and D = sum (F - R) d, with F and R the two sides' shares: d is used up, then F.
    weights = torch.addcmul(forward, reverse, log_ratio).sub_(reverse)
    return Weighed(weights, forward.sub_(reverse).mul_(log_ratio).sum(-1))


def _mixture(p: Tensor, q: Tensor, teacher_share: float) -> Tensor:
    """The mixture, above zero: where neither side has mass, its logarithm is finite and multiplies zeros."""
    return torch.lerp(q, p, teacher_share).clamp_(min=torch.finfo(q.dtype).tiny)


def generalized_jsd(whole: Whole, beta: float) -> Weighed:
    p, q = whole.teacher_logprobs.exp(), whole.student_probs
    log_mixture = _mixture(p, q, beta).log_()
    student_gap = whole.student_logprobs.sub_(log_mixture).mul_(q)  # q log(q / m)
    student_part = student_gap.sum(-1)
    teacher_part = whole.teacher_logprobs.sub_(log_mixture).mul_(p).sum(-1)
    divergence = beta * teacher_part + (1 - beta) * student_part
    return Weighed(student_gap, divergence, beta - 1.0, (beta - 1.0) * student_part)


def skew_forward_kl(whole: Whole, lam: float) -> Weighed:
    p, q = whole.teacher_logprobs.exp(), whole.student_probs
    mixture = _mixture(p, q, lam)
    log_mixture = torch.log(mixture, out=whole.student_logprobs)
    divergence = whole.teacher_logprobs.sub_(log_mixture).mul_(p).sum(-1)
    return Weighed(p.mul_(q).div_(mixture), divergence, 1.0 - lam)


def skew_reverse_kl(whole: Whole, lam: float) -> Weighed:
    q = whole.student_probs
    mixture = _mixture(whole.teacher_logprobs.exp(), q, 1.0 - lam)
    gap = torch.log(mixture, out=whole.teacher_logprobs).sub_(whole.student_logprobs).mul_(q)
    divergence = -gap.sum(-1)
    ratio = torch.div(q, mixture, out=whole.student_logprobs)
    return Weighed(gap.sub_(q).addcmul_(q, ratio, value=lam), divergence)


def total_variation(whole: Whole) -> Weighed:
    gap = whole.teacher_logprobs.exp_().sub_(whole.student_probs)
    divergence = torch.abs(gap, out=whole.student_logprobs).sum(-1)
    return Weighed(gap.sign_().mul_(whole.student_probs), 0.5 * divergence, 0.5)


def acceptance(whole: Whole) -> Weighed:
    below = whole.student_logprobs < whole.teacher_logprobs
    lower = torch.minimum(whole.teacher_logprobs, whole.student_logprobs, out=whole.teacher_logprobs)
    log_alpha = torch.logsumexp(lower, -1, keepdim=True)
    # Where q is not below, it may be far above alpha: cut before the exponential.
    weights = whole.student_logprobs.sub_(log_alpha).clamp_(max=0.0).exp_().mul_(below)
    return Weighed(weights, -log_alpha[:, 0])


def abkd(whole: Whole, alpha: float, beta: float) -> Weighed:
    """For positive exponents: powers of numbers up to one, so nothing saturates."""
    total = alpha + beta
    teacher_alpha = torch.mul(whole.teacher_logprobs, alpha).exp_()
    teacher_total = whole.teacher_logprobs.mul_(total).exp_()
    student_beta = torch.mul(whole.student_logprobs, beta).exp_()
    student_alpha = whole.student_logprobs.mul_(alpha).exp_()
    teacher_alpha.sub_(student_alpha).mul_(student_beta)  # alpha w
    student_total = student_alpha.mul_(student_beta)
    mass = teacher_alpha.sum(-1) / alpha
    gain = teacher_total.sub_(student_total).sum(-1) / total
    return Weighed(teacher_alpha, (gain - mass) / beta, 1.0 / alpha, mass)


def taid(whole: Whole, t: float) -> Weighed:
    path = torch.lerp(whole.student_logprobs, whole.teacher_logprobs, t, out=whole.teacher_logprobs)
    target = torch.log_softmax(path, -1, out=path)
    probs = target.exp()
    divergence = target.sub_(whole.student_logprobs).mul_(probs).sum(-1)
    return Weighed(probs, divergence, mass=torch.ones_like(divergence))


def hpd_full(whole: Whole, forward: float, reverse: float, mask: bool) -> Weighed:
    weights = whole.teacher_logprobs.exp()
    log_ratio = whole.teacher_logprobs.sub_(whole.student_logprobs)
    if mask:
        weights.mul_(log_ratio > 0)
    if forward != 1.0:
        weights.mul_(forward)
    weights.addcmul_(whole.student_probs, log_ratio, value=reverse)
    return Weighed(weights, -whole.student_logprobs.mul_(weights).sum(-1))


def hpd_expected(whole: Whole, forward: float, reverse: float, mask: bool, reinforce: bool) -> Weighed:
    """The label's two columns merged into its place in the vocabulary."""
    labels, q = whole.labels[:, None], whole.student_probs
    label_p, label_q = whole.teacher_logprobs.gather(1, labels).exp(), q.gather(1, labels)
    log_ratio = whole.teacher_logprobs.sub_(whole.student_logprobs)
    gap = log_ratio.gather(1, labels)
    overestimated = torch.mul(q, log_ratio < 0)
    share = overestimated.sum(-1, keepdim=True)
    positive = (gap > 0).to(gap.dtype)
    coefficient = (positive if mask else 1.0) + positive * share * reinforce
    label_weight = reverse * label_q * gap + forward * coefficient * label_p
    weights = overestimated.mul_(log_ratio).mul_(q if reverse == 1.0 else q * reverse)
    weights.scatter_(1, labels, 0.0)
    others = weights.sum(-1, keepdim=True)  # none of them positive
    weights.scatter_(1, labels, label_weight)
    stats = {
        "k1_positive": positive,
        "reinforced": positive * share * reinforce,
        "label_penalized": (1 - positive) * mask,
        "sample_penalized": share - label_q * (gap < 0),
        "total_weight": label_weight.abs() - others,
    }
    return Weighed(
        weights,
        -whole.student_logprobs.mul_(weights).sum(-1),
        mass=(others + label_weight)[:, 0],
        stats={name: values[:, 0] for name, values in stats.items()},
    )


FUSED: dict[str, Callable[..., Weighed]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": blended_kl,
    "generalized_jsd": generalized_jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "acceptance": acceptance,
    "abkd": abkd,
    "akl": blended_kl,
    "todi": blended_kl,
    "taid": taid,
    "hpd_full": hpd_full,
    "hpd_expected": hpd_expected,
}
