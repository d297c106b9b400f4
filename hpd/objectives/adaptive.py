r"""Objectives that adapt to the gap between teacher and student: per position, per token, or over training.

Axes and notation: see `hpd.objectives.objective`.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hpd.objectives.kl import blended_kl
from hpd.objectives.objective import LogProbs, Objective, Weights, check_number

__all__ = ["akl", "taid", "todi"]

_NUMPY_DTYPES = (torch.float32, torch.float64)


def akl(mu: float = 0.5) -> Objective:
    r"""Adaptive KL: the direction whose part of the teacher's distribution the student misses more.

    .. math:: D = h\, KL(p \| q) + (1 - h)\, KL(q \| p), \qquad
              h = \frac{\sum_{v \in head} |p_v - q_v|}{\sum_v |p_v - q_v|} \quad \text{(constant)}

    The head is the longest run of the teacher's most likely tokens whose mass is at most mu, and at least the
    first; a token as likely as its last one belongs to it, so that the order of the vocabulary does not
    matter. As in AKL's code, each divergence is blended whole, not its head or tail alone. Where p = q, h is
    one half. Costs a sort of the teacher's distribution.

    Args:
        mu: mass of the head, in (0, 1).

    Raises:
        ValueError: mu outside (0, 1).

    Reference:
        Wu et al., 2025, arXiv 2404.02657.
    """
    check_number("akl: mu", mu, 0.0, 1.0, open_low=True, open_high=True)

    def head_share(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Float[Tensor, "N 1"]:
        teacher_probs = teacher_logprobs.exp()
        descending = _descending(teacher_probs)
        head_tokens = (descending.cumsum(-1) <= mu).sum(-1, keepdim=True).clamp_min(1)  # [N, 1]
        in_head = teacher_probs >= descending.gather(-1, head_tokens - 1)
        gap = student_logprobs.exp().sub_(teacher_probs).abs_()
        total_gap = gap.sum(-1, keepdim=True)
        head_gap = gap.mul_(in_head).sum(-1, keepdim=True)
        return torch.where(total_gap > 0, head_gap / total_gap.clamp_min(torch.finfo(gap.dtype).tiny), 0.5)

    return blended_kl("akl", head_share, domain="distribution")


def _descending(probs: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Rows from the largest to the smallest."""
    if probs.device.type == "cpu" and probs.dtype in _NUMPY_DTYPES and not torch.compiler.is_compiling():
        # NumPy's vector sort of values alone takes a tenth of the time of torch's, which moves indices too
        # (2.6 against 29 ns a number here).
        return torch.from_numpy(np.sort(probs.detach().numpy(), axis=-1)).flip(-1)
    return probs.sort(dim=-1, descending=True).values


def todi(beta: float = 1.0) -> Objective:
    r"""Token-wise distillation: forward KL where the student underestimates, reverse KL elsewhere.

    .. math:: D = \sum_v \big(\alpha_v p_v - (1 - \alpha_v) q_v\big) \delta_v, \quad
              \alpha_v = \operatorname{sigmoid}(\beta \delta_v) \text{ (constant)}, \qquad
              w_v = \alpha_v p_v + (1 - \alpha_v) q_v (\delta_v - 1)

    At beta = 1, :math:`\alpha = p / (p + q)` and the value (not the gradient) is forward plus reverse KL
    exactly. Every term is non-negative.

    Args:
        beta: sharpness of the switch, >= 0; 0 is `symmetric_kl(0.5)`.

    Raises:
        ValueError: beta negative or not finite.

    Reference:
        Jung et al., ToDi, 2025, arXiv 2505.16297.
    """
    check_number("todi: beta", beta, 0.0)

    def token_share(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Float[Tensor, "N K"]:
        return torch.sigmoid(beta * (teacher_logprobs - student_logprobs))

    return blended_kl("todi", token_share)


def taid(t: float) -> Objective:
    r"""Forward KL against a target that travels from the student to the teacher.

    .. math:: D = KL(r \| q), \quad r = \operatorname{softmax}\big((1 - t) \log q + t \log p\big) \text{
              (constant)}, \qquad w_v = r_v

    TAID's code reports the cross-entropy of r against q: the same gradient, a value larger by the entropy of
    r.

    Args:
        t: position of the target, in [0, 1]: 0 is the student itself (no gradient), 1 is `forward_kl`.

    Raises:
        ValueError: t outside [0, 1].

    Reference:
        Shing et al., TAID, 2025, arXiv 2501.16937.
    """
    check_number("taid: t", t, 0.0, 1.0)

    def log_target(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> LogProbs:
        return torch.log_softmax(torch.lerp(student_logprobs, teacher_logprobs, t), dim=-1)

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return log_target(teacher_logprobs, student_logprobs).exp()

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        target = log_target(teacher_logprobs, student_logprobs.detach())
        return target.exp() * (target - student_logprobs)

    return Objective(weights, value, domain="distribution", rule="taid", arguments=(t,))
