"""Whole models from adapters, on disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from hpd.config.models import DType, ModelConfig
from hpd.files import flush
from hpd.models.adapters import find_adapter
from hpd.models.load import load_config, load_model, load_tokenizer

__all__ = ["write_merged"]


def write_merged(source: ModelConfig, output: Path, dtype: DType = "auto") -> torch.dtype:
    """Write an adapter merged into its base, with its tokenizer, for `from_pretrained`.

    The sum is taken in float32 and rounded once, to what is written. The folder appears whole or not at all.

    Args:
        source: the adapter; its dtype is not read.
        output: a new folder, or an empty one.
        dtype: of the weights; auto: as the base was saved.

    Returns:
        The dtype that was written.

    Raises:
        ValueError: no adapter, or an output folder that holds something; see also `load_model`.
    """
    name = "adapter"
    if find_adapter(source, name) is None:
        load_config(source, "model")  # not even a model is another mistake
        raise ValueError(
            f"{source.model!r} is a whole model: there is nothing to merge, use it as it is. An adapter is a "
            "folder with adapter_config.json and no config.json, as a run with lora leaves it."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: choose another --output.")
    saved = getattr(load_config(source, name), "dtype", None)
    kind = getattr(torch, dtype) if dtype != "auto" else saved or torch.float32
    tokenizer = load_tokenizer(source, name)
    model = load_model(replace(source, dtype="float32"), name).to(kind)  # type: ignore[arg-type]
    draft = output.with_name(f".{output.name}.{os.getpid()}.part")
    draft.mkdir(parents=True)
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for path in [*draft.iterdir(), draft]:
            flush(path)
        if output.is_dir():
            output.rmdir()
        os.replace(draft, output)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return kind
