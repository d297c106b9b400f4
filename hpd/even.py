"""The last batch of an epoch on several processes: what is missing is filled with rows that have no label.

Accelerate fills it with rows from the start instead, which are then learnt (and evaluated) twice, so that a run would depend on
the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler, SequentialSampler

from hpd.batch import IGNORE_INDEX

__all__ = ["FilledOrder", "fill", "fills_last_batch"]

# Enough for a row to be a row: one token and its successor.
_FILLING_TOKENS = 2
_OF_TOKENS = ("input_ids", "labels", "completion_mask", "assistant_masks", "position_ids")


def fills_last_batch(args: Any, rows: Any) -> bool:
    """Whether several processes share rows whose number and order are known.

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

    The loss is a sum over label tokens, so they add nothing to it, nor to any metric but the count of input tokens.
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
        self._count, self._total = count, total
        rows: Any = range(count)
        self._order: Any = SeedableRandomSampler(rows, data_seed=seed) if shuffled else SequentialSampler(rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; called by accelerate."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from range(self._count, self._total)
