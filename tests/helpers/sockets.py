"""Ports and padded batches."""

import socket
from itertools import chain

import torch

from hpd.batch import IGNORE_INDEX, token_batch

ROWS = [[5, 9, 33, 120, 44, 7], [80, 81, 82], [9, 9, 200, 250, 299, 13, 14, 15, 16]]


def padded(side="right", rows=ROWS, free_of_padding=False):
    """A collated batch: every token but the first two of each row is a label."""
    labels = [[IGNORE_INDEX] * 2 + row[2:] for row in rows]
    if free_of_padding:
        flat = {
            "input_ids": torch.tensor([list(chain(*rows))]),
            "labels": torch.tensor([list(chain(*labels))]),
        }
        flat["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
        inputs = flat
    else:
        width = max(map(len, rows))

        def pad(row, value):
            fill = [value] * (width - len(row))
            return fill + row if side == "left" else row + fill

        inputs = {
            "input_ids": torch.tensor([pad(row, 0) for row in rows]),
            "labels": torch.tensor([pad(row, IGNORE_INDEX) for row in labels]),
            "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        }
    batch = token_batch(inputs)
    return {**inputs, **{f"label_{name}": value for name, value in batch._asdict().items()}}, batch


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
