"""Memory of a training step, predicted before a weight is loaded.

The student's forward and backward pass, the loss operator's buffers and the teacher's forward pass are run on
tensors without data (torch's FakeTensorMode), and what is alive at each moment is added up. So the prediction
holds for every architecture, attention implementation, adapter, precision and kind of checkpointing that the
libraries have, without a formula for each.

Axes: N label positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import PretrainedConfig
from transformers.training_args import OptimizerNames

from hpd.config.schema import Recipe
from hpd.data.lengths import Lengths
from hpd.estimate.cost import runs_teacher
from hpd.estimate.fake_models import (
    OperatorGradients,
    backbone,
    head_weight,
    meta_model,
    meta_student,
    without_data,
)
from hpd.estimate.live_bytes import LiveBytes
from hpd.estimate.sizes import head_bytes, optimizer_bytes, step_scratch, tensor_bytes
from hpd.losses.operator import default_chunk_bytes
from hpd.losses.products import chunk_rows

__all__ = ["Fit", "Memory", "StepMemory", "StepPlan", "row_tokens"]

# A tile's logits, log-probabilities of both models, and what an objective makes of them (hpd.losses.chunked,
# on a CPU).
_TILE_SCRATCH_BYTES = 4 * 8 * 2**20
_MOST_ROWS = 4096
"""Larger batches than this are not looked for: 99 % of them would be a mistake in the budget."""


class StepPlan(Protocol):
    """The part of a checked recipe (`hpd.training.plan.Plan`) that the memory of a step follows from."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def args(self) -> Any:
        """A `DistillConfig`."""
        ...

    @property
    def student_config(self) -> PretrainedConfig: ...
    @property
    def teacher_configs(self) -> Mapping[str, PretrainedConfig]: ...
    @property
    def lengths(self) -> Lengths: ...


class Memory(NamedTuple):
    """Bytes of one training step on one process.

    Some are there all the time; the others come and go, and the largest of the three moments decides.
    """

    student: int
    """Weights, in the dtype they are trained in."""
    optimizer: int
    """The optimizer's states."""
    teacher: int
    """Weights."""
    buffers: int
    """Two chunks of logits where they stay between steps (on a CPU)."""
    teacher_forward: int
    """Most that the teacher's forward pass holds, before the student's begins."""
    activations: int
    """Kept by the student's forward pass for its backward pass."""
    head: int
    """The loss operator: gradients of head and hidden states, scratch, and the chunks of logits where it
    frees them."""
    backward: int
    """Most that is alive in the backward pass or the optimizer's step: gradients, activations not yet freed,
    temporaries."""

    @property
    def total(self) -> int:
        """The peak."""
        moments = self.teacher_forward, self.activations + self.head, self.backward
        return self.student + self.optimizer + self.teacher + self.buffers + max(moments)


class Fit(NamedTuple):
    """The largest batch and the largest chunk within a budget."""

    rows: int
    """Largest per-device batch, in rows of the 99th percentile's length, with the recipe's chunk; 0: not even
    one."""
    chunk_bytes: int
    """Largest chunk with the recipe's own batch, at most all its label positions; 0: not even one
    position."""


class StepMemory:
    """Predicts the memory of a recipe's step for any batch and chunk.

    Args:
        planned: a checked recipe.

    Raises:
        ValueError: from `predict` and `fit`: the architecture's forward depends on its data and cannot be run
            without.
    """

    def __init__(self, planned: StepPlan):
        self.recipe = planned.recipe
        self.args = planned.args
        self.tokens = row_tokens(planned)
        self.teacher_tokens = teacher_row_tokens(planned)
        self.label_share = planned.lengths.label_share
        self._runs_teacher = runs_teacher(planned.recipe, planned.args)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._mode = FakeTensorMode()
        self._student = self._fake(
            meta_student(planned.recipe, planned.student_config, self.args.gradient_checkpointing)
        )
        source = planned.recipe.teacher
        parts = [*source.teachers.values()] or [source]
        configs = [*planned.teacher_configs.values()]
        self._teachers = [
            self._fake(meta_model(config, part))
            for part, config in zip(parts, configs, strict=True)
            if part.type == "model"
        ]
        # A student without an adapter is copied to be its own teacher; with one, the adapter is switched off,
        # and an average has an adapter of its own.
        self._is_own_teacher = any(part.type == "self" for part in parts)
        is_copied = self._is_own_teacher and planned.recipe.lora is None
        averaged = any(part.ema is not None for part in parts)
        copied = [p for p in self._student.parameters() if is_copied or (averaged and p.requires_grad)]
        self._teacher_bytes = tensor_bytes(copied)
        self._teacher_bytes += sum(tensor_bytes(model.parameters()) for model in self._teachers)
        self._teacher_bytes += sum(map(head_bytes, parts, configs))
        self._traced: dict[int, _Trace] = {}

    @property
    def batch(self) -> int:
        """Rows of the recipe's per-device batch."""
        return self.args.per_device_train_batch_size

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the recipe's chunks."""
        return self.args.chunk_bytes or default_chunk_bytes(self.device)

    @property
    def row_bytes(self) -> int:
        """Bytes of the logits of one position."""
        return 4 * len(head_weight(self._student))

    def label_positions(self, batch: int) -> int:
        """Label positions of a batch."""
        return max(1, round(batch * self.tokens * self.label_share))

    def predict(self, batch: int | None = None, chunk_bytes: int | None = None) -> Memory:
        """Memory of a step on `batch` rows (None: the recipe's) with chunks of `chunk_bytes` (None: the
        recipe's)."""
        batch = batch or self.batch
        if batch not in self._traced:
            self._traced[batch] = self._trace(batch)
        traced = self._traced[batch]
        trained = [p for p in self._student.parameters() if p.requires_grad]
        gradients = tensor_bytes(trained)
        name = OptimizerNames(self.args.optim).value
        held = gradients if self.args.gradient_accumulation_steps > 1 else 0
        rows = chunk_rows(self.label_positions(batch), self.row_bytes, chunk_bytes or self.chunk_bytes)
        logits = 2 * rows * self.row_bytes
        stay = self.device == "cpu"  # see hpd.losses.chunked
        return Memory(
            student=tensor_bytes(self._student.parameters()),
            optimizer=optimizer_bytes(trained, name),
            teacher=self._teacher_bytes,
            buffers=logits if stay else 0,
            teacher_forward=traced.teacher + held,
            activations=traced.activations + held,
            head=traced.head + self._operator_scratch() + (0 if stay else logits),
            backward=max(traced.backward, gradients + step_scratch(trained, name)),
        )

    def fit(self, budget: int) -> Fit:
        """The largest batch, and the largest chunk, whose step stays within `budget` bytes."""
        rows = _largest(lambda n: self.predict(batch=n).total, budget, _MOST_ROWS)
        chunk = _largest(
            lambda n: self.predict(chunk_bytes=n * self.row_bytes).total,
            budget,
            self.label_positions(self.batch),
        )
        return Fit(rows, chunk * self.row_bytes)

    def _fake(self, model: nn.Module) -> nn.Module:
        return without_data(model, self._mode)

    @property
    def _autocast(self) -> bool:
        return bool(self.args.bf16 or self.args.fp16)

    def _operator_scratch(self) -> int:
        """Tiles, and copies of the heads in the dtype that products run in (hpd.losses.products)."""
        size = _TILE_SCRATCH_BYTES if self.device == "cpu" else 0
        for model in (self._student, *(self._teachers if self._runs_teacher else ())):
            weight = head_weight(model)
            low = weight.dtype in (torch.bfloat16, torch.float16)
            if self.device == "cpu":
                size += 4 * weight.numel() if low else 0
            elif self._autocast and not low:
                size += 2 * weight.numel()
        return size

    def _trace(self, batch: int) -> _Trace:
        try:
            with self._mode:
                return _Trace(self._trace_teacher(batch), *self._trace_student(batch))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"The memory of {self.recipe.student.model} cannot be predicted: a model's forward pass "
                f"depends on its data ({type(error).__name__}: {error}). Measure a step instead."
            ) from None

    def _trace_teacher(self, batch: int) -> int:
        """The most that any teacher's forward pass holds; one that remembers, is elsewhere or is not asked
        has none."""
        if not self._runs_teacher:
            return 0
        peaks = [0]
        for model in self._teachers or ([self._student] if self._is_own_teacher else []):
            with LiveBytes() as live, torch.no_grad():
                backbone(model, batch, self.teacher_tokens, self._autocast)
            peaks.append(live.peak)
        return max(peaks)

    def _trace_student(self, batch: int) -> tuple[int, int, int]:
        """Activations, gradients that the operator leaves, and the most during backward (with gradients held
        before)."""
        positions = self.label_positions(batch)
        self._student.zero_grad()
        if self.args.gradient_accumulation_steps > 1:
            for p in self._student.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
        held = tensor_bytes(p.grad for p in self._student.parameters() if p.grad is not None)
        with LiveBytes() as live:
            hidden = backbone(self._student, batch, self.tokens, self._autocast).flatten(0, 1)
            chosen = hidden.index_select(0, torch.zeros(positions, dtype=torch.long))
            teacher_hidden = torch.empty(
                positions, max(head_weight(m).shape[1] for m in (self._student, *self._teachers))
            )
            activations = live.now
            loss: Any = OperatorGradients.apply(chosen, head_weight(self._student))
            head = live.now - activations
            live.peak = live.now
            loss.backward()
            del teacher_hidden
        return activations, head, live.peak + held


class _Trace(NamedTuple):
    """Bytes beside the weights in a step on a batch, without the operator's chunks."""

    teacher: int
    activations: int
    head: int
    backward: int


def row_tokens(planned: StepPlan) -> int:
    """Tokens of a row that the prediction is made for: the 99th percentile; a packed row is full."""
    args = planned.args
    percentiles = planned.lengths.percentiles
    if args.packing and args.max_length:
        return args.max_length
    return min(percentiles[99], args.max_length or percentiles[100])


def teacher_row_tokens(planned: StepPlan) -> int:
    """The same of the teacher's row; beside a packed row of the student's it has as many rows."""
    tokens, own = row_tokens(planned), planned.lengths.teacher
    if own is None:
        return tokens
    if planned.args.packing and planned.args.max_length:
        return math.ceil(tokens * own.tokens / planned.lengths.tokens)
    return own.percentiles[99]


def _largest(cost: Callable[[int], int], budget: int, most: int) -> int:
    """The largest n in [0, most] with cost(n) <= budget; cost grows with n, nearly in straight lines."""
    known = {1: cost(1), most: cost(most)}
    if known[1] > budget:
        return 0
    low, high = (most, most) if known[most] <= budget else (1, most)
    while high - low > 1:
        share = (budget - known[low]) / max(known[high] - known[low], 1)
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        known[guess] = cost(guess)
        low, high = (guess, high) if known[guess] <= budget else (low, guess)
    return low
