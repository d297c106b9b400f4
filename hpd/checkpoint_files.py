"""Can training go on from what a checkpoint's files hold? Sizes are right where it counts as complete; contents may not be."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from hpd.checkpoints import earlier_complete, step_of

__all__ = ["CheckpointUnreadable", "check_readable", "check_whole", "reading", "weights_file"]

_STATE = "trainer_state.json"
# What resuming reads. Tokenizer and arguments are written for who uses the checkpoint as a model.
_JSON = ("config.json", "adapter_config.json", "model.safetensors.index.json")
_TORCH = ("*.pt", "*.pth")


class CheckpointUnreadable(ValueError):
    """A file of a checkpoint holds something else than what was written there."""


def check_readable(folder: Path) -> None:
    """Open every file that resuming reads, before a model is loaded for it; what torch wrote is compared with its checksums.

    Numbers that changed inside a file of weights are not noticed: safetensors has no checksum.

    Raises:
        CheckpointUnreadable: names the first file that is damaged, and says how to go on without it.
    """
    with reading(folder / _STATE):
        _check_state(folder / _STATE)
    for file in (folder / name for name in _JSON):
        if file.is_file():
            with reading(file):
                _object(file)
    for file in sorted(folder.glob("*.safetensors")):
        with reading(file), safe_open(file, framework="pt"):
            pass
    for file in sorted(path for pattern in _TORCH for path in folder.glob(pattern)):
        with reading(file):
            _check_torch(file)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Name the file of a checkpoint for whatever a library raises while it reads it or puts its content into place.

    Raises:
        CheckpointUnreadable: says which file, why, and what to do; no memory left is no fault of the file.
    """
    try:
        yield
    except (CheckpointUnreadable, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # json, safetensors, zipfile, pickle and torch each have errors of their own
        folder = file.parent
        before = earlier_complete(folder)
        way = (
            f"go on from the one before, {before.name}" if before is not None
            else "begin again with the first step, since there is none before it"
        )  # fmt: skip
        raise CheckpointUnreadable(
            f"{file.name} of the checkpoint {folder} cannot be read: {_reason(error)}. Delete that folder to {way}, or start "
            "the run again with --overwrite. Nothing was deleted."
        ) from error


def weights_file(folder: Path) -> Path:
    """The file that a checkpoint's weights are in, or the list of their files."""
    names = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), folder / "model")


def check_whole(model: torch.nn.Module, result: Any) -> None:
    """Did every parameter get a value, and every value a parameter?

    Args:
        result: what `load_state_dict(strict=False)` returned. A missing name of a tied parameter is no loss.

    Raises:
        ValueError: names the first that did not.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in result.missing_keys}
    lacking = [name for name in result.missing_keys if name in parameters and id(parameters[name]) not in loaded]
    for what, names in (("lacks", lacking), ("has", [name for name in result.unexpected_keys if name not in parameters])):
        if names:
            raise ValueError(f"it {what} {names[0]}" + (f" and {len(names) - 1} more tensors" if names[1:] else ""))


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):
        # torch's own text tells its reader to load it as a program.
        return "it is not what torch.save writes, or holds more than tensors and plain values, which is refused"
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _object(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it holds no JSON object but {type(found).__name__}")
    return found


def _check_state(file: Path) -> None:
    state = TrainerState(**_object(file))
    history, callbacks = state.log_history, state.stateful_callbacks
    if state.global_step != step_of(file.parent):
        raise ValueError(f"it is of step {state.global_step!r}")
    if not isinstance(history, list) or not all(isinstance(log, dict) and type(log.get("step")) is int for log in history):
        raise ValueError("log_history is no list of logs with their steps")
    if not isinstance(callbacks, dict) or not all(isinstance(value, (dict, list)) for value in callbacks.values()):
        raise ValueError("stateful_callbacks is no object of objects")


def _check_torch(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {damaged} is wrong")
    with safe_globals():
        found = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds no dictionary but {type(found).__name__}")
