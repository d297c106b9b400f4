"""Tensors over HTTP: safetensors bytes both ways, and the checks of what comes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from hpd.batch import TokenBatch

__all__ = [
    "FINGERPRINT_HEADER",
    "MEDIA_TYPE",
    "WIRE_DTYPES",
    "ScoreRequest",
    "WireRow",
    "check_finite",
    "dump",
    "grouped",
    "load",
    "pack_rows",
    "read_request",
    "rows_of",
]

MEDIA_TYPE = "application/octet-stream"
FINGERPRINT_HEADER = "x-hpd-fingerprint"
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WireRow(NamedTuple):
    """A row of a batch, cut after the label of its last label position."""

    tokens: list[int]
    positions: list[int]
    """Ascending; the label of position t is the token at t + 1."""

    @property
    def labels(self) -> list[int]:
        return [self.tokens[position + 1] for position in self.positions]


class ScoreRequest(NamedTuple):
    """Rows, and the positions in them that are asked about."""

    rows: list[Int[Tensor, "t"]]
    positions: list[Int[Tensor, "n"]]
    """Of each row."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))


def dump(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors to bytes."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )


def load(content: bytes) -> dict[str, Tensor]:
    """Bytes to tensors.

    Raises:
        ValueError: they are not safetensors.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"the body is not valid safetensors: {' '.join(str(error).split())[:200]}") from None


def pack_rows(rows: Sequence[WireRow]) -> dict[str, Tensor]:
    """The tensors of a request; `read_request` is its counterpart."""
    lengths = [row.positions[-1] + 1 for row in rows]
    tokens = [token for row, length in zip(rows, lengths, strict=True) for token in row.tokens[:length]]
    return {
        "input_ids": torch.tensor(tokens),
        "lengths": torch.tensor(lengths),
        "positions": torch.tensor([position for row in rows for position in row.positions]),
        "counts": torch.tensor([len(row.positions) for row in rows]),
    }


def read_request(content: bytes, *, vocab: int, max_tokens: int, max_row_tokens: int) -> ScoreRequest:
    """A request's body, every number of it checked: the model behind must never see a bad one.

    Raises:
        ValueError: malformed bytes, missing or unknown tensors, wrong types or shapes, numbers out of range.
    """
    tensors = load(content)
    names = ("input_ids", "lengths", "positions", "counts")
    if set(tensors) != set(names):
        raise ValueError(f"the body must hold the tensors {', '.join(names)} and no others")
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int64, torch.int32) or tensor.ndim != 1 or not tensor.numel():
            raise ValueError(f"{name} must be a non-empty int64 tensor of rank 1")
    ids, lengths, positions, counts = (tensors[name].long() for name in names)
    if max(len(ids), len(positions)) > max_tokens:
        raise ValueError(
            f"{len(ids)} tokens and {len(positions)} positions in one request, at most {max_tokens} are "
            "answered"
        )
    _check_range("input_ids", ids, 0, vocab)
    _check_range("lengths", lengths, 1, max_row_tokens + 1)
    _check_range("counts", counts, 1, len(positions) + 1)
    if len(lengths) != len(counts) or int(lengths.sum()) != len(ids) or int(counts.sum()) != len(positions):
        raise ValueError(
            "lengths must sum to the tokens, counts to the positions, and both name the same rows"
        )
    _check_range("positions", positions, 0, lengths.repeat_interleave(counts))
    rows = [row.clone() for row in ids.split(lengths.tolist())]
    return ScoreRequest(rows, list(positions.split(counts.tolist())))


def _check_range(name: str, tensor: Tensor, low: int, high: int | Tensor) -> None:
    if bool(((tensor < low) | (tensor >= high)).any()):
        limit = f"below {high}" if isinstance(high, int) else "inside their rows"
        raise ValueError(f"{name} must be at least {low} and {limit}")


def check_finite(name: str, tensor: Float[Tensor, "..."]) -> None:
    """Raise ValueError where a number is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity")


def rows_of(inputs: Mapping[str, Any], batch: TokenBatch) -> list[WireRow]:
    """The rows that hold a label, in the order of the batch, whatever its layout (padded on either side, or
    padding-free).

    The label positions of all rows, one after the other, are those of `batch`.
    """
    input_ids: Tensor = inputs["input_ids"].cpu()
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    starts = torch.zeros_like(real)
    if positions is not None:
        starts = positions.cpu() == 0
    starts[:, 0] = True
    segment = (starts.flatten().cumsum(0) - 1)[real.flatten()]
    tokens = input_ids[real]
    place = (real.flatten().cumsum(0) - 1)[batch.index.cpu()]  # of the label positions among the real tokens
    owner = segment[place]
    rows = []
    for name in owner.unique_consecutive().tolist():
        first = int(torch.searchsorted(segment, name))
        within = (place[owner == name] - first).tolist()
        rows.append(WireRow(tokens[first : first + within[-1] + 2].tolist(), within))
    return rows


def grouped(rows: Sequence[WireRow], max_rows: int, max_tokens: int) -> Iterator[list[WireRow]]:
    """Consecutive rows, at most `max_rows` and `max_tokens` (but at least one row) at a time."""
    group: list[WireRow] = []
    size = 0
    for row in rows:
        if group and (len(group) >= max_rows or size + len(row.tokens) > max_tokens):
            yield group
            group = []
            size = 0
        group.append(row)
        size += len(row.tokens)
    if group:
        yield group
