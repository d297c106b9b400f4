"""Drawing tokens by inverse CDF on block sums of probabilities that are there anyway.

Axes: N label positions, n draws, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["block_tokens", "inverse_cdf", "inverse_cdf_of_blocks"]

# Tokens per block of the two-level search: about sqrt(V), so that searching the block sums and searching
# inside one block cost the same.
_BLOCK_TOKENS = 256


def inverse_cdf(probs: Float[Tensor, "N V"], uniforms: Float[Tensor, "N n"]) -> Int[Tensor, "N n"]:
    r"""Tokens drawn from `probs` by inverse CDF on block sums.

    .. math:: a = \min \{ v : \sum_{u \le v} q_u > U \sum_u q_u \}

    One pass sums blocks of the probabilities; the search then reads one block per draw. No random number is
    made over the vocabulary, and the same uniform gives the same token whatever else is in the batch.

    Args:
        probs: non-negative, need not be normalized; a row without any mass gives token 0.
        uniforms: in [0, 1), float64 so that tokens rarer than float32's step can be drawn.
    """
    size = block_tokens(probs.shape[1])
    whole = probs.shape[1] - probs.shape[1] % size
    sums = probs[:, :whole].unflatten(1, (-1, size)).sum(-1)  # [N, blocks]
    if whole < probs.shape[1]:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], dim=1)
    return inverse_cdf_of_blocks(sums, lambda tokens: probs.gather(1, tokens), probs.shape[1], uniforms)


def block_tokens(vocab: int) -> int:
    """Tokens of a block; the last block has what is left."""
    return min(_BLOCK_TOKENS, vocab)


def inverse_cdf_of_blocks(
    sums: Float[Tensor, "N b"],
    probs_at: Callable[[Int[Tensor, "N k"]], Float[Tensor, "N k"]],
    vocab: int,
    uniforms: Float[Tensor, "N n"],
) -> Int[Tensor, "N n"]:
    """`inverse_cdf` where the sums of the blocks are known, and the probabilities of any tokens.

    Args:
        sums: mass of each block of `block_tokens` tokens.
        probs_at: the probabilities of some tokens.
        vocab: V.
        uniforms: as there.
    """
    size = block_tokens(vocab)
    dtype = torch.float32 if sums.device.type == "mps" else torch.float64  # MPS has no float64
    block, rest = _search(sums.to(dtype), uniforms.to(dtype))
    tokens = block[..., None] * size + torch.arange(size, device=sums.device)  # [N, n, block]
    inside = probs_at(tokens.clamp_max(vocab - 1).flatten(1)).view(tokens.shape)
    inside = torch.where(tokens < vocab, inside, 0.0)
    offset, _ = _search(inside.flatten(0, 1).to(dtype), rest.reshape(-1, 1))
    return block * size + offset.view_as(block)


def _search(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the mass that each uniform falls in, and how far into that mass it lies, in [0, 1)."""
    cumulative = masses.cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # Rounding can put the target on the last edge: the last index with any mass is meant.
    ranks = torch.arange(masses.shape[-1], device=masses.device)
    index = torch.minimum(index, torch.where(masses > 0, ranks, 0).amax(-1, keepdim=True))
    mass = masses.gather(-1, index)
    start = cumulative.gather(-1, index) - mass
    into = (uniforms * cumulative[:, -1:] - start) / mass.clamp_min(torch.finfo(masses.dtype).tiny)
    return index, into.clamp(0.0, 1.0 - 2.0**-53)
