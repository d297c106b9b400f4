"""Whether bfloat16 pays on this CPU: its products are 2.5 times as fast as float32's, or 80 times as slow."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from hpd.models.pairing import CheckResult

__all__ = ["bfloat16_seconds", "precision_hint", "precision_verdicts"]

_ROWS, _INNER, _COLUMNS = 128, 512, 2048
_PAYS = 0.75
"""Share of float32's time below which bfloat16 is recommended: casts cost the rest."""


@functools.cache
def bfloat16_seconds() -> float:
    """Seconds of a product in bfloat16 over those of the same one in float32, on the CPU: measured once a
    process, in some milliseconds (half a second where it is emulated)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_INNER, _COLUMNS, dtype=dtype)
        _seconds(a, b)  # the first one sets up
        seconds[dtype] = min(_seconds(a, b) for _ in range(5))
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start


def precision_verdicts(args: Any) -> list[CheckResult]:
    """A warning where train.bf16 makes a CPU slower.

    Args:
        args: `DistillConfig`.
    """
    if not args.bf16 or args.device.type != "cpu" or bfloat16_seconds() <= 1.0:
        return []
    text = (
        f"train.bf16 is true, and products in bfloat16 take {bfloat16_seconds():.1f} times as long as in "
        "float32 on this CPU: remove it"
    )
    return [CheckResult("warning", "precision", text)]


def precision_hint(args: Any) -> str | None:
    """What a CPU computes in, and why; None on an accelerator."""
    if args.device.type != "cpu":
        return None
    share = bfloat16_seconds()
    measured = f"products in bfloat16 take {share:.2g} of float32's time here"
    if args.bf16:
        return f"precision: bfloat16 (train.bf16); {measured}"
    if share < _PAYS:
        return f"precision: float32; {measured}: train.bf16=true train.use_cpu=true is faster"
    return f"precision: float32; {measured}"
