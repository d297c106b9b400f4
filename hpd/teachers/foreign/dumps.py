"""Dumps in whatever file they were kept: read as JSON Lines, which allow one row after the other."""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["as_lines", "dump_files"]

_ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz", ".parquet")


def dump_files(path: str) -> list[Path]:
    """The file, or those of a folder by name.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    found = sorted(file for file in place.glob("*") if file.is_file() and file.name.endswith(_ENDINGS))
    if not found:
        what = f"{path} is a folder without" if place.is_dir() else f"There is no file {path}: give"
        raise FileNotFoundError(f"{what} dumps of vLLM, files or a folder of {', '.join(_ENDINGS)}.")
    return found


def as_lines(file: Path, unpacked: Path) -> Path:
    """A file of one JSON object a line: the file itself, or what is written to `unpacked`.

    Raises:
        ValueError: it is damaged, or none of these formats.
    """
    try:
        if file.name.endswith(".parquet"):
            return _written(_parquet_rows(file), unpacked)
        if file.name.endswith(".gz"):
            with gzip.open(file) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target)
        plain = unpacked if file.name.endswith(".gz") else file
        if file.name.removesuffix(".gz").endswith(".json") and (rows := _one_document(plain)) is not None:
            return _written(rows, unpacked)
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid, ValueError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read: {said}. The file is damaged, or no dump of vLLM.") from None
    return plain


def _written(rows: Iterable[Any], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _one_document(file: Path) -> list[Any] | None:
    """The rows of a file that is one JSON value; None: it has one a line."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, list) else [found]


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            for name in ("prompt_token_ids", "prompt_logprobs"):
                if isinstance(row.get(name), str):
                    row[name] = json.loads(row[name])
            row["prompt_logprobs"] = [_place(place) for place in row.get("prompt_logprobs") or ()]
            yield row


def _place(place: Any) -> dict[str, Any] | None:
    """A place's tokens: a map's pairs, or a structure with a field for every token of the file."""
    if isinstance(place, str):
        place = json.loads(place)
    pairs = dict(place or {}).items()
    return {str(token): told for token, told in pairs if told is not None} or None
