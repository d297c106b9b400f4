"""Memory of a training step, predicted before a weight is loaded.

The student's forward and backward pass, the loss operator's buffers and the teacher's forward pass are run on
tensors without data (torch's FakeTensorMode), and what is alive at each moment is added up. So the prediction
holds for every architecture, attention implementation, adapter, precision and kind of checkpointing that the
libraries have, without a formula for each.

Axes: N label positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.training_args import OptimizerNames

from hpd.config.models import TeacherConfig
from hpd.losses.products import chunk_rows
from hpd.losses.operator import default_chunk_bytes
from hpd.training.plan import Plan

__all__ = ["Fit", "LiveBytes", "Memory", "StepMemory", "parse_bytes", "row_tokens"]


# A tile's logits, log-probabilities of both models, and what an objective makes of them (hpd.losses.chunked,
# on a CPU).
_TILE_SCRATCH_BYTES = 4 * 8 * 2**20


_MOST_ROWS = 4096
"""Larger batches than this are not looked for: 99 % of them would be a mistake in the budget."""


class Memory(NamedTuple):
    """Bytes of one training step on one process.

    Some are there all the time; the others come and go, and the largest of the three moments decides.
    """

    student: int
    """Weights, in the dtype they are trained in."""
    optimizer: int
    """The optimiser's states."""
    teacher: int
    """Weights."""
    buffers: int
    """Two chunks of logits where they stay between steps (on a CPU)."""
    teacher_forward: int
    """Most that the teacher's forward pass holds, before the student's begins."""
    activations: int
    """What the student's forward pass keeps for its backward pass."""
    head: int
    """The loss operator: gradients of head and hidden states, scratch, and the chunks of logits where it
    frees them."""
    backward: int
    """Most that is alive in the backward pass or the optimiser's step: gradients, activations not yet freed,
    temporaries."""

    @property
    def total(self) -> int:
        """The peak."""
        moments = self.teacher_forward, self.activations + self.head, self.backward
        return self.student + self.optimizer + self.teacher + self.buffers + max(moments)


class Fit(NamedTuple):
    """What a budget allows."""

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

    def __init__(self, planned: Plan):
        self.recipe, self.args = planned.recipe, planned.args
        self.tokens = row_tokens(planned)
        self.label_share = planned.lengths.label_share
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._mode = FakeTensorMode()
        self._student = self._without_data(_meta_student(planned))
        source = planned.recipe.teacher
        parts = [*source.teachers.values()] or [source]
        configs = [*planned.teacher_configs.values()]
        self._teachers = [
            self._without_data(_meta_model(config, part))
            for part, config in zip(parts, configs, strict=True)
            if part.type == "model"
        ]
        # A student without an adapter is copied to be its own teacher; with one, the adapter is switched off.
        self._is_own_teacher = any(part.type == "self" for part in parts)
        copied = (
            _size(self._student.parameters()) if self._is_own_teacher and planned.recipe.lora is None else 0
        )
        models = [part for part in parts if part.type == "model"]
        self._teacher_bytes = copied + sum(map(_model_bytes, models, self._teachers))
        self._teacher_bytes += sum(map(_head_bytes, parts, configs))
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
        return 4 * len(_head(self._student))

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
        gradients, name = _size(trained), OptimizerNames(self.args.optim).value
        held = gradients if self.args.gradient_accumulation_steps > 1 else 0
        rows = chunk_rows(self.label_positions(batch), self.row_bytes, chunk_bytes or self.chunk_bytes)
        logits = 2 * rows * self.row_bytes
        stay = self.device == "cpu"  # see hpd.losses.chunked
        return Memory(
            student=_size(self._student.parameters()),
            optimizer=_optimizer_bytes(trained, name),
            teacher=self._teacher_bytes,
            buffers=logits if stay else 0,
            teacher_forward=traced.teacher + held,
            activations=traced.activations + held,
            head=traced.head + self._operator_scratch() + (0 if stay else logits),
            backward=max(traced.backward, gradients + _step_scratch(trained, name)),
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

    def _without_data(self, model: nn.Module) -> nn.Module:
        """Tensors that claim to be on the CPU, whose attention kernels, unlike the meta device's, keep no
        matrix of weights."""
        made: dict[int, nn.Parameter] = {}
        with self._mode:
            for module in model.modules():
                for name, p in module.named_parameters(recurse=False):
                    empty = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = made.setdefault(
                        id(p), nn.Parameter(empty, requires_grad=p.requires_grad)
                    )
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        return model

    def _operator_scratch(self) -> int:
        """Tiles, and copies of the heads in the dtype that products run in (hpd.losses.products)."""
        size = _TILE_SCRATCH_BYTES if self.device == "cpu" else 0
        for model in (self._student, *self._teachers):
            weight, low = _head(model), _head(model).dtype in (torch.bfloat16, torch.float16)
            if self.device == "cpu":
                size += 4 * weight.numel() if low else 0
            elif (self.args.bf16 or self.args.fp16) and not low:
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
        """The most that any teacher's forward pass holds; one that remembers or is elsewhere has none."""
        peaks = [0]
        for model in self._teachers or ([self._student] if self._is_own_teacher else []):
            with LiveBytes() as live, torch.no_grad():
                _backbone(model, batch, self.tokens, self.args)
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
        held = _size(p.grad for p in self._student.parameters() if p.grad is not None)
        with LiveBytes() as live:
            hidden = _backbone(self._student, batch, self.tokens, self.args).flatten(0, 1)
            chosen = hidden.index_select(0, torch.zeros(positions, dtype=torch.long))
            teacher_hidden = torch.empty(
                positions, max(_head(m).shape[1] for m in (self._student, *self._teachers))
            )
            activations = live.now
            loss: Any = _OperatorGradients.apply(chosen, _head(self._student))
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


class _OperatorGradients(torch.autograd.Function):
    """What the operator leaves behind: gradients that wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        needed = ctx.needs_input_grad
        ctx.gradients = tuple(
            torch.empty_like(t) if need else None for t, need in zip((hidden, weight), needed, strict=True)
        )
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        return gradients


class LiveBytes(TorchDispatchMode):
    """A context that adds up the storages which operations make, until they are freed: `now` and `peak`, in
    bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _meta_model(config: Any, source: Any) -> nn.Module:
    dtype = source.dtype if source.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    if source.attn_implementation == "eager":
        # Other kernels may not be installed here; like SDPA's they keep no matrix of tokens by tokens.
        options["attn_implementation"] = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def _meta_student(planned: Plan) -> nn.Module:
    model: Any = _meta_model(planned.student_config, planned.recipe.student).train()
    lora = planned.recipe.lora
    if planned.args.gradient_checkpointing:
        # The generator's state cannot be saved without data, and takes no memory worth counting.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if lora is None:
        return model
    if planned.args.gradient_checkpointing:
        model.enable_input_require_grads()
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **dataclasses.asdict(lora)))


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: Any) -> Tensor:
    module = _base(model).get_output_embeddings()
    return getattr(module, "base_layer", module).weight


def _backbone(model: Any, batch: int, tokens: int, args: Any) -> Tensor:
    """Last hidden states; the mask is one that padding makes, so that no kernel may leave it out."""
    base = _base(model)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    if base.config._attn_implementation == "eager":
        mask = torch.zeros(batch, 1, tokens, tokens, dtype=base.dtype)
    else:
        mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16 or args.fp16)):
        return base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _model_bytes(source: TeacherConfig, model: nn.Module) -> int:
    if source.quantization:
        width = {"4bit": 0.55, "8bit": 1.05}[source.quantization]  # weights and their scales
        return int(sum(p.numel() for p in model.parameters()) * width)
    return _size(model.parameters())


def _head_bytes(source: TeacherConfig, config: Any) -> int:
    """Of a teacher that is not here, only the head is, and with likeliest tokens not even that."""
    if source.type == "server" and source.protocol == "hpd":
        return config.vocab_size * config.hidden_size * {"bfloat16": 2, "float16": 2}.get(source.dtype, 4)
    if source.type == "cached":
        head = Path(str(source.path)) / "head.safetensors"
        return head.stat().st_size if head.is_file() else 0
    return 0


def _optimizer_bytes(trained: list[Any], name: str) -> int:
    """States of the optimisers that Trainer's `optim` names: two a parameter unless known otherwise."""
    if "8bit" in name:
        return 2 * sum(p.numel() for p in trained)
    if "adafactor" in name:  # a row and a column of second moments
        return sum(
            p.element_size() * (p.shape[-1] + p.numel() // p.shape[-1] if p.ndim > 1 else p.numel())
            for p in trained
        )
    return _size(trained) * (0 if "sgd" in name else 1 if "lion" in name or "rmsprop" in name else 2)


def _step_scratch(trained: list[Any], name: str) -> int:
    """Fused kernels work in place; the others make two tensors of a parameter's size at a time."""
    return (
        0
        if "fused" in name or "sgd" in name
        else 2 * max((p.numel() * p.element_size() for p in trained), default=0)
    )


def row_tokens(planned: Plan) -> int:
    """Tokens of a row that the prediction is made for: the 99th percentile; a packed row is full."""
    args, percentiles = planned.args, planned.lengths.percentiles
    if args.packing and args.max_length:
        return args.max_length
    return min(percentiles[99], args.max_length or percentiles[100])


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


_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}{u}": b ** (i + 1) for u, b in (("B", 1000), ("iB", 1024)) for i, p in enumerate("KMGT")},
}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 24GiB, 500 MB or 1.5TiB.

    Raises:
        ValueError: no number, an unknown unit, or nothing at all.
    """
    units = {name.lower(): size for name, size in _UNITS.items()}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise ValueError(
            f"A size of memory is a number above 0 and a unit ({', '.join(filter(None, _UNITS))}), such as "
            f"24GiB; got {text!r}."
        )
    return int(float(match[1]) * units[match[2].lower()])
