"""A tiny model whose positions are absolute: a token in another place is another input."""

from __future__ import annotations

import torch
from tiny_models import NUM_TOKENS, tiny_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

__all__ = ["absolute_positions"]


def absolute_positions(seed: int) -> nn.Module:
    """A random GPT-2 of one layer, with weights that make positions matter."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=NUM_TOKENS,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config).eval()
