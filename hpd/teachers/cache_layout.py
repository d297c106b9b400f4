"""Which rows and positions of a dataset go into which shard of a cache: decided before the first forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Layout", "lay_out"]


class Layout(NamedTuple):
    """Which rows and positions go where."""

    rows: npt.NDArray[np.int64]
    """Numbers of the rows with something new, shard after shard."""
    starts: npt.NDArray[np.int64]
    """Where in `rows` each shard starts, and the end."""
    masks: list[npt.NDArray[np.bool_]]
    """Of each row in `rows`: which of its label positions are stored (one seen before is not)."""
    keys: npt.NDArray[np.int64]
    """Of all stored positions, in the order of `rows`."""

    def shard(self, number: int) -> range:
        return range(int(self.starts[number]), int(self.starts[number + 1]))


def lay_out(rows: Iterable[tuple[Any, Tensor]], shard_positions: int) -> Layout:
    """Cut prepared rows into shards of about `shard_positions` positions; depends on the rows alone.

    Args:
        rows: each with the keys of its label positions.

    Raises:
        ValueError: no row has a label.
    """
    keys, lengths = [], []
    for row, own in rows:
        keys.append(own.numpy())
        lengths.append(len(row["input_ids"]))
    ends = np.cumsum([len(k) for k in keys])
    if not len(ends) or not ends[-1]:
        raise ValueError("Every label is masked: no row keeps a completion token within train.max_length.")
    everything = np.concatenate(keys)
    new = np.zeros(len(everything), dtype=bool)
    new[np.unique(everything, return_index=True)[1]] = True
    masks = np.split(new, ends[:-1])
    counts = np.array([mask.sum() for mask in masks])
    # A row lies in one shard whole: the one in which its first position falls.
    number = (np.cumsum(counts) - counts) // shard_positions
    # Rows of a length beside each other, or half of every batch would be padding.
    order = np.lexsort((lengths, number))
    order = order[counts[order] > 0]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(number[order])) + 1, [len(order)]])
    chosen = [masks[i] for i in order]
    return Layout(order, starts, chosen, np.concatenate([keys[i][mask] for i, mask in zip(order, chosen, strict=True)]))
