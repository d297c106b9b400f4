"""Orders of rows: the last batch of an epoch on several processes is filled with rows that have no label.

Accelerate fills it with rows from the start instead, which are then learned (and evaluated) twice, so that a
run would depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler, SequentialSampler

from hpd.batch import IGNORE_INDEX

__all__ = ["FilledOrder", "RepeatedRows", "fill", "fills_last_batch"]

# Enough for a row to be a row: one token and its successor.
_FILLING_TOKENS = 2

_OF_TOKENS = ("input_ids", "labels", "completion_mask", "assistant_masks", "position_ids")


def fills_last_batch(args: Any, rows: Any) -> bool:
    """True if several processes share rows whose number and order are known.

    Streams, unprepared rows and the orders by length keep accelerate's rule, which repeats rows.
    """
    return (
        args.world_size > 1
        and isinstance(rows, Dataset)
        and "labels" in rows.column_names
        and not args.accelerator_config.split_batches
        and not args.dataloader_drop_last
        and args.train_sampling_strategy in ("random", "sequential")
    )


def fill(rows: Dataset, multiple: int) -> Dataset:
    """`rows` followed by rows without a label, up to a multiple of `multiple`.

    The loss is a sum over label tokens, so they add nothing to it, nor to any metric but the count of input
    tokens.
    """
    missing = -len(rows) % multiple
    if missing == 0:
        return rows
    row: dict[str, Any] = dict(rows[0])
    for name in _OF_TOKENS:
        if row.get(name) is not None:
            row[name] = row[name][:_FILLING_TOKENS]
    if "seq_lengths" in row:
        row["seq_lengths"] = [len(row["input_ids"])]
    row["labels"] = [IGNORE_INDEX] * len(row["input_ids"])
    filling = Dataset.from_list([row] * missing, features=rows.features)
    return concatenate_datasets([rows, filling])


class FilledOrder(Sampler[int]):
    """The order that a single process would take `count` rows in, then the filling.

    Args:
        count: rows without the filling.
        total: with it.
        shuffled: as accelerate shuffles; otherwise in order.
        seed: of the shuffling; None: torch's, as accelerate takes it.
    """

    def __init__(self, count: int, total: int, shuffled: bool, seed: int | None):
        self._count = count
        self._total = total
        rows: Any = range(count)
        self._order: Any = (
            SeedableRandomSampler(rows, data_seed=seed) if shuffled else SequentialSampler(rows)
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; called by accelerate."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from range(self._count, self._total)


class RepeatedRows(Sampler[int]):
    """Every row `num_rollouts` times side by side, and every step's rows `updates` times in a row.

    Shuffled by (seed, epoch) alone, so that all processes and resumed runs agree. What does not fill a last
    step is left out.

    >>> list(RepeatedRows(range(5), prompts=2, num_rollouts=2, updates=1, seed=None))
    [0, 0, 1, 1, 2, 2, 3, 3]

    Args:
        rows: the dataset.
        prompts: different rows of one optimizer step, over all processes.
        num_rollouts: times side by side.
        updates: optimizer steps on the same rows.
        seed: of the shuffling; None keeps the dataset's order.
    """

    def __init__(self, rows: Sized, prompts: int, num_rollouts: int, updates: int, seed: int | None):
        self._count = len(rows)
        self._prompts = prompts
        self._seed = seed
        self._num_rollouts = num_rollouts
        self._updates = updates
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; called by the Trainer."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count // self._prompts * self._prompts * self._num_rollouts * self._updates

    def __iter__(self) -> Iterator[int]:
        order: Any = range(self._count)
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 0x9E3779B1 % 2**32 + self._epoch)
            order = torch.randperm(self._count, generator=generator).tolist()
        for start in range(0, self._count - self._prompts + 1, self._prompts):
            for _ in range(self._updates):
                for index in order[start : start + self._prompts]:
                    yield from [index] * self._num_rollouts
