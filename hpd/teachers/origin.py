"""Caches at an address (s3://, gs://, hf://, memory://, ...): small files here, shards as they are read.

What a cache says about itself, its index, head and teacher/ are copied into a folder once, checked by their
digests. Shards stay where they are: the bytes of the blocks in use are fetched, many ranges at once, and
those read last are kept in memory, up to a window. Every block is checked as on a disk.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from hpd.files import checksum_file, digest_text, write_atomically

__all__ = ["ABOUT", "WINDOW_BYTES", "Origin", "folder_of", "is_address"]

ABOUT = "cache.json"

WINDOW_BYTES = 2**30
"""Bytes of blocks that a process keeps of a cache at an address."""

T = TypeVar("T")

_REQUESTS = 32
_COPIES = Path("~/.cache/hpd/caches")


def is_address(path: str | Path) -> bool:
    """True if a path names a file system besides the local one."""
    return "://" in str(path)


class Origin:
    """A cache's files at an address.

    Args:
        address: of the folder.
        window_bytes: how many bytes of ranges are kept, those read last.

    Raises:
        ValueError: no such protocol, or a package that it needs is missing.
    """

    def __init__(self, address: str, window_bytes: int = WINDOW_BYTES):
        self.address = address.rstrip("/")
        self._window_bytes = window_bytes
        self._reset()
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.address)
        except (ValueError, ImportError) as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"The address {address} cannot be opened: {said}.") from None

    def _reset(self) -> None:
        self._window: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        """By file, first byte and end; those read last stand last."""
        self._held = 0
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_window", "_held", "_lock", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            OSError: it cannot be read; FileNotFoundError: there is none.
        """
        with _as_os_errors(self.address):
            return self._system.cat_file(f"{self._root}/{name}")

    def map(self, function: Callable[[int], T], values: Iterable[int]) -> Iterator[T]:
        """`function` of the values, at once: each waits for the network."""
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(_REQUESTS, thread_name_prefix="hpd-origin")
        return self._pool.map(function, values)

    def fill(self, name: str, reads: Sequence[tuple[memoryview, int]]) -> None:
        """Read a file into each of the views, from the byte that stands beside it.

        Raises:
            OSError: as `read`, or the file ends before.
        """
        keys = [(name, at, at + len(view)) for view, at in reads]
        with self._lock:
            found = {key: self._window[key] for key in keys if key in self._window}
            for key in found:
                self._window.move_to_end(key)
        missing = sorted(set(keys) - found.keys())
        if missing:
            fetched = self._fetch(name, missing)
            found.update(fetched)
            with self._lock:
                self._window.update(fetched)
                self._held = sum(map(len, self._window.values()))
                while self._held > self._window_bytes:
                    self._held -= len(self._window.popitem(last=False)[1])
        for (view, _), key in zip(reads, keys, strict=True):
            view[:] = found[key]

    def _fetch(self, name: str, keys: list[tuple[str, int, int]]) -> dict[tuple[str, int, int], bytes]:
        """Ranges of a file; those that touch are one request."""
        runs: list[list[tuple[str, int, int]]] = []
        for key in keys:
            if runs and runs[-1][-1][2] == key[1]:
                runs[-1].append(key)
            else:
                runs.append([key])
        starts, ends = [run[0][1] for run in runs], [run[-1][2] for run in runs]
        with _as_os_errors(self.address):
            parts = self._system.cat_ranges([f"{self._root}/{name}"] * len(runs), starts, ends)
        found = {}
        for run, start, end, part in zip(runs, starts, ends, parts, strict=True):
            if isinstance(part, Exception):
                said = " ".join(f"{type(part).__name__}: {part}".split())[:200]
                raise OSError(f"{self.address}/{name} cannot be read: {said}")
            if len(part) != end - start:
                raise OSError(
                    f"{self.address}/{name} gave {len(part):,} of the {end - start:,} bytes from {start:,}: "
                    "it was cut, or what serves it does not answer for ranges of a file"
                )
            found.update({key: bytes(part[key[1] - start : key[2] - start]) for key in run})
        return found

    def copy(self) -> Path:
        """The folder on this machine with a copy of all small files that cache.json lists.

        Raises:
            ValueError: there is no cache.
            OSError: a file cannot be read.
        """
        try:
            text = self.read(ABOUT)
        except FileNotFoundError:
            raise ValueError(f"There is no cache at {self.address}: no {ABOUT} is there.") from None
        try:
            listed: dict[str, Any] = json.loads(text)["files"]
        except (ValueError, KeyError, TypeError):
            listed = {}  # damaged: whoever reads it says so
        folder = _COPIES.expanduser() / digest_text(self.address + text.decode(errors="replace"))[:24]
        for name, expected in listed.items():
            file = folder / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"{self.address}/{ABOUT} lists {name!r}, which is not a file of a cache.")
            if not file.is_file() or checksum_file(file) != expected.get("digest"):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, self.read(name))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ABOUT, text)
        return folder


def folder_of(path: str | Path) -> Path:
    """The folder on this machine with a cache's small files: the cache itself, or a copy of those at an
    address.

    Raises:
        ValueError, OSError: as `Origin` and `Origin.copy`.
    """
    return Origin(str(path)).copy() if is_address(path) else Path(path)


class _as_os_errors:
    """Errors of a remote file system, of whatever library, as OSError."""

    def __init__(self, address: str):
        self._address = address

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError):
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise OSError(f"{self._address} cannot be read: {said}") from error
