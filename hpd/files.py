"""Files that are whole or not there: atomic writes, digests, and JSON lines that a later process goes on
with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["digest_file", "replace_text", "write_atomically"]


def replace_text(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = target.with_name(f".{target.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, target)


def _flush(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Part:
    """Chunks done so far, one JSON line each behind a line that says of what; a line that a kill cut short is
    dropped."""

    def __init__(self, path: Path, identity: str, overwrite: bool):
        self.path = path
        self._lines: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._resume(identity, overwrite)
        if not self._lines:
            self._lines = [identity]
            path.write_text(identity + "\n", encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def _resume(self, identity: str, overwrite: bool) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8").split("\n")[:-1]
        if lines and lines[0] != identity:
            if overwrite:
                return
            raise ValueError(
                f"{self.path} holds completions of other settings, another model or other rows. Go on with "
                "those, delete it, or start anew with --overwrite."
            )
        self._lines = lines
        with self.path.open("r+b") as file:
            file.truncate(len(whole))

    @property
    def done(self) -> int:
        return len(self._lines) - 1

    def append(self, completions: list[list[Any]]) -> None:
        line = json.dumps(completions, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines.append(line)

    def completions(self) -> Iterator[list[Any]]:
        for line in self._lines[1:]:
            yield from json.loads(line)

    def close(self) -> None:
        self._file.close()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file that appears under its name whole, on the disk, or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(draft)
    # safetensors leaves its files to their owner alone; a cache serves a group.
    os.chmod(draft, 0o644)
    for place in (draft, path.parent):
        if place == path.parent:
            os.replace(draft, path)
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest_file(path: Path, size: int = -1) -> str:
    """Digest of a file, or of its first `size` bytes; several GB/s."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size >= 0:
            state.update(file.read(size))
        else:
            while chunk := file.read(2**24):
                state.update(chunk)
    return state.hexdigest()
