"""A teacher's answers on disk: the files, their checks, the lookup of positions.

    cache.json              what the cache is, and size and digest of every other file; written last
    index.safetensors       sorted keys of the label positions, the place of each, a digest per 64 positions
    shard-00000.safetensors the answers, position after position
    shard-00000.json        size, digests and blocks of that shard; written after it
    head.safetensors        the teacher's output head (kind hidden)
    teacher/                the teacher's configuration and tokenizer
    plan.json               what is being written; a later `hpd cache` goes on only if it plans the same

Everything that is read is checked first: cache.json by its own digest, the small files whole, shards by the
blocks in use.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpd.files import checksum_bytes, checksum_file, checksum_json, write_atomically
from hpd.losses import Head
from hpd.teachers.origin import ABOUT, Origin, folder_of, is_address

__all__ = ["BLOCK", "FORMAT", "Cache", "CorruptCacheError", "describe_shard", "read_about"]

FORMAT = 1
"""Version of the files; another one is refused."""

BLOCK = 64
"""Positions under one digest: whoever reads one position checks 64, who reads a row little more than it."""

PLAN = "plan.json"
INDEX = "index.safetensors"
HEAD = "head.safetensors"
TEACHER = "teacher"

_REPAIR = (
    "Run hpd cache with the same recipe again: it verifies every file, keeps what is whole and writes the "
    "rest again."
)

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types of what `stored_tensors` gives, as safetensors names them."""

Places: TypeAlias = npt.NDArray[np.int64]


class CorruptCacheError(ValueError):
    """A file of the cache is missing, cut or changed."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object that carries the digest of itself."""
    text = json.dumps({**content, "checksum": checksum_json(content)}, indent=1)
    write_atomically(path, text)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        CorruptCacheError: it is not what was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("checksum")
    except (ValueError, KeyError, AttributeError):
        raise CorruptCacheError(f"{path} is damaged. {_REPAIR}") from None
    if digest != checksum_json(content):
        raise CorruptCacheError(f"{path} is damaged: its content does not have its digest. {_REPAIR}")
    return content


def _block_digests(tensors: Mapping[str, Tensor], blocks: Places) -> npt.NDArray[np.uint64]:
    """One 64-bit digest per block, over the bytes of all tensors at its positions."""
    views = [_bytes_of(tensors[name]) for name in sorted(tensors)]
    found = np.empty(len(blocks), dtype=np.uint64)
    for i, block in enumerate(blocks.tolist()):
        state = xxhash.xxh3_64()
        for view in views:
            data: Any = view[block * BLOCK : (block + 1) * BLOCK].numpy()
            state.update(data)
        found[i] = state.intdigest()
    return found


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of each position."""
    return (tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]).view(torch.uint8)


def _fill(view: memoryview, file: IO[bytes], at: int) -> None:
    """Read into all of `view`.

    Raises:
        CorruptCacheError: the file ends before.
    """
    while len(view):
        count = os.preadv(file.fileno(), [view], at)
        if not count:
            raise CorruptCacheError(f"{file.name} ends at byte {at:,}: it was cut. {_REPAIR}")
        view, at = view[count:], at + count


def save_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard, then its description: a shard with a description is whole."""
    path = folder / f"shard-{number:05d}.safetensors"
    write_atomically(path, lambda draft: save_file(tensors, draft))
    num_positions = len(next(iter(tensors.values())))
    blocks = _block_digests(tensors, np.arange(-(-num_positions // BLOCK)))
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    about = {
        "file": path.name,
        "positions": num_positions,
        "bytes": path.stat().st_size,
        "digest": checksum_file(path),
        "header_bytes": header_bytes,
        "header_digest": checksum_file(path, header_bytes),
        "blocks": base64.b64encode(blocks.tobytes()).decode(),
    }
    write_json(path.with_suffix(".json"), about)


def describe_shard(folder: Path, number: int) -> dict[str, Any] | None:
    """The description of a whole shard; None where it is unfinished, missing or damaged."""
    path = folder / f"shard-{number:05d}.safetensors"
    try:
        about = read_json(path.with_suffix(".json"))
        whole = path.stat().st_size == about["bytes"] and checksum_file(path) == about["digest"]
    except (OSError, CorruptCacheError):
        return None
    return about if whole else None


def save_index(folder: Path, keys: Places, shards: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Merge finished shards into the index, then write cache.json, which makes the cache complete.

    Args:
        keys: of all positions, in the order of the shards.
        shards: their descriptions.
        about: what else cache.json says.
    """
    order = np.argsort(keys, kind="stable")
    blocks = np.frombuffer(b"".join(base64.b64decode(shard["blocks"]) for shard in shards), dtype=np.int64)
    index = {
        "keys": torch.from_numpy(keys[order]),
        "places": torch.from_numpy(order),
        "blocks": torch.from_numpy(blocks.copy()),
    }
    write_atomically(folder / INDEX, lambda draft: save_file(index, draft))
    names = [INDEX, *([HEAD] if (folder / HEAD).is_file() else [])]
    names += sorted(str(path.relative_to(folder)) for path in (folder / TEACHER).rglob("*") if path.is_file())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "digest": checksum_file(folder / name)}
        for name in names
    }
    listed = [{key: value for key, value in shard.items() if key != "blocks"} for shard in shards]
    write_json(folder / ABOUT, {**about, "files": files, "shards": listed})


def read_about(path: str | Path) -> dict[str, Any]:
    """Read the description of a cache; sizes of all files, and digests of those under teacher/, are checked.

    Raises:
        ValueError: there is no cache, an unfinished one, or one of another format.
        CorruptCacheError: a file is missing, cut or damaged.
    """
    folder = folder_of(path)
    if not (folder / ABOUT).is_file():
        if (folder / PLAN).is_file():
            done = len(list(folder.glob("shard-*.json")))
            total = read_json(folder / PLAN)["shards"]
            raise ValueError(
                f"The cache {folder} is unfinished ({done} of {total} shards): run hpd cache with its recipe "
                "again, it resumes where it stopped."
            )
        raise ValueError(
            f"There is no cache at {folder}: write one with hpd cache RECIPE cache.path={folder}."
        )
    about = read_json(folder / ABOUT)
    if about["format"] != FORMAT:
        raise ValueError(
            f"The cache {folder} has format {about['format']}, this version of hpd reads {FORMAT}: write it "
            "again."
        )
    shards = {} if is_address(path) else {shard["file"]: shard for shard in about["shards"]}
    for name, expected in {**about["files"], **shards}.items():
        file = folder / name
        if not file.is_file():
            raise CorruptCacheError(f"The cache {folder} misses {name}. {_REPAIR}")
        if file.stat().st_size != expected["bytes"]:
            raise CorruptCacheError(
                f"{file} has {file.stat().st_size:,} bytes, {expected['bytes']:,} were written: it is cut or "
                f"changed. {_REPAIR}"
            )
        if name.startswith(TEACHER):
            _check_digest(file, expected["digest"])
    return about


def _check_digest(file: Path, digest: str) -> None:
    if checksum_file(file) != digest:
        raise CorruptCacheError(f"{file} is damaged: it is not what was written. {_REPAIR}")


class _Shard(NamedTuple):
    """Where a shard's tensors lie in its file."""

    file: Path
    positions: int
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]
    """By name: dtype, shape of a position, first byte."""


class Cache:
    """Reads a cache. Shards are read, not mapped: a file that is cut while it is mapped ends the process
    (SIGBUS). The index is mapped, since all processes of a machine share it; its size is looked at before.

    Args:
        path: the folder, or an address.

    Raises:
        ValueError, CorruptCacheError: as `read_about`; index or head are damaged.
    """

    def __init__(self, path: str | Path):
        self.about = read_about(path)
        self.path = folder_of(path)
        self._origin = Origin(str(path)) if is_address(path) else None
        for name, expected in self.about["files"].items():
            _check_digest(self.path / name, expected["digest"])
        self._map_index()

    def _map_index(self) -> None:
        index = _map_tensors(self.path / INDEX)
        self._keys, self._places, self._blocks = (index[n].numpy() for n in ("keys", "places", "blocks"))
        sizes = np.array([shard["positions"] for shard in self.about["shards"]])
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._first_blocks = np.concatenate([[0], np.cumsum(-(-sizes // BLOCK))])
        self._shards: dict[int, _Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "about": self.about, "_origin": self._origin}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_index()

    @property
    def head(self) -> Head:
        """The teacher's head."""
        tensors = {name: tensor.clone() for name, tensor in _map_tensors(self.path / HEAD).items()}
        extras = self.about["head"]
        return Head(tensors["weight"], tensors.get("bias"), extras["scale"], extras["softcap"])

    def missing(self, keys: Places) -> npt.NDArray[np.bool_]:
        """Mark the positions that the cache does not hold."""
        self._check_index()
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return self._keys[at] != keys

    def read(self, keys: Places) -> dict[str, Tensor]:
        """The stored tensors at these positions, in their order.

        Raises:
            ValueError: a position is not in the cache.
            CorruptCacheError: the shard that holds it is missing, cut or damaged.
        """
        absent = self.missing(keys)
        if absent.any():
            raise ValueError(
                f"{int(absent.sum())} of {len(keys)} label positions are not in the cache {self.path}: it "
                "was not written for their rows."
            )
        places = self._places[np.searchsorted(self._keys, keys)]
        numbers = np.searchsorted(self._starts, places, side="right") - 1

        def fetch(number: int) -> tuple[Tensor, dict[str, Tensor]]:
            where = np.flatnonzero(numbers == number)
            rows = places[where] - self._starts[number]
            blocks = np.unique(rows // BLOCK)
            tensors = self._read_blocks(self._open(number), blocks)
            self._check_blocks(number, tensors, blocks)
            at = torch.from_numpy(np.searchsorted(blocks, rows // BLOCK) * BLOCK + rows % BLOCK)
            return torch.from_numpy(where), {name: tensor[at] for name, tensor in tensors.items()}

        found: dict[str, Tensor] = {}
        at_once: Any = self._origin.map if self._origin else map
        for where, part in at_once(fetch, np.unique(numbers).tolist() or [0]):
            for name, tensor in part.items():
                found.setdefault(name, tensor.new_empty(len(keys), *tensor.shape[1:]))[where] = tensor
        return found

    def verify(self) -> None:
        """Read every shard and compare all of it with what was written.

        Raises:
            CorruptCacheError: the first difference.
        """
        for shard in self.about["shards"]:
            if self._origin is None:
                _check_digest(self.path / shard["file"], shard["digest"])

    def _check_index(self) -> None:
        file, expected = self.path / INDEX, self.about["files"][INDEX]["bytes"]
        found = file.stat().st_size if file.is_file() else 0
        if found != expected:
            raise CorruptCacheError(f"{file} has {found:,} of {expected:,} bytes: it was cut. {_REPAIR}")

    def _open(self, number: int) -> _Shard:
        if number not in self._shards:
            shard = self.about["shards"][number]
            file = self.path / shard["file"]
            # The header says where tensors begin and what they are: blocks cannot tell a changed one.
            head = bytearray(shard["header_bytes"])
            self._fill(file, [(memoryview(head), 0)])
            if checksum_bytes(head) != shard["header_digest"]:
                raise CorruptCacheError(f"The header of {file} is damaged. {_REPAIR}")
            header = json.loads(head[8:])
            tensors = {
                name: (_DTYPES[about["dtype"]], tuple(about["shape"][1:]), about["data_offsets"][0])
                for name, about in header.items()
                if name != "__metadata__"
            }
            first = {
                name: (dtype, shape, shard["header_bytes"] + at)
                for name, (dtype, shape, at) in tensors.items()
            }
            self._shards[number] = _Shard(file, shard["positions"], first)
        return self._shards[number]

    def _read_blocks(self, shard: _Shard, blocks: Places) -> dict[str, Tensor]:
        """These blocks of a shard's tensors, one after the other."""
        # Neighbors are read at once; elsewhere each block is kept for itself.
        cuts = np.flatnonzero(np.diff(blocks) > (1 if self._origin is None else 0)) + 1
        spans = [
            (int(run[0]) * BLOCK, min((int(run[-1]) + 1) * BLOCK, shard.positions))
            for run in np.split(blocks, cuts)
            if len(run)
        ]
        total = sum(end - start for start, end in spans)
        found = {n: torch.empty(total, *shape, dtype=dtype) for n, (dtype, shape, _) in shard.tensors.items()}
        reads: list[tuple[memoryview, int]] = []
        for name, (_, _, first) in shard.tensors.items():
            rows, done = _bytes_of(found[name]).numpy(), 0
            for start, end in spans:
                part: Any = rows[done : done + end - start].reshape(-1)
                reads.append((memoryview(part), first + start * rows.shape[1]))
                done += end - start
        self._fill(shard.file, reads)
        return found

    def _fill(self, path: Path, reads: list[tuple[memoryview, int]]) -> None:
        try:
            if self._origin is not None:
                return self._origin.fill(path.name, reads)
            with path.open("rb", buffering=0) as file:
                for view, at in reads:
                    _fill(view, file, at)
        except OSError as error:
            raise CorruptCacheError(f"{path} cannot be read: {error.strerror or error}. {_REPAIR}") from None

    def _check_blocks(self, number: int, tensors: Mapping[str, Tensor], blocks: Places) -> None:
        """Every time that a block is read: a disk may lose a bit between two epochs."""
        expected = self._blocks[self._first_blocks[number] + blocks].view(np.uint64)
        wrong = _block_digests(tensors, np.arange(len(blocks))) != expected
        if wrong.any():
            first = int(blocks[wrong][0]) * BLOCK
            file = self.about["shards"][number]["file"]
            raise CorruptCacheError(
                f"{self.path / file} is damaged at positions {first} to {first + BLOCK - 1}. {_REPAIR}"
            )


def _map_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CorruptCacheError(f"{path} cannot be read: {error}. {_REPAIR}") from None
