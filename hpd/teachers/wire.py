"""Tensors over HTTP: safetensors bytes both ways, and the checks of what comes in.

Axes: S tokens of all rows of a request, B rows, N label positions, K tokens asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from hpd.teachers.rows import Row

__all__ = [
    "FINGERPRINT_HEADER", "MEDIA_TYPE", "WIRE_DTYPES", "Query", "check_finite", "dump", "load", "pack_rows",
    "read_query",
]  # fmt: skip

MEDIA_TYPE = "application/octet-stream"
FINGERPRINT_HEADER = "x-hpd-fingerprint"
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Query(NamedTuple):
    """Rows, the positions asked about, and perhaps tokens whose log-probabilities are wanted there."""

    rows: list[Int[Tensor, "t"]]
    positions: list[Int[Tensor, "n"]]
    """Of each row."""
    tokens: Int[Tensor, "N K"] | None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def num_positions(self) -> int:
        return sum(map(len, self.positions))


def dump(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors to bytes."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def load(content: bytes) -> dict[str, Tensor]:
    """Bytes to tensors.

    Raises:
        ValueError: they are no safetensors.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"the body is not valid safetensors: {' '.join(str(error).split())[:200]}") from None


def pack_rows(rows: Sequence[Row], *, label: bool) -> dict[str, Tensor]:
    """The tensors of a request; with `label`, each position asks for its label's log-probability."""
    tokens = [token for row in rows for token in row.tokens[: row.positions[-1] + 1]]
    lengths = [row.positions[-1] + 1 for row in rows]
    packed = {
        "input_ids": torch.tensor(tokens),
        "lengths": torch.tensor(lengths),
        "positions": torch.tensor([position for row in rows for position in row.positions]),
        "counts": torch.tensor([len(row.positions) for row in rows]),
    }
    if label:
        packed["tokens"] = torch.tensor([token for row in rows for token in row.labels])[:, None]
    return packed


def read_query(content: bytes, *, vocab: int, max_tokens: int, max_row_tokens: int) -> Query:
    """A request's body, every number of it checked: the model behind must never see a bad one.

    Raises:
        ValueError: malformed bytes, missing or unknown tensors, wrong types or shapes, numbers out of range.
    """
    tensors = load(content)
    needed, allowed = {"input_ids", "lengths", "positions", "counts"}, {"tokens"}
    if not needed <= set(tensors) <= needed | allowed:
        raise ValueError(f"the body must hold the tensors {', '.join(sorted(needed))} (and perhaps tokens)")
    for name, tensor in tensors.items():
        rank = 2 if name == "tokens" else 1
        if tensor.dtype not in (torch.int64, torch.int32) or tensor.ndim != rank or not tensor.numel():
            raise ValueError(f"{name} must be a non-empty int64 tensor of rank {rank}")
    ids, lengths, positions, counts = (tensors[n].long() for n in ("input_ids", "lengths", "positions", "counts"))
    if max(len(ids), len(positions)) > max_tokens:
        raise ValueError(f"{len(ids)} tokens and {len(positions)} positions in one request, at most {max_tokens} are answered")
    _check_range("input_ids", ids, 0, vocab)
    _check_range("lengths", lengths, 1, max_row_tokens + 1)
    _check_range("counts", counts, 1, len(positions) + 1)
    if len(lengths) != len(counts) or int(lengths.sum()) != len(ids) or int(counts.sum()) != len(positions):
        raise ValueError("lengths must sum to the tokens, counts to the positions, and both name the same rows")
    _check_range("positions", positions, 0, lengths.repeat_interleave(counts))
    tokens = tensors.get("tokens")
    if tokens is not None:
        if len(tokens) != len(positions) or tokens.numel() > max_tokens * 16:
            raise ValueError(f"tokens must have one row per position, and at most {max_tokens * 16} elements")
        _check_range("tokens", tokens, 0, vocab)
        tokens = tokens.long()
    rows = [row.clone() for row in ids.split(lengths.tolist())]
    return Query(rows, list(positions.split(counts.tolist())), tokens)


def _check_range(name: str, tensor: Tensor, low: int, high: int | Tensor) -> None:
    if bool(((tensor < low) | (tensor >= high)).any()):
        limit = f"below {high}" if isinstance(high, int) else "inside their rows"
        raise ValueError(f"{name} must be at least {low} and {limit}")


def check_finite(name: str, tensor: Float[Tensor, "..."]) -> None:
    """Raise ValueError where a number is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity")
