r"""Tokens drawn without replacement, with weights whose expectation is the distribution.

For n slots, token v is taken with probability :math:`\pi_v = \min(1, c\,p_v)`, with c such that these sum to
n, and gets the weight :math:`p_v / \pi_v`. So tokens above 1/c are taken for certain, with their probability,
and the others share the slots that are left in proportion to p, each with the weight 1/c. Every taken set has
n distinct tokens and a weight of one in all:

.. math:: \hat p_v = 1[v\ \text{taken}]\, p_v / \pi_v, \qquad E \hat p = p, \qquad \sum_v \hat p_v = 1,
    \qquad \mathrm{Var}\, \hat p_v = p_v^2\,(1 / \pi_v - 1)

n independent draws with their counts, as Sparse Logit Sampling stores, have the variance p_v (1 - p_v) / n:
at the likely tokens, which are taken for certain here, that is most of it.

References:
    Anshumann et al., 2025, arXiv 2503.16870 (draws from the teacher, stored); Horvitz and Thompson, 1952
    (weights); Madow, 1949 (one uniform for all slots).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.methods.sampling import inverse_cdf
from hpd.methods.supports import LOGPROB_FLOOR, Draws

__all__ = ["systematic_draws"]


def systematic_draws(logprobs: Float[Tensor, "N V"], uniforms: Float[Tensor, "N"], n: int) -> Draws:
    """n tokens of each row and the logarithms of their weights, in nats.

    A row with fewer tokens of any mass repeats its first one: it counts once.

    Args:
        logprobs: normalized, nats.
        uniforms: one in [0, 1) for each row, float64.
        n: slots, less than V.
    """
    probs = logprobs.double().exp()
    top = probs.topk(n, -1)
    slots = torch.arange(n, device=probs.device)
    # Mass of each of them and of all behind it; summed from the small end, where one minus a sum is rounding.
    behind = probs.sum(-1, keepdim=True) - top.values.sum(-1, keepdim=True)
    behind = top.values.flip(-1).cumsum(-1).flip(-1) + behind.clamp_min(0.0)
    certain = (top.values * (n - slots) >= behind * (1.0 - 1e-12)).long().cumprod(-1).bool()
    num_certain = certain.sum(-1, keepdim=True)
    rest = probs.scatter(1, torch.where(certain, top.indices, top.indices[:, :1]), 0.0)
    # Without a certain token nothing was to be emptied.
    rest[:, :] = torch.where(num_certain > 0, rest, probs)
    left = (n - num_certain).clamp_min(1)
    mass = rest.sum(-1, keepdim=True)
    place = (slots - num_certain).clamp_min(0)
    drawn = inverse_cdf(rest, ((uniforms[:, None] + place) / left).clamp_max(1.0 - 2.0**-53))
    tokens = torch.where(certain, top.indices, drawn)
    weights = torch.where(certain, top.values, mass / left)
    # Nothing is left to draw from: the row's tokens are fewer.
    spare = ~certain & (mass <= 0.0)
    tokens, weights = torch.where(spare, tokens[:, :1], tokens), torch.where(spare, weights[:, :1], weights)
    return Draws(tokens, weights.log().clamp_min(LOGPROB_FLOOR).to(logprobs.dtype))
