"""Datasets from files, folders and the Hub, with errors that name the file and the line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pandas
from datasets import Dataset, Features, Value, load_dataset

from hpd.config.schema import DataConfig
from hpd.data.checks import why_unreadable

__all__ = ["LOADERS", "first_rows", "local_files", "read", "why_not"]

# Suffixes of files, and the loader of `datasets` for each.
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class _Unusable(ValueError):
    """A path that no reader needs to try."""


def read(path: str, config: DataConfig, split: str | None = None, limit: bool = True) -> Any:
    """The rows of a file, a folder or a Hub dataset, as they are.

    Args:
        path: where they are.
        config: how they are read.
        split: instead of the configuration's.
        limit: keep only the first rows that `config.limit` counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or no rows.
    """
    split = split or config.split
    local = None
    # Its own log of a parser's error would come first, and says less.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        local = local_files(path)
        if local is None:
            rows = load_dataset(path, config.name, split=split, streaming=config.streaming)
        else:
            # Cells of a CSV file are text: guessed types would make numbers of answers and null of "NA".
            cells: dict[str, Any] = _text_cells(local[1][0]) if local[0] == "csv" else {}
            rows = load_dataset(
                local[0], data_files=local[1], split=split, streaming=config.streaming, **cells
            )
        if isinstance(rows, Dataset) and len(rows):
            rows[0]  # text that is not UTF-8 is noticed where a row is read
    except _Unusable as error:
        raise ValueError(str(error)) from None
    except FileNotFoundError:
        raise
    except Exception as error:
        # datasets wraps parser errors of five libraries; whatever it was, this dataset cannot be read.
        if "corresponds to no data" in str(error):
            raise ValueError(f"The dataset {path} (split {split}) has no rows.") from None
        raise ValueError(f"The dataset {path} cannot be read: {why_not(local, error)}") from None
    return first_rows(rows, config.limit) if limit and config.limit else rows


def first_rows(rows: Any, count: int) -> Any:
    """At most so many rows; `take` of older versions of datasets wants them all to be there."""
    return rows.take(min(count, len(rows)) if isinstance(rows, Dataset) else count)


def _text_cells(file: str) -> dict[str, Any]:
    columns = pandas.read_csv(file, nrows=0).columns
    return {"features": Features({str(name): Value("string") for name in columns}), "keep_default_na": False}


def why_not(local: tuple[str, list[str]] | None, error: Exception) -> str:
    """The reason why a dataset cannot be read, file by file; `local` is what `local_files` found."""
    if local is None:
        return " ".join(str(error.__cause__ or error).split())[:300]
    reasons = {file: why_unreadable(Path(file), local[0], error) for file in local[1]}
    if len(reasons) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{Path(file).name}: {reason}" for file, reason in reasons.items())


def local_files(path: str) -> tuple[str, list[str]] | None:
    """(loader, files) of a local path; None for a Hub id."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if _loader(p))
        if not files:
            raise _Unusable(f"The folder {path} holds no .jsonl, .json, .csv or .parquet file.")
        if len({_loader(p) for p in files}) > 1:
            raise _Unusable(
                f"The folder {path} holds files of several formats ({files[0].name}, ...): give one of them."
            )
        return str(_loader(files[0])), [str(p) for p in files]
    if place.is_file():
        loader = _loader(place)
        if loader is None:
            raise _Unusable(f"{path}: give a .jsonl, .json, .csv or .parquet file (also .gz).")
        if place.stat().st_size == 0:
            raise _Unusable(f"The dataset {path} is empty.")
        return loader, [str(place)]
    if place.suffix in (*LOADERS, ".gz") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"No dataset at {path}.")
    return None


def _loader(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    return LOADERS.get(suffixes[-1]) if suffixes else None
