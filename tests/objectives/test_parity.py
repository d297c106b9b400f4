"""Objectives against the losses and gradients that public reference code computed (tests/parity/README.md).

The tests compare at the level of an Objective: log-probabilities over the shared vocabulary prefix at label
positions, the value summed and averaged over label tokens, the gradient assembled from the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hpd.objectives import OBJECTIVES, Objective

RELATIVE_TOLERANCE = 2e-5
PARITY = Path(__file__).parents[1] / "parity"
ENTRIES: list[dict[str, Any]] = json.loads((PARITY / "index.json").read_text())


class Fixture(NamedTuple):
    """Axes: B batch, T time, V shared vocabulary, N label positions."""

    student_logits: Tensor  # [B, T - 1, V]
    teacher_logits: Tensor  # [B, T - 1, V]
    labels: Tensor  # [B, T - 1], the token each position predicts
    is_label: Tensor  # [B, T - 1]
    sampled: Tensor | None  # [B, T - 1]
    grad: Tensor  # [B, T, V]


class LossAndGrad(NamedTuple):
    loss: Tensor
    grad: Tensor  # [N, V], with respect to the student's logits


def load(entry: dict[str, Any], dtype: torch.dtype) -> Fixture:
    tensors = load_file(PARITY / entry["file"])
    vocabulary = min(tensors["student_logits"].shape[-1], tensors["teacher_logits"].shape[-1])
    labels = tensors["labels"][:, 1:]
    return Fixture(
        tensors["student_logits"][:, :-1, :vocabulary].to(dtype),
        tensors["teacher_logits"][:, :-1, :vocabulary].to(dtype),
        labels,
        (labels != -100) & (labels < vocabulary),
        tensors.get("sampled"),
        tensors["grad"].to(dtype),
    )


def assemble(
    objective: Objective, teacher_logprobs: Tensor, student_logprobs: Tensor, tokens: Tensor | None = None
) -> LossAndGrad:
    """Mean over positions of the summed value, and its gradient `((sum w) q - w) / N`.

    `tokens` are the columns [label, draw] of a label objective; a draw that equals the label counts for
    nothing.
    """
    if tokens is None:
        value, weights = (f(teacher_logprobs, student_logprobs) for f in (objective.value, objective.weights))
    else:
        counts = torch.ones_like(student_logprobs[:, : tokens.shape[1]])
        counts[:, 1:] = (tokens[:, 1:] != tokens[:, :1]).to(counts.dtype)
        columns = teacher_logprobs.gather(1, tokens), student_logprobs.gather(1, tokens)
        value = objective.value(*columns) * counts
        weights = torch.zeros_like(student_logprobs).scatter_add(
            1, tokens, objective.weights(*columns) * counts
        )
    grad = (weights.sum(-1, keepdim=True) * student_logprobs.exp() - weights) / len(weights)
    return LossAndGrad(value.sum(-1).mean(), grad)


def entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs).sum(-1).mean()


def missing_entropy(
    entry: dict[str, Any], teacher_logprobs: Tensor, student_logprobs: Tensor
) -> Tensor | float:
    """What the reference's loss exceeds the divergence by, where it reports a cross-entropy."""
    params = entry["params"]
    match entry["objective"]:
        case "forward_kl" | "skew_forward_kl":
            return entropy(teacher_logprobs)
        case "symmetric_kl":
            return (1 - params["lam"]) * entropy(teacher_logprobs)
        case "taid":
            mixed = (1 - params["t"]) * student_logprobs + params["t"] * teacher_logprobs
            return entropy(torch.log_softmax(mixed, -1))
    return 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"].removesuffix(".safetensors"))
def test_loss_and_gradient_match_the_reference(entry: dict[str, Any], dtype: torch.dtype) -> None:
    fixture = load(entry, dtype)
    params = dict(entry["params"])
    assert params.pop("temperature", 1.0) == 1.0
    objective = OBJECTIVES[entry["objective"]](**params)
    teacher_logprobs = torch.log_softmax(fixture.teacher_logits[fixture.is_label], -1)  # [N, V]
    student_logprobs = torch.log_softmax(fixture.student_logits[fixture.is_label], -1)  # [N, V]
    tokens = None
    if objective.domain == "label":
        tokens = torch.stack(
            [fixture.labels[fixture.is_label], fixture.sampled[fixture.is_label]], 1
        )  # [N, 2]
    got = assemble(objective, teacher_logprobs, student_logprobs, tokens)
    loss = got.loss + missing_entropy(entry, teacher_logprobs, student_logprobs)
    assert loss.item() == pytest.approx(entry["loss"], rel=RELATIVE_TOLERANCE)

    grad = torch.zeros_like(fixture.grad)  # [B, T, V]
    grad[:, :-1, : got.grad.shape[-1]][fixture.is_label] = got.grad
    assert (grad - fixture.grad).norm() <= RELATIVE_TOLERANCE * fixture.grad.norm()
    assert (grad - fixture.grad).abs().max() <= RELATIVE_TOLERANCE * fixture.grad.abs().max()


def test_every_reference_method_is_compared() -> None:
    files = {path.name for path in PARITY.glob("*.safetensors")}
    assert files == {entry["file"] for entry in ENTRIES}
    assert {entry["objective"] for entry in ENTRIES} <= set(OBJECTIVES)
