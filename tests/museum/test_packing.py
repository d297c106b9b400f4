"""Bugs of packing: rows that lie behind one another and are still rows of their own."""

import pytest
import torch
from helpers.museum import exhibit, swap
from helpers.trainers import gradient, make_trainer
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.data.collator import DistillCollator


def flattened(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows without padding, one behind the other; every token is a label."""
    ids = torch.tensor([[token for row in rows for token in row]])
    places = torch.tensor([[place for row in rows for place in range(len(row))]])
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": places}


def test_row_learns_how_the_next_row_begins():
    rows = [[3, 1, 4, 1], [5, 9], [2, 6, 5]]

    def measure():
        taken = TokenBatch.pop(DistillCollator(lambda examples: flattened(rows))([{}]))
        return taken.labels.tolist(), [token for row in rows for token in row[1:]]

    def mutate(patch):
        def one_long_row(original):
            return lambda inputs, *rest, **named: original(
                {**inputs, "position_ids": torch.arange(9)[None]}, *rest, **named
            )

        swap(patch, "hpd.data.collator:token_batch", one_long_row)

    exhibit(measure, mutate)


@pytest.mark.parametrize("layout", [{"padding_free": True, "max_length": None}, {"packing": True}])
def test_packed_rows_see_each_other(pair, tmp_path, layout):
    together = make_trainer(pair, tmp_path, method="forward_kl", **layout)
    apart = gradient(make_trainer(pair, tmp_path, method="forward_kl"))[1]

    def measure():
        return gradient(together)[1], apart

    def mutate(patch):
        def without_positions(original):
            return tuple(name for name in original if name != "position_ids")

        swap(patch, "hpd.models.forward:_MODEL_INPUTS", without_positions)

    exhibit(measure, mutate, tolerance=1e-4)
