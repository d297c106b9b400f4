"""The dtype that weights are loaded in, found before they are."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from hpd.config.models import ModelConfig
from hpd.models.load import load_config

__all__ = ["dtype_name", "loaded_dtype"]

# As safetensors names them.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def loaded_dtype(source: ModelConfig, role: str) -> torch.dtype:
    """The dtype that `load_model` gives the weights: the one that is asked for; with "auto" the
    configuration's, else that of the first weight with a fraction.

    Raises:
        ValueError: as `load_config`; "auto" where neither says.
    """
    if source.dtype != "auto":
        return getattr(torch, source.dtype)
    config = load_config(source, role)
    if config.dtype is not None:
        return config.dtype
    for file in sorted(Path(str(source.model)).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if (kind := tensors.get_slice(name).get_dtype()) in _FLOATS:
                    return _FLOATS[kind]
    raise ValueError(
        f"The {role} {source.model!r} does not say in which dtype its weights are (dtype in config.json): "
        "give --dtype float32, bfloat16 or float16."
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As recipes and configurations write it, such as "float32"."""
    return str(dtype).removeprefix("torch.")
