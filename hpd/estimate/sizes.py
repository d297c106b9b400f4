"""Bytes of weights and optimizer states, and sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from hpd.config.models import TeacherConfig
from hpd.teachers.origin import folder_of

__all__ = ["head_bytes", "optimizer_bytes", "parse_bytes", "step_scratch", "tensor_bytes"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}{u}": b ** (i + 1) for u, b in (("B", 1000), ("iB", 1024)) for i, p in enumerate("KMGT")},
}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def head_bytes(source: TeacherConfig, config: Any) -> int:
    """Bytes of the head of a teacher that is elsewhere; with likeliest tokens not even the head is here."""
    if source.type == "server" and source.protocol == "hpd":
        return config.vocab_size * config.hidden_size * {"bfloat16": 2, "float16": 2}.get(source.dtype, 4)
    if source.type == "cached":
        head = folder_of(str(source.path)) / "head.safetensors"
        return head.stat().st_size if head.is_file() else 0
    return 0


def optimizer_bytes(trained: Sequence[Tensor], name: str) -> int:
    """Bytes of the states of Trainer's `optim`: two numbers per parameter unless known otherwise."""
    if "8bit" in name:
        return 2 * sum(p.numel() for p in trained)
    if "adafactor" in name:  # a row and a column of second moments
        return sum(
            p.element_size() * (p.shape[-1] + p.numel() // p.shape[-1] if p.ndim > 1 else p.numel())
            for p in trained
        )
    if "sgd" in name:
        return 0
    return tensor_bytes(trained) * (1 if "lion" in name or "rmsprop" in name else 2)


def step_scratch(trained: Sequence[Tensor], name: str) -> int:
    """Bytes of the optimizer's temporaries: two of the largest parameter; fused kernels work in place."""
    if "fused" in name or "sgd" in name:
        return 0
    return 2 * max((p.numel() * p.element_size() for p in trained), default=0)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 24GiB, 500 MB or 1.5TiB.

    Raises:
        ValueError: no number, an unknown unit, or nothing at all.
    """
    units = {name.lower(): size for name, size in _UNITS.items()}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise ValueError(
            f"A size of memory is a number above 0 and a unit ({', '.join(filter(None, _UNITS))}), such as "
            f"24GiB; got {text!r}."
        )
    return int(float(match[1]) * units[match[2].lower()])
