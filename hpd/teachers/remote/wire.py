"""Tensors over HTTP: safetensors bytes both ways, and the checks of what comes in.

Axes: S tokens of all rows of a request, B rows, N label positions, K tokens asked for.
"""

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
    "Query",
    "Row",
    "check_finite",
    "dump",
    "grouped",
    "load",
    "pack_rows",
    "read_query",
    "rows_of",
]


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
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )


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
    ids, lengths, positions, counts = (
        tensors[n].long() for n in ("input_ids", "lengths", "positions", "counts")
    )
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


class Row(NamedTuple):
    """One row of a batch, cut after the label of its last label position."""

    tokens: list[int]
    positions: list[int]
    """Ascending; the label of position t is the token at t + 1."""

    @property
    def labels(self) -> list[int]:
        return [self.tokens[position + 1] for position in self.positions]


def rows_of(inputs: dict[str, Any], batch: TokenBatch) -> list[Row]:
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
        own = (place[owner == name] - first).tolist()
        rows.append(Row(tokens[first : first + own[-1] + 2].tolist(), own))
    return rows


def grouped(rows: Sequence[Row], max_rows: int, max_tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows, at most `max_rows` and `max_tokens` (but at least one row) at a time."""
    group: list[Row] = []
    size = 0
    for row in rows:
        if group and (len(group) >= max_rows or size + len(row.tokens) > max_tokens):
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row.tokens)
    if group:
        yield group
