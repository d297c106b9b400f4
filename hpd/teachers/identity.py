"""Which model and which tokenizer: short hashes that change when they do."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

__all__ = ["model_fingerprint", "tokenizer_hash"]

_VALUES_PER_TENSOR = 4096


def model_fingerprint(model: nn.Module) -> str:
    """32 hex digits from the configuration and the parameters: names, shapes, dtypes and 4,096 evenly spaced values of each.

    Values are sampled, because hashing all of a large model takes as long as loading it; training moves all of them.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        # Where the weights came from and who loaded them does not change what the model computes.
        facts = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "use_cache")}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        step = max(1, len(flat) // _VALUES_PER_TENSOR)
        digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """32 hex digits from the token map, the end token and the chat template."""
    facts = {"vocab": tokenizer.get_vocab(), "eos": tokenizer.eos_token, "template": tokenizer.chat_template}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
