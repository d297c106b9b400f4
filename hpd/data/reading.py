"""Datasets from files, folders and the Hub, with errors that name the file and the line."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
from datasets import Dataset, concatenate_datasets, load_dataset

from hpd.config.schema import DataConfig
from hpd.data.checks import why_unreadable
from hpd.data.places import LocalFiles, UnusablePlaceError, local_files, reader_options
from hpd.files import checksum_file, digest_json

__all__ = ["first_rows", "read", "why_not"]


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
    datasets.disable_progress_bars()
    try:
        local = local_files(path, config.name)
        if local is None:
            rows = load_dataset(path, config.name, split=split, streaming=config.streaming)
        else:
            local = _of_split(local, path, split)
            rows = _load(local, split, config.streaming)
            as_json = _times_as(rows.features, datasets.Json()) if local.loader == "json" else None
            # The rows of a key ({"data": [...]}) are read by pandas, which makes times whatever the types.
            if as_json and not any(reader_options("json", file)[1] for file in local.files):
                read_again = _load(local, split, config.streaming, as_json)
                rows = read_again.map(dict, features=_times_as(rows.features, datasets.Value("string")))
        if isinstance(rows, Dataset) and len(rows):
            rows[0]  # text that is not UTF-8 is noticed where a row is read
    except UnusablePlaceError as error:
        raise ValueError(str(error)) from None
    except FileNotFoundError:
        raise
    except Exception as error:
        # datasets wraps parser errors of five libraries; whatever it was, this dataset cannot be read.
        if "corresponds to no data" in str(error):
            raise ValueError(f"The dataset {path} (split {split}) has no rows.") from None
        raise ValueError(f"The dataset {path} cannot be read: {why_not(local, error)}") from None
    return first_rows(rows, config.limit) if limit and config.limit else rows


def _of_split(local: LocalFiles, path: str, split: str) -> LocalFiles:
    """The files of the splits that are asked for; a slice such as train[:1%] names its split."""
    names = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    if missing := [name for name in names if name not in local.splits]:
        raise UnusablePlaceError(
            f"{path} has the split{'s' if len(local.splits) > 1 else ''} {', '.join(local.splits)} and no "
            f"{missing[0]}: set data.split (or data.validation) to one of them, or give a file."
        )
    return local._replace(splits={name: local.splits[name] for name in names})


def _times_as(features: Any, kind: Any) -> datasets.Features | None:
    """Features with another kind in place of times, which the JSON reader makes of dates in texts; None:
    there are none."""

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: replaced(inner) for name, inner in part.items()}
        if isinstance(part, (datasets.List, datasets.LargeList)):
            return type(part)(replaced(part.feature))
        timed = isinstance(part, datasets.Value) and part.dtype.startswith(("timestamp", "date", "time"))
        return kind if timed else part

    out = datasets.Features(replaced(dict(features or {})))
    return out if features and out != features else None


def _load(local: LocalFiles, split: str, streaming: bool, features: datasets.Features | None = None) -> Any:
    """Rows of these files, in one table; a column that some files lack is null there.

    Args:
        local, split, streaming: which files, and how.
        features: types of their columns; None: those that the reader finds.
    """
    # The name of the builder's configuration, and so the key of its cache: a file that was replaced by one of
    # equal size and time is another.
    digest = digest_json([checksum_file(Path(file)) for file in local.files])[:16]
    first, options = reader_options(local.loader, local.files[0])
    fixed: Any = {"split": split, "streaming": streaming, **options}
    if features is not None:
        fixed["features"] = features
    if len(local.files) == 1:
        name = next(iter(local.splits))
        return load_dataset(local.loader, digest, data_files={name: [first]}, **fixed)
    read = {file: reader_options(local.loader, file) for file in local.files}
    if all(options == read[local.files[0]][1] for _, options in read.values()):
        splits: Any = {name: [read[file][0] for file in files] for name, files in local.splits.items()}
        try:
            return load_dataset(local.loader, digest, data_files=splits, **fixed)
        except datasets.exceptions.DatasetGenerationError:
            if streaming:
                raise
    if not all(re.fullmatch(r"\w+", part) for part in split.split("+")):
        raise UnusablePlaceError(
            f"The files of the split {split} have different columns, and a slice needs equal ones: take "
            "data.limit, or give them the same columns."
        )
    parts = [
        load_dataset(local.loader, digest, data_files={"train": [file]}, split="train", **options)
        for file, options in read.values()
    ]
    return concatenate_datasets([part for part in parts if isinstance(part, Dataset)])


def first_rows(rows: Any, count: int) -> Any:
    """At most so many rows; `take` of older versions of datasets wants them all to be there."""
    return rows.take(min(count, len(rows)) if isinstance(rows, Dataset) else count)


def why_not(local: LocalFiles | None, error: Exception) -> str:
    """The reason why a dataset cannot be read, file by file; `local` is what `local_files` found."""
    if local is None:
        return " ".join(str(error.__cause__ or error).split())[:300]
    reasons = {file: why_unreadable(Path(file), local.loader, error) for file in local.files}
    if len(reasons) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{Path(file).name}: {reason}" for file, reason in reasons.items())
