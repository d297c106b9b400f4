"""Places of rows on disk: files and folders by split, their formats and compressions."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import datasets.config
import pyarrow
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from hpd.files import checksum_file, write_atomically

__all__ = ["LOADERS", "SUFFIXES", "LocalFiles", "UnusablePlaceError", "local_files", "reader_options"]

# Suffixes of files, and the loader of `datasets` for each.
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst")
SUFFIXES = (*LOADERS, *_COMPRESSED)

_FORMATS = ".jsonl, .json, .csv, .tsv or .parquet"
_DELIMITERS = (",", ";", "\t", "|")
# Keys under which a JSON file that is one object keeps its rows.
_ROW_KEYS = ("data", "rows", "train", "examples", "instances", "samples", "records")


class UnusablePlaceError(ValueError):
    """A path that no reader needs to try."""


class LocalFiles(NamedTuple):
    """Files of one format."""

    loader: str
    """The loader of `datasets`."""
    splits: Mapping[str, list[str]]
    """Files of each split; a file alone, or a folder that names no split, is `train`."""

    @property
    def files(self) -> list[str]:
        """All files, whatever their split."""
        return [file for files in self.splits.values() for file in files]


def local_files(path: str, name: str | None = None) -> LocalFiles | None:
    """The files of a local path; None for a Hub id.

    Args:
        path: a file, or a folder: one that was downloaded from the Hub keeps its splits, which `datasets`
            reads off the card in README.md or the names of the files.
        name: the configuration, of those that the card lists.

    Raises:
        FileNotFoundError: no such file.
        UnusablePlaceError: an unknown format, several of them, or an empty file.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place, path, name)
    if place.is_file():
        loader = _loader(place)
        if loader is None:
            raise UnusablePlaceError(f"{path}: give a {_FORMATS} file (also .gz or .zst).")
        if place.stat().st_size == 0:
            raise UnusablePlaceError(f"The dataset {path} is empty.")
        return LocalFiles(loader, {"train": [str(place)]})
    if place.suffix in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"No dataset at {path}.")
    return None


def _folder(place: Path, path: str, name: str | None) -> LocalFiles:
    try:
        patterns: Any = _of_card(place, name) or get_data_patterns(str(place))
        found = DataFilesDict.from_patterns(patterns, base_path=str(place))
    except (EmptyDatasetError, FileNotFoundError):
        found = {}
    splits = {str(split): [file for file in files if _loader(Path(file))] for split, files in found.items()}
    splits = {split: sorted(files) for split, files in splits.items() if files}
    files = [file for files in splits.values() for file in files]
    if not files:
        raise UnusablePlaceError(f"The folder {path} holds no {_FORMATS} file.")
    loaders = {_loader(Path(file)) for file in files}
    if len(loaders) > 1:
        raise UnusablePlaceError(
            f"The folder {path} holds files of several formats ({Path(files[0]).name}, ...): give one of "
            "them."
        )
    return LocalFiles(str(loaders.pop()), splits)


def _of_card(place: Path, name: str | None) -> Mapping[Any, list[str]] | None:
    """The patterns of files that the card of a downloaded repository lists; None: it lists none."""
    card = place / "README.md"
    if not card.is_file():
        return None
    try:
        configs = MetadataConfigs.from_dataset_card_data(cast(Any, DatasetCard.load(card).data))
    except Exception:  # a README that is no card
        return None
    listed = {key: value for key, value in configs.items() if value.get("data_files")}
    chosen = name or configs.get_default_config_name() or next(iter(listed), None)
    if name is not None and name not in listed:
        raise UnusablePlaceError(
            f"data.name is {name!r}, and the card of {place} lists {', '.join(listed) or 'no configuration'}."
        )
    return sanitize_patterns(listed[chosen]["data_files"]) if chosen in listed else None


def _loader(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return LOADERS.get(suffixes[-1]) if suffixes else None


def reader_options(loader: str, file: str) -> tuple[str, dict[str, Any]]:
    """The file as its loader of `datasets` takes it, and the loader's options.

    Zstandard is unpacked beside the caches of `datasets`. Cells of a CSV file are text: guessed types would
    make numbers of answers and null of "NA".
    """
    path = Path(file)
    if path.suffix == ".zst":
        path = _unpacked(path)
    if loader == "json":
        key = _key_of_rows(path) if ".json" in path.suffixes else None
        return str(path), {} if key is None else {"field": key}
    if loader == "csv":
        columns, delimiter = _header(path)
        features = datasets.Features({name: datasets.Value("string") for name in columns})
        return str(path), {"features": features, "keep_default_na": False, "sep": delimiter}
    return str(path), {}


def _unpacked(path: Path) -> Path:
    target = Path(datasets.config.HF_DATASETS_CACHE) / "hpd" / checksum_file(path) / path.stem
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.input_stream(str(path), compression="zstd") as packed:
            content = packed.read()
        write_atomically(target, lambda draft: Path(draft).write_bytes(content))
    return target


def _key_of_rows(path: Path) -> str | None:
    """The key of the rows in a file that is one object, such as {"data": [...]}; None: rows are lines."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"{"):
            return None
        file.seek(0)
        try:
            tree = json.load(file)
        except ValueError:
            return None
    rows = [key for key in _ROW_KEYS if isinstance(tree.get(key), list)]
    return rows[0] if len(rows) == 1 and all(isinstance(row, dict) for row in tree[rows[0]]) else None


def _header(path: Path) -> tuple[list[str], str]:
    """Columns and delimiter of a CSV file; a comma wherever it tells as many columns as another would."""
    with (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8-sig", newline="")
    ) as file:
        start = file.read(2**16)
    rows = {d: next(csv.reader(start.splitlines(), delimiter=d), []) for d in _DELIMITERS}
    delimiter = "\t" if ".tsv" in path.suffixes else max(_DELIMITERS, key=lambda d: len(rows[d]))
    # As pandas names a column without a name, such as the index of a data frame.
    return [name or f"Unnamed: {i}" for i, name in enumerate(rows[delimiter])], delimiter
