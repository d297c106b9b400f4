"""What tests/models/test_slices.py asks of two processes that share rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers import AutoModelForCausalLM

from hpd.batch import TokenBatch, token_batch
from hpd.models.forward import add_head_function, label_inputs
from hpd.models.slices import RowSlices

LENGTHS = ([13, 5], [6, 2], [16, 16])
"""Of two rows: odd, one shorter than a slice, filled."""


class Leak(nn.Module):
    """Adds to each token half of the one before it, as a convolution or a recurrent state does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + nn.functional.pad(states, (0, 0, 1, 0))[:, :-1] / 2


def rows(lengths: list[int]) -> tuple[dict[str, Any], TokenBatch]:
    """Two rows, padded on the right; the first tokens of each are its prompt."""
    width = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    ids = torch.randint(5, 200, mask.shape, generator=torch.Generator().manual_seed(width)) * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :1] = -100
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return inputs, token_batch(inputs, vocab=190)


def compare(rank: int, folder: Path, families: tuple[str, ...]) -> None:
    """Write how far losses and gradients of shared rows are from those of whole ones."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    slices, found = RowSlices(distributed.group.WORLD), {}
    for family in families:
        model = add_head_function(AutoModelForCausalLM.from_pretrained(folder / family))
        slices.attach(model, family)
        slices.probe(model, family)
        found[family] = [_distances(model, slices, *rows(lengths)) for lengths in LENGTHS]
    model = add_head_function(AutoModelForCausalLM.from_pretrained(folder / families[0]))
    model.model.layers[0].mlp = Leak(model.model.layers[0].mlp)
    slices.attach(model, "leaking")
    try:
        slices.probe(model, "leaking")
    except ValueError as error:
        found["leak"] = str(error)
    try:
        slices.cut(*rows([8 + rank, 8]))
    except ValueError as error:
        found["other rows"] = str(error)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _distances(model: Any, slices: RowSlices, inputs: dict[str, Any], batch: TokenBatch) -> dict[str, Any]:
    def gradients(inputs: dict[str, Any], batch: TokenBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()

        def head(scores: Any) -> torch.Tensor:
            logits = scores.hidden @ scores.head.weight.T
            return nn.functional.cross_entropy(logits, batch.labels, reduction="sum")

        loss = model(**label_inputs(inputs, batch.index), head_function=head)
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected, wanted = gradients(inputs, batch)
    own, part = slices.cut(inputs, batch)
    loss, given = gradients(own, part)
    counts = torch.tensor([len(part.labels), int(part.dropped), own["attention_mask"].sum()])
    for tensor in (loss, counts, *given):
        distributed.all_reduce(tensor)
    return {
        "loss": float((loss - expected).abs() / expected),
        "gradient": max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True)),
        "counts": counts.tolist(),
        "expected": [len(batch.labels), int(batch.dropped), int(inputs["attention_mask"].sum())],
        "width": own["input_ids"].shape[1],
    }
