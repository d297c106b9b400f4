r"""A bound on what a single token may contribute to a divergence.

Axes and notation: see `hpd.objectives.objective`.
"""

from __future__ import annotations

from hpd.objectives.objective import LogProbs, Objective, Weights, check_number

__all__ = ["capped"]


def capped(objective: Objective, cap: float) -> Objective:
    r"""`objective` with each column's part of the loss cut off at `cap`.

    .. math:: D^{(\tau)} = \sum_v \min(d_v, \tau), \qquad w^{(\tau)}_v = w_v\, 1[d_v \le \tau]

    with d the columns' parts and :math:`\tau` the cap: a token beyond it has no gradient of its own. A part
    may be negative, and is not cut there, so the sum is no divergence: it can go below zero.

    >>> import torch
    >>> from hpd.objectives import forward_kl
    >>> p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    >>> capped(forward_kl(), 0.05).value(p.log(), q.log())  # without the cap 0.5290 and -0.1609
    tensor([[ 0.0500, -0.1609]])
    >>> capped(forward_kl(), 0.05).weights(p.log(), q.log())
    tensor([[0.0000, 0.1000]])

    Args:
        objective: one whose columns add up to a divergence; the metrics are its own.
        cap: in nats, > 0.

    Raises:
        ValueError: cap is no finite number > 0.

    Reference:
        Zhao et al. 2026, OPSD, arXiv 2601.18734 ("pointwise KL clipping", 0.05).
    """
    check_number("cap", cap, 0.0, open_low=True)

    def weights(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        kept = objective.value(teacher_logprobs, student_logprobs) <= cap
        return objective.weights(teacher_logprobs, student_logprobs) * kept

    def value(teacher_logprobs: LogProbs, student_logprobs: LogProbs) -> Weights:
        return objective.value(teacher_logprobs, student_logprobs).clamp_max(cap)

    # Its weights depend on the student, and the operator's second forms know no cap.
    return objective._replace(weights=weights, value=value, drop_safe=False, rule="", arguments=())
