"""What a batch asks a teacher elsewhere: its rows without padding, and their label positions.

Axes: B rows, T tokens, N label positions of the batch, n those of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpd.batch import TokenBatch

__all__ = ["Row", "grouped", "rows_of"]


class Row(NamedTuple):
    """One row of a batch, cut after the label of its last label position."""

    tokens: list[int]
    positions: list[int]
    """Ascending; the label of position t is the token at t + 1."""

    @property
    def labels(self) -> list[int]:
        return [self.tokens[position + 1] for position in self.positions]


def rows_of(inputs: dict[str, Any], batch: TokenBatch) -> list[Row]:
    """The rows that hold a label, in the order of the batch, whatever its layout (padded on either side, or padding-free).

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
