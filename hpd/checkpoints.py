"""Checkpoints that a kill cannot spoil: one counts when its list of files is there, which is written last."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = [
    "CheckpointFailed", "earlier_complete", "is_complete", "mark_complete", "newest_complete", "read_mark", "remove_incomplete",
    "replace_text", "rotate", "step_of", "writing",
]  # fmt: skip

_LOGGER = logging.getLogger(__name__)
_MARK = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointFailed(RuntimeError):
    """A file of the run could not be written: disk full, read-only, over a limit. Earlier checkpoints are as they were."""


def mark_complete(folder: Path, notes: Mapping[str, Any]) -> None:
    """Make a checkpoint count: its files reach the disk, then a list of them and their sizes appears all at once.

    Args:
        folder: with every file of every process.
        notes: kept in the list, for `read_mark`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MARK)
    for path in [*files, folder]:
        _flush(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    replace_text(folder / _MARK, json.dumps({**notes, "bytes": sizes}, indent=1) + "\n")


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What `mark_complete` wrote; None where it did not get so far, its list is damaged, or a file is gone or cut short."""
    mark = folder / _MARK
    if not mark.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
        sizes = dict(found["bytes"])
    except (ValueError, KeyError, TypeError):
        return None
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
    return found if whole else None


def is_complete(folder: Path) -> bool:
    """Whether training can go on from a checkpoint."""
    return read_mark(folder) is not None


def newest_complete(run: Path, quiet: bool = False) -> Path | None:
    """The checkpoint of the most steps that is whole; a warning names each that is not, unless it is `quiet`."""
    for step, folder in reversed(_steps(run)):
        if is_complete(folder):
            return folder
        if not quiet:
            _LOGGER.warning(
                "%s is incomplete (the run was killed while it was written or deleted) and is skipped. It is replaced when "
                "step %d is saved again; delete it if you need the space.", folder, step,
            )  # fmt: skip
    return None


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
    """Delete the oldest complete checkpoints beyond `limit`, but neither the newest nor the best. Incomplete ones stay."""
    if not limit or limit < 1:
        return
    whole = [folder for _, folder in _steps(run) if is_complete(folder)]
    kept = {whole[-1], *(folder for folder in whole if best is not None and folder == Path(best))} if whole else set()
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
        reason = getattr(error.__context__, "strerror", None) or "the disk took no more (full, or over a limit)"
        raise CheckpointFailed(f"{what} could not be written: {reason}.") from error


def replace_text(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = target.with_name(f".{target.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, target)


def _steps(run: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by step."""
    found = [(step_of(path), path) for path in run.glob("checkpoint-*") if path.is_dir()]
    return sorted((step, path) for step, path in found if step is not None)


def _flush(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
