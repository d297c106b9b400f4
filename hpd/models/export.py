"""Whole models from adapters, on disk; folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hpd.config.models import DType, ModelConfig
from hpd.files import flush
from hpd.models.adapters import find_adapter
from hpd.models.load import load_config, load_model, load_tokenizer

__all__ = ["check_new", "new_folder", "write_merged"]


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
    check_new(output)
    saved = getattr(load_config(source, name), "dtype", None)
    kind = getattr(torch, dtype) if dtype != "auto" else saved or torch.float32
    tokenizer = load_tokenizer(source, name)
    model = load_model(replace(source, dtype="float32"), name).to(kind)  # type: ignore[arg-type]
    with new_folder(output) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return kind


def check_new(output: Path) -> None:
    """Raise ValueError where something is in the place of a folder that is to be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: choose another --output.")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes `output` at the end, flushed to the disk, or goes."""
    draft = output.with_name(f".{output.name}.{os.getpid()}.part")
    draft.mkdir(parents=True)
    try:
        yield draft
        readable = draft.stat().st_mode & 0o666  # safetensors leaves its files to their owner alone
        for path in draft.iterdir():
            path.chmod(readable)
            flush(path)
        flush(draft)
        if output.is_dir():
            output.rmdir()
        os.replace(draft, output)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
