"""Rows of data files and of Hub data sets."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hpd.files import whole_characters

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A split of a data set on the Hub."""

    path: str
    """Id, such as openai/gsm8k."""
    name: str | None = None
    """Configuration."""
    split: str = "test"
    revision: str | None = None
    """Branch, tag or commit; None is the newest."""

    def __str__(self) -> str:
        parts = [part for part in (self.path, self.name, self.split) if part]
        return ":".join(parts) + (f"@{self.revision}" if self.revision else "")


Data: TypeAlias = "str | Path | HubData"


def read_rows(data: Data) -> list[Row]:
    """Rows of a Hub data set, or of a .jsonl, .json, .csv or .parquet file, plain or .gz; no file is cached
    anywhere.

    For files not `datasets.load_dataset`: that one infers a single type per column (an answer 42 beside an
    answer "x + 1" fails) and keeps a copy of every file it was ever given.
    """
    if isinstance(data, HubData):
        return _hub_rows(data)
    path = Path(data).expanduser()
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if compressed else suffixes)[-1:]
    if not suffix or suffix[0] not in _READERS:
        raise ValueError(
            f"{path} has an unknown format; give a {', '.join(_READERS)} file, plain or with .gz after it."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no data file {path}; check the path (it is relative to {Path.cwd()})."
        )
    try:
        content = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
        rows = [whole_characters(row) for row in _READERS[suffix[0]](content)]
    except RecursionError:
        raise ValueError(
            f"{path} has a row that is nested too deeply to be read; every row must be an object of texts, "
            "numbers and short lists: correct or remove it."
        ) from None
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise ValueError(f"{path} is not a readable {suffix[0]} file: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows; give a file with at least one question and its answer.")
    return rows


def _hub_rows(data: HubData) -> list[Row]:
    from datasets import load_dataset  # seconds that local files need not spend

    try:
        rows = load_dataset(data.path, data.name, split=data.split, revision=data.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the data set {data} is not available from the Hub; name a local file or folder instead "
            f"(--data). The Hub client says: {reason}"
        ) from error
    return [dict(row) for row in rows]


def _json_rows(content: bytes) -> list[Row]:
    text = content.decode("utf-8-sig").strip()
    if text.startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"row {number} is a {type(row).__name__}; every row must be an object with named columns."
            )
    return rows


def _csv_rows(content: bytes) -> list[Row]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"row {number} has more fields than the header; quote fields that hold commas.")
    return rows


def _parquet_rows(content: bytes) -> list[Row]:
    from pyarrow import parquet  # a tenth of a second that the text formats need not spend

    return parquet.read_table(io.BytesIO(content)).to_pylist()


_READERS: dict[str, Callable[[bytes], list[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
