"""Checkpoints that a kill cannot spoil: one counts when its list of files is there, which is written last."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from hpd.files import flush, write_json

__all__ = [
    "CheckpointFailed",
    "CheckpointUnreadable",
    "check_processes",
    "check_readable",
    "check_whole",
    "earlier_complete",
    "is_complete",
    "mark_complete",
    "newest_complete",
    "read_mark",
    "reading",
    "remove_incomplete",
    "rotate",
    "step_of",
    "weights_file",
    "writing",
]

_LOGGER = logging.getLogger(__name__)

_MARK = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"
# What resuming reads. Tokenizer and arguments are written for who uses the checkpoint as a model.
_JSON = ("config.json", "adapter_config.json", "model.safetensors.index.json")
_TORCH = ("*.pt", "*.pth")


class CheckpointFailed(RuntimeError):
    """A file of the run could not be written: disk full, read-only, over a limit. Earlier checkpoints are as
    they were."""


class CheckpointUnreadable(ValueError):
    """A file of a checkpoint holds something else than what was written there."""


def mark_complete(folder: Path, notes: Mapping[str, Any]) -> None:
    """Make a checkpoint count: its files reach the disk, then a list of them and their sizes appears all at
    once.

    Args:
        folder: with every file of every process.
        notes: kept in the list, for `read_mark`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MARK)
    for path in [*files, folder]:
        flush(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json(folder / _MARK, {**notes, "bytes": sizes}, indent=1)


def read_mark(folder: Path) -> dict[str, Any] | None:
    """The list that `mark_complete` wrote; None: there is none, it is damaged, or a file is not whole."""
    mark = folder / _MARK
    if not mark.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
        sizes = dict(found["bytes"])
    except (ValueError, KeyError, TypeError):
        return None
    whole = all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )
    return found if whole else None


def is_complete(folder: Path) -> bool:
    """True if training can go on from a checkpoint."""
    return read_mark(folder) is not None


def newest_complete(run: Path, quiet: bool = False) -> Path | None:
    """The checkpoint of the most steps that is whole; a warning names each that is not, unless it is
    `quiet`."""
    for step, folder in reversed(_steps(run)):
        if is_complete(folder):
            return folder
        if not quiet:
            _LOGGER.warning(
                "%s is incomplete (the run was killed while it was written or deleted) and is skipped. It is "
                "replaced when step %d is saved again; delete it if you need the space.",
                folder,
                step,
            )
    return None


def check_processes(checkpoint: Path | None, now: int) -> None:
    """Refuse to go on with another number of processes than before.

    Args:
        checkpoint: the one to go on from; None: there is none.
        now: processes of this launch.

    Raises:
        ValueError: it was written by more or fewer.
    """
    if checkpoint is None:
        return
    # Each process keeps its own random numbers; one that is alone in a file without its number.
    before = len(list(checkpoint.glob("rng_state_*.pth"))) or 1
    if before != now:
        raise ValueError(
            f"{checkpoint} was written by a launch of {before} {'process' if before == 1 else 'processes'}, "
            f"and this one has {now}: a step would see other rows, since its batch is "
            f"per_device_train_batch_size times the processes. Continue with {before}, or start again with "
            "--overwrite or in another output_dir."
        )


def earlier_complete(checkpoint: Path) -> Path | None:
    """The newest complete checkpoint of the same run with fewer steps than this one."""
    step = step_of(checkpoint)
    before = [folder for number, folder in _steps(checkpoint.parent) if step is not None and number < step]
    return next((folder for folder in reversed(before) if is_complete(folder)), None)


def step_of(checkpoint: Path) -> int | None:
    """The step after which a checkpoint was saved; None for a folder of another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def remove_incomplete(folder: Path) -> None:
    """Make room for a checkpoint of the same step, and say what was there."""
    if folder.is_dir():
        _LOGGER.warning("%s, incomplete, is replaced.", folder)
        shutil.rmtree(folder)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`, but neither the newest nor the best. Incomplete
    ones stay."""
    if not limit or limit < 1:
        return
    whole = [folder for _, folder in _steps(run) if is_complete(folder)]
    kept = {*whole[-1:], *(folder for folder in whole if best is not None and folder == Path(best))}
    excess = len(whole) - max(limit, len(kept))
    for folder in [folder for folder in whole if folder not in kept][: max(excess, 0)]:
        # What is half deleted must not count.
        (folder / _MARK).unlink()
        shutil.rmtree(folder)


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn what the libraries raise when a disk is full or read-only into one error.

    Raises:
        CheckpointFailed: says what could not be written, and why.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointFailed(f"{what} could not be written: {reason}.") from error
    except RuntimeError as error:
        # torch.save writes from C++ and has no error class of its own.
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        reason = (
            getattr(error.__context__, "strerror", None) or "the disk took no more (full, or over a limit)"
        )
        raise CheckpointFailed(f"{what} could not be written: {reason}.") from error


def _steps(run: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by step."""
    found = [(step_of(path), path) for path in run.glob("checkpoint-*") if path.is_dir()]
    return sorted((step, path) for step, path in found if step is not None)


def check_readable(folder: Path) -> None:
    """Open every file that resuming reads, before a model is loaded for it; what torch wrote is compared with
    its checksums.

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
    """Name the file of a checkpoint for whatever a library raises while it reads it or puts its content into
    place.

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
            f"resume from the one before, {before.name}"
            if before is not None
            else "begin again with the first step, since there is none before it"
        )
        raise CheckpointUnreadable(
            f"{file.name} of the checkpoint {folder} cannot be read: {_reason(error)}. Delete that folder to "
            f"{way}, or start the run again with --overwrite. Nothing was deleted."
        ) from error


def weights_file(folder: Path) -> Path:
    """The file that a checkpoint's weights are in, or the list of their files."""
    names = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), folder / "model")


def check_whole(model: torch.nn.Module, result: Any) -> bool:
    """Check that every parameter got a value, and every value a parameter.

    Args:
        result: what `load_state_dict(strict=False)` returned. A missing name of a tied parameter is no loss.

    Returns:
        True if a buffer got none, which is worth a warning.

    Raises:
        ValueError: names the first that did not.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in result.missing_keys}
    lacking = [
        name for name in result.missing_keys if name in parameters and id(parameters[name]) not in loaded
    ]
    for what, names in (
        ("lacks", lacking),
        ("has", [name for name in result.unexpected_keys if name not in parameters]),
    ):
        if names:
            raise ValueError(
                f"it {what} {names[0]}" + (f" and {len(names) - 1} more tensors" if names[1:] else "")
            )
    return any(name not in parameters for name in result.missing_keys)


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):
        # torch's own text tells its reader to load it as a program.
        return (
            "it is not what torch.save writes, or holds more than tensors and plain values, which is refused"
        )
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _object(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not a JSON object")
    return found


def _check_state(file: Path) -> None:
    state = TrainerState(**_object(file))
    history, callbacks = state.log_history, state.stateful_callbacks
    if state.global_step != step_of(file.parent):
        raise ValueError(f"it is of step {state.global_step!r}")
    if not isinstance(history, list) or not all(
        isinstance(log, dict) and type(log.get("step")) is int for log in history
    ):
        raise ValueError("log_history is not a list of logs with their steps")
    if not isinstance(callbacks, dict) or not all(
        isinstance(value, (dict, list)) for value in callbacks.values()
    ):
        raise ValueError("stateful_callbacks is not an object of objects")


def _check_torch(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {damaged} is wrong")
    with safe_globals():
        found = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not a dictionary")
