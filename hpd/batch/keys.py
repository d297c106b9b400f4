"""Keys of label positions, and the numbers that draws are made of: from the content of rows alone.

Axes: B rows, T tokens, N label positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["row_keys", "uniforms"]

# Odd constants of the splitmix64 generator (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def row_keys(
    input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None, segment: Int[Tensor, "BT"]
) -> Int[Tensor, "B T"]:
    """64-bit keys: a hash of the whole row's tokens, then of the place in it."""
    tokens = _mix(input_ids.long() * _GOLDEN + positions.long() * _MIX_1)
    if attention_mask is not None:
        tokens = tokens * attention_mask
    rows = torch.zeros(int(segment[-1]) + 1, dtype=torch.int64).index_add_(0, segment, tokens.flatten())
    return _mix(rows[segment].view_as(input_ids) + positions.long() * _GOLDEN)


def uniforms(keys: Int[Tensor, "N"], *, seed: int, step: int, count: int) -> Float[Tensor, "N count"]:
    """Uniforms in [0, 1) that depend on (seed, optimizer step, row, position, draw) and on nothing else.

    So draws are the same whatever the chunk size, packing, padding, number of processes, or point of
    resumption. Counter based (splitmix64), float64: 53 random bits.
    """
    stream = (
        torch.arange(count, device=keys.device) * _MIX_2 + (seed * 0x9E3779B1 + step * 0x85EBCA77) % 2**62
    )
    bits = _mix(keys[:, None] ^ _mix(stream))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64; int64 products wrap, and the mask makes the shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))
