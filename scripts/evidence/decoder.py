"""A small decoder (RMSNorm, rotary attention, SwiGLU, tied head) in torch alone, and its sampling.

Axes: B rows, T tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    """Size of a decoder."""

    layers: int
    width: int
    heads: int

    @property
    def inner(self) -> int:
        """Width of the gated layer: 8/3 of the width, in multiples of 64."""
        return -(-8 * self.width // (3 * 64)) * 64

    @property
    def body_weights(self) -> int:
        """Weights of the blocks: what a token's forward pass multiplies, without the head."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner)


class KeysValues:
    """Keys and values of the tokens read so far, of every layer."""

    def __init__(self, shape: Shape, rows: int, length: int, like: Tensor):
        head = shape.width // shape.heads
        self.pairs = like.new_empty(shape.layers, 2, rows, shape.heads, length, head)
        self.length = 0


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.norm_1, self.norm_2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], kept: Tensor | None, first: int) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
        q, k = (_rotated(side, rotation) for side in (q, k))
        if kept is not None:
            kept[0, :, :, first : first + length] = k
            kept[1, :, :, first : first + length] = v
            k, v = kept[:, :, :, : first + length].to(q.dtype)
        # One new token reads everything before it; several start a row.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Token ids to hidden states; the head is the embedding's weight."""

    def __init__(self, shape: Shape, vocab: int, seed: int):
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # What is added to the residual stream starts smaller, as in GPT-2.
                std = (
                    0.02 / (2 * shape.layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                )
                nn.init.normal_(weight, std=std, generator=generator)

    @property
    def head(self) -> nn.Parameter:
        return self.embed.weight  # type: ignore[return-value]

    def forward(self, tokens: Tensor, kept: KeysValues | None = None) -> Tensor:
        """Hidden states [B, T, D] after the last norm. With `kept`, tokens follow those read before."""
        first = kept.length if kept else 0
        rotation = _rotation(first, tokens.shape[1], self.shape.width // self.shape.heads, tokens.device)
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, rotation, kept.pairs[index] if kept else None, first)
        if kept:
            kept.length += tokens.shape[1]
        return self.norm(x)


def _rotation(first: int, length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(first, first + length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in rotation)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@torch.no_grad()
def write(
    model: Decoder,
    prompts: Tensor,
    most_tokens: int,
    end: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continuations [B, most_tokens] of prompts of one length; `end` fills what follows the end of a text.

    Args:
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens with at least this mass.
        seed: of the draws.
    """
    rows = len(prompts)
    generator = torch.Generator(prompts.device).manual_seed(seed)
    kept = KeysValues(model.shape, rows, prompts.shape[1] + most_tokens, model.head)
    written = torch.full((rows, most_tokens), end, device=prompts.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=prompts.device)
    tokens = prompts
    for place in range(most_tokens):
        logits = (model(tokens, kept)[:, -1] @ model.head.t()).float()
        chosen = logits.argmax(-1)
        if temperature > 0:
            probs = torch.softmax(logits / temperature, -1)
            chosen = torch.multinomial(_cut(probs, top_p), 1, generator=generator)[:, 0]
        written[:, place] = torch.where(ended, end, chosen)
        ended |= chosen == end
        if bool(ended.all()):
            break
        tokens = written[:, place, None]
    return written


def _cut(probs: Tensor, top_p: float) -> Tensor:
    if top_p >= 1.0:
        return probs
    ranked, order = probs.sort(-1, descending=True)
    ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)
