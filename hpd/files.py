"""Files that are whole or not there, JSON Lines that a later process goes on with, digests, and objects that
a file names."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

__all__ = [
    "JsonLines",
    "checksum_bytes",
    "checksum_file",
    "checksum_json",
    "checksum_samples",
    "digest_json",
    "digest_text",
    "digest_tree",
    "flush",
    "import_named",
    "look_beside",
    "whole_characters",
    "write_atomically",
    "write_json",
]

_FOLDERS: list[str] = []
"""Where files lie that name modules of their user's."""

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def write_atomically(path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Make a file appear under its name whole and on the disk, or not at all.

    Content and folder are flushed to the disk, so neither a kill nor a power failure leaves a part. A kill
    may leave a draft, `.NAME.PID.part`; an error does not.

    Args:
        path: the file; its folder must exist.
        content: text (written as UTF-8), bytes, or a function that writes the file at the path that it gets.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        if callable(content):
            content(draft)
        else:
            draft.write_bytes(content.encode() if isinstance(content, str) else content)
        # safetensors leaves its files to their owner alone; the umask says who may read.
        os.chmod(draft, mode)
        flush(draft)
        os.replace(draft, path)
    except BaseException:  # a signal's, too
        draft.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file with `write_atomically`."""
    write_atomically(path, _encoded(content, indent=indent) + b"\n")


def flush(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class JsonLines:
    """A file of JSON values, one a line, that a later process goes on with.

    A line counts when all of it is there. One that a kill cut short is left out by `read` and closed by the
    next `append`, so that it swallows nothing. Several processes may append to one file.

    Args:
        path: the file; its folder must exist before anything is written.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Any]:
        """Values of the whole lines; none where there is no file."""
        values = []
        # Split at line feeds only: JSON leaves other line separators inside texts as they are.
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                values += [json.loads(line)] if line else []
            except (ValueError, RecursionError):
                continue
        return values

    def append(self, value: Any, *, durable: bool = False) -> None:
        """Add a line. It survives a kill of the process; a power failure too, where it is `durable`."""
        with self.path.open("a+b") as file:
            file.write((b"" if _ends_line(file) else b"\n") + _line(value))
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def write(self, values: Iterable[Any]) -> None:
        """Replace the file with these lines, atomically."""
        write_atomically(self.path, b"".join(map(_line, values)))


def whole_characters(value: Any) -> Any:
    """A JSON value with a replacement character for each half of a surrogate pair, which no file and no
    tokenizer takes."""
    if isinstance(value, str):
        return value if value.isascii() else _HALF_CHARACTER.sub("\ufffd", value)
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(part) for key, part in value.items()}
    return [whole_characters(part) for part in value] if isinstance(value, list) else value


def _line(value: Any) -> bytes:
    return _encoded(value) + b"\n"


def _encoded(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; half of a surrogate pair, which UTF-8 lacks, is escaped with all that is no ASCII."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode()


def _ends_line(file: IO[bytes]) -> bool:
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def digest_text(text: str) -> str:
    """SHA-256 of a text, as hex digits: the identity of what it describes."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def digest_json(content: Any, *, ensure_ascii: bool = True) -> str:
    """SHA-256 of a JSON value, the same for any order of keys.

    Args:
        ensure_ascii: as for `json.dumps`; both forms are in files of earlier versions.
    """
    return digest_text(json.dumps(content, sort_keys=True, ensure_ascii=ensure_ascii))


def digest_tree(path: Path) -> str:
    """SHA-256 of names and bytes of a file, or of all files of a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    state = hashlib.sha256()
    for file in files:
        state.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                state.update(block)
    return state.hexdigest()


def checksum_json(content: Any) -> str:
    """XXH3 of a JSON value, the same for any order of keys; what JSON lacks counts as its `str`."""
    import xxhash  # only here and below, so that files need nothing beside Python

    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, default=str).encode())


def checksum_file(path: Path, size: int = -1) -> str:
    """XXH3 of a file, or of its first `size` bytes; several GB/s."""
    import xxhash

    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size >= 0:
            state.update(file.read(size))
        else:
            while chunk := file.read(2**24):
                state.update(chunk)
    return state.hexdigest()


def checksum_bytes(content: bytes | bytearray) -> str:
    """`checksum_file` of what is in memory."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(content)


def checksum_samples(path: Path) -> str:
    """XXH3 of a file's size, its first MiB, and 1,024 blocks of 4 KiB evenly spread over the rest: what is
    rewritten as a whole has another, at the cost of 5 MiB."""
    import xxhash

    size = path.stat().st_size
    state = xxhash.xxh3_128(str(size).encode())
    head, block = 2**20, 2**12
    with path.open("rb") as file:
        state.update(file.read(head))
        for start in range(head, size, max(block, (size - head) // 1024)):
            file.seek(start)
            state.update(file.read(block))
        file.seek(max(0, size - block))
        state.update(file.read(block))
    return state.hexdigest()


def look_beside(path: Path) -> None:
    """Let `import_named` find modules in this file's folder."""
    folder = str(path.resolve().parent)
    if folder not in _FOLDERS:
        _FOLDERS.append(folder)


def import_named(name: str) -> Any:
    """What "package.module:name" names, in an installed module or one of the working folder or of a folder
    given to `look_beside`.

    Raises:
        ValueError: not of that form, no such module or name, or the module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} cannot be imported: write package.module:name.")
    # Only for this import, and last: a folder of runs called wandb must not pass for the package.
    added = [folder for folder in dict.fromkeys((os.getcwd(), *_FOLDERS)) if folder not in sys.path]
    sys.path += added
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module runs its own code
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{name!r} cannot be imported ({said}): write package.module:name of an installed module, or of "
            "a file in the working folder or next to the recipe."
        ) from error
    finally:
        for folder in added:
            sys.path.remove(folder)
