"""Whether a configuration describes a model that can be built here, found out without its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import set_zero3_state
from transformers.quantizers.auto import AutoHfQuantizer

from hpd.config.models import ModelConfig, TeacherConfig

__all__ = ["check_buildable", "without_weights"]

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def check_buildable(config: Any, source: ModelConfig | TeacherConfig, role: str, *, is_built: bool) -> None:
    """Refuse what `load_model` would fail at, or build as a model without content.

    Args:
        config: the model's.
        source: says which attention it is to have.
        role: names it in messages.
        is_built: False for a model that is described and never loaded.

    Raises:
        ValueError: a size below one, an attention or activation that does not exist, a quantization that is
            unknown or whose package is missing.
    """
    text = config.get_text_config()
    for name in _SIZES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"The {role} {source.model!r} has {name} {value}: >= 1 is needed.")
    if not is_built:
        return
    try:
        if (quantized := getattr(config, "quantization_config", None)) is not None:
            AutoHfQuantizer.from_config(quantized, pre_quantized=True).validate_environment(
                device_map=None, weights_only=True
            )
        _build(config, source)
    except Exception as error:  # each architecture and each quantizer raises its own
        said = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise ValueError(
            f"The {role} {source.model!r} cannot be loaded: {said}. Correct its config.json"
            + (f" or {role}.attn_implementation." if source.attn_implementation is not None else ".")
        ) from None


def _build(config: Any, source: ModelConfig | TeacherConfig) -> None:
    """Make the model without memory for its weights."""
    chosen = source.attn_implementation or getattr(config, "_attn_implementation", None)
    if isinstance(chosen, str) and "/" in chosen:
        return  # a kernel of the Hub, which would be fetched and run
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    without_weights(copy.deepcopy(config), **options)


def without_weights(config: Any, **options: Any) -> PreTrainedModel:
    """The model of a configuration on the meta device, which draws no random number.

    Args:
        **options: of `from_config`.
    """
    # Under ZeRO-3 transformers would share the weights among the processes, and there are none to share:
    # it is told that somebody else does.
    with torch.device("meta"), torch.random.fork_rng(devices=[]), set_zero3_state():
        return AutoModelForCausalLM.from_config(config, **options)
