"""Models whose linear layers bitsandbytes holds in 4 or 8 bits: loading them, and what training needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from hpd.config.models import ModelConfig, TeacherConfig

__all__ = [
    "check_quantizable",
    "check_trainable",
    "compute_dtype",
    "is_quantized",
    "keep_layout",
    "loading_options",
    "put_back",
    "quantized_layers",
    "stored_bits",
    "trained_data",
]

TrainedData: TypeAlias = dict[nn.Parameter, Tensor]
"""The values of parameters that are trained, by parameter."""


def check_quantizable(source: ModelConfig | TeacherConfig, config: Any, role: str) -> None:
    """Refuse a quantization that cannot be, before weights are read.

    Args:
        config: the model's.

    Raises:
        ValueError: bitsandbytes is not installed, or the weights are quantized already.
    """
    if source.quantization is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization: {source.quantization} needs bitsandbytes: "
            "pip install 'hybrid-policy-distillation[quantization]'."
        )
    if (stored := _stored(config)) is not None:
        raise ValueError(
            f"The {role} {source.model!r} is stored quantized ({stored.get('quant_method')}), and "
            f"{role}.quantization: {source.quantization} would have no effect: remove it, or name the whole "
            "model."
        )


def stored_bits(source: ModelConfig | TeacherConfig, config: Any) -> str | None:
    """4bit or 8bit where bitsandbytes holds a model's linear layers: by the recipe, or as they were saved."""
    if source.quantization is not None:
        return source.quantization
    stored = _stored(config) or {}
    return "4bit" if stored.get("load_in_4bit") else "8bit" if stored.get("load_in_8bit") else None


def _stored(config: Any) -> Mapping[str, Any] | None:
    """The quantization that a configuration says its weights have."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else found.to_dict()


def is_quantized(model: Any) -> bool:
    """True for a model with quantized weights, by whatever method, and for its PEFT wrapper."""
    return getattr(model, "quantization_method", None) is not None


def compute_dtype(device: torch.device) -> torch.dtype:
    """What 4-bit layers compute in: bfloat16, and on a CPU, which is slow at that, float32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def loading_options(bits: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the quantization, and this process's own device.

    transformers would take the current accelerator, also of a run that asks for the CPU.
    """
    device = cast(torch.device, PartialState().device)
    kind = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype(device), bnb_4bit_quant_type="nf4"
        )
    )
    return {"quantization_config": kind, "device_map": {"": device}}


def keep_layout(model: nn.Module) -> str | None:
    """Keep bitsandbytes from repacking 4-bit layers, as it does in evaluation mode on CPUs with AVX512-BF16.

    Repacked layers compute in bfloat16 whatever they were asked for, fail at widths that are no multiple of
    64, and pass no gradient on: an adapter would learn from what goes around them.

    Returns:
        The name of a layer that was repacked before.
    """
    repacked = None
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                repacked = name
    return repacked


def check_trainable(model: Any) -> None:
    """Refuse a quantized student that no gradient passes through; no other path or model is looked at.

    Raises:
        ValueError: it was repacked for inference on a CPU, as `keep_layout` says.
    """
    if isinstance(model, nn.Module) and (name := keep_layout(model)) is not None:
        raise ValueError(
            f"The student has run on the CPU before, and bitsandbytes has repacked its 4-bit layers ({name}) "
            "into a form that passes no gradient on: load it again, and give it to the trainer before it is "
            "run."
        )


def quantized_layers(model: Any) -> dict[str, nn.Module]:
    """The layers of a whole model that bitsandbytes would quantize, by name: not the head."""
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def trained_data(model: Any) -> TrainedData:
    """What is trained of a quantized model, to be handed to `put_back`; nothing of any other."""
    if isinstance(model, str) or not is_quantized(model):
        return {}
    return {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}


def put_back(model: Any, before: TrainedData) -> None:
    """Undo the rounding to bfloat16 that TRL's trainers do to adapters on quantized weights.

    In bfloat16 an update below about 1/256 of a weight is lost; peft's own dtype is float32.

    Args:
        model: the trainer's, in place.
        before: what `trained_data` found; parameters that are not in it were made since, and become float32.
    """
    if is_quantized(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = before.get(parameter, parameter.data.float())
