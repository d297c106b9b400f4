"""Models without data: a student and teachers of the right shapes, and their forward pass on fake tensors.

Axes of a linear layer: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from hpd.config.models import ModelConfig, TeacherConfig
from hpd.config.schema import Recipe
from hpd.models.buildable import without_weights
from hpd.models.quantized import compute_dtype, quantized_layers, stored_bits

__all__ = ["OperatorGradients", "backbone", "head_weight", "meta_model", "meta_student", "without_data"]


def meta_model(config: PretrainedConfig, source: ModelConfig | TeacherConfig) -> nn.Module:
    """A model of a configuration, in the dtype that it would be loaded in."""
    dtype = source.dtype if source.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    if source.attn_implementation == "eager":
        # Other kernels may not be installed here; like SDPA's they keep no matrix of tokens by tokens.
        options["attn_implementation"] = "eager"
    model = without_weights(config, **options)
    if (bits := stored_bits(source, config)) is not None:
        for name, layer in quantized_layers(model).items():
            model.set_submodule(name, _Quantized(layer, bits))
    return model


def meta_student(recipe: Recipe, config: PretrainedConfig, checkpointing: bool) -> nn.Module:
    """The student that a recipe trains, with its adapter, if any."""
    model: Any = meta_model(config, recipe.student).train()
    lora = recipe.lora
    if checkpointing:
        # The generator's state cannot be saved without data, and takes no memory worth counting.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if lora is None:
        return model
    if checkpointing:
        model.enable_input_require_grads()
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **dataclasses.asdict(lora)))


def head_weight(model: nn.Module) -> Tensor:
    """The weights of a model's head, without an adapter's."""
    module = _base(model).get_output_embeddings()
    return getattr(module, "base_layer", module).weight


def backbone(model: nn.Module, batch: int, tokens: int, autocast: bool) -> Tensor:
    """The last hidden states of a batch, under a mask as padding makes it: no kernel may leave it out."""
    base = _base(model)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    if base.config._attn_implementation == "eager":
        mask = torch.zeros(batch, 1, tokens, tokens, dtype=base.dtype)
    else:
        mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Put fake tensors on the CPU in place of a model's: its attention kernels, unlike the meta device's,
    keep no matrix of weights."""
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                empty = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = made.setdefault(
                    id(p), nn.Parameter(empty, requires_grad=p.requires_grad)
                )
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


class _Quantized(nn.Linear):
    """What bitsandbytes makes of a linear layer: packed weights, scales, and whole weights while it runs."""

    def __init__(self, layer: Any, bits: str):
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        super().__init__(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        count = weight.numel()
        # 4 bits: one scale for 64 numbers; 8 bits: one for each output.
        packed, scales = (count, len(weight)) if bits == "8bit" else (-(-count // 2), -(-count // 64))
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, device="meta"), requires_grad=False)
        self.bias = layer.bias
        self._keeps_inputs = bits == "8bit"

    def forward(self, input: Tensor) -> Tensor:
        # Under autocast its product runs in its own dtype, too.
        with torch.autocast("cpu", enabled=False):
            shape = self.out_features, self.in_features
            out: Any = _WholeWeights.apply(input, shape, self._keeps_inputs)
            return out if self.bias is None else out + self.bias.to(out.dtype)


class _WholeWeights(torch.autograd.Function):
    """A product with weights that are there as long as it takes, in the forward pass and again in the
    backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: tuple[int, int], keeps_inputs: bool) -> Tensor:
        dtype = compute_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        ctx.shape, ctx.dtype, ctx.given = shape, dtype, input.dtype
        ctx.kept = input if keeps_inputs else None
        return nn.functional.linear(input.to(dtype), input.new_empty(shape, dtype=dtype)).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        weight = grad_output.new_empty(ctx.shape, dtype=ctx.dtype)
        return (grad_output.to(ctx.dtype) @ weight).to(ctx.given), None, None


class OperatorGradients(torch.autograd.Function):
    """The gradients that the loss operator leaves to wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        needed = ctx.needs_input_grad
        ctx.gradients = tuple(
            torch.empty_like(t) if need else None for t, need in zip((hidden, weight), needed, strict=True)
        )
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        gradients = ctx.gradients
        ctx.gradients = None
        return gradients


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
