"""Datasets to rows that TRL's SFTTrainer takes: prompt-completion, messages, text or input_ids."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas
import pyarrow.compute
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from hpd.batch import IGNORE_INDEX
from hpd.config.schema import DataConfig
from hpd.data.checks import check_columns, check_row, check_types, why_unreadable
from hpd.data.templates import training_template

__all__ = [
    "Lengths",
    "PromptRow",
    "Rows",
    "check_ids",
    "load_preferences",
    "load_prompts",
    "load_rows",
    "measure",
]


_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


_MEASURED_ROWS = 256


class Rows(NamedTuple):
    """Training rows, held-out rows, and whether they are conversations."""

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None
    conversational: bool


class PromptRow(NamedTuple):
    """A prompt that wants a completion."""

    prompt: str | list[dict[str, str]]
    reference: str | None
    """The dataset's own answer, where it has one."""


class Lengths(NamedTuple):
    """Tokens of the measured rows."""

    num_rows: int
    percentiles: dict[int, int]
    """Tokens per row at the 50th, 90th, 99th and 100th percentile."""
    label_tokens: float
    """Mean label tokens per row, after max_length."""
    cut_rows: float
    """Share of rows that max_length cuts."""
    lost_rows: float
    """Share of rows left without any label by it."""
    ends_with_eos: float
    """Share of uncut rows whose last label is an end-of-sequence token."""
    label_share: float
    """Labels among all tokens, after max_length."""


class _Unusable(ValueError):
    """A path that no reader needs to try."""


def load_rows(config: DataConfig, column: str | None = None) -> Rows:
    """Read the dataset and bring it into a TRL format.

    Args:
        config: where it is and what its columns mean.
        column: one more column that rows keep (it names their teacher).

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable or empty file, unknown columns, a row without text.
    """
    datasets.disable_progress_bars()
    train = _read(config.path, config)
    validation = None
    if isinstance(config.validation, str):
        is_file = Path(config.validation).suffix in (*_LOADERS, ".gz")
        other = config.validation if is_file else config.path
        validation = _read(other, config, "train" if is_file else config.validation, limit=False)
    if isinstance(train, Dataset) and len(train) == 0:
        raise ValueError(f"The dataset {config.path} (split {config.split}) has no rows.")
    try:
        train, validation = (
            None if rows is None else _shape(rows, config, column) for rows in (train, validation)
        )
    except UnicodeDecodeError as error:
        # JSON is taken apart without a look at its text, which fails where a row is read.
        local = _local(config.path)
        raise ValueError(f"The dataset {config.path} cannot be read: {_why(local, error)}") from None
    assert train is not None
    if isinstance(config.validation, float):
        assert isinstance(train, Dataset)
        if len(train) < 2:
            raise ValueError("data.validation as a share needs at least two rows.")
        parts = train.train_test_split(test_size=config.validation, seed=0)
        train, validation = parts["train"], parts["test"]
    return Rows(train, validation, is_conversational(dict(next(iter(train)))))


def check_ids(rows: Dataset | IterableDataset, vocab_size: int) -> None:
    """For rows that are token ids already: are they of this vocabulary?

    Raises:
        ValueError: an id that the student has no row for, with the number of the first such row.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    tokens = rows.data.column("input_ids").combine_chunks().flatten()
    greatest = pyarrow.compute.max(tokens).as_py()  # type: ignore[attr-defined]
    if greatest is None or greatest < vocab_size:
        return
    for index, ids in enumerate(rows["input_ids"]):
        if ids and max(ids) >= vocab_size:
            raise ValueError(
                f"Row {index} has the token {max(ids)} among its input_ids, and the student's head has "
                f"{vocab_size} tokens: the rows were tokenised for another model."
            )


def load_preferences(config: DataConfig) -> Dataset:
    """Rows with prompt, chosen and rejected, for preference optimisation.

    Raises:
        FileNotFoundError, ValueError: as `load_rows`; a column is missing.
    """
    rows = _read(config.path, config)
    wanted = ("prompt", "chosen", "rejected")
    given = {name: config.columns.get(name, name) for name in wanted}
    if missing := [name for name in given.values() if name not in rows.column_names]:
        raise ValueError(
            f"Preference pairs need the columns prompt, chosen and rejected, and {config.path} lacks "
            f"{', '.join(missing)} (found: {', '.join(rows.column_names)}): map them in data.columns."
        )
    return rows.select_columns(list(given.values())).rename_columns(
        {v: k for k, v in given.items() if v != k}
    )


def load_prompts(config: DataConfig, reference: str | None = None) -> list[PromptRow]:
    """The prompts of the dataset, as training would see them; rows need no completion.

    Args:
        config: the recipe's `data`.
        reference: column with the right answer; None: the completion, or the last turn of `messages`.

    Raises:
        FileNotFoundError, ValueError: as `load_rows`; no prompts, or no such column.
    """
    datasets.disable_progress_bars()
    renamed = {given: wanted for wanted, given in config.columns.items()}
    prompts = []
    for index, given in enumerate(_read(config.path, config)):
        row: dict[str, Any] = dict(given)
        named = {renamed.get(name, name): value for name, value in row.items()}
        if reference is not None and reference not in row:
            raise ValueError(
                f"generate.reference is {reference!r}, and the dataset has the columns {', '.join(row)}."
            )
        prompts.append(_prompt_row(named, index, config, None if reference is None else str(row[reference])))
    if not prompts:
        raise ValueError(f"The dataset {config.path} (split {config.split}) has no rows.")
    return prompts


def _prompt_row(row: Mapping[str, Any], index: int, config: DataConfig, reference: str | None) -> PromptRow:
    prompt: Any
    answer: Any
    check_types({name: row[name] for name in ("prompt", "messages") if row.get(name) is not None}, index)
    if row.get("messages"):
        last = row["messages"][-1]
        answered = last["role"] == "assistant"
        prompt, answer = (row["messages"][:-1], last["content"]) if answered else (row["messages"], None)
    else:
        prompt, answer = row.get("prompt"), row.get("completion")
        answer = answer[-1]["content"] if isinstance(answer, list) and answer else answer
    if not prompt:
        raise ValueError(
            f"Row {index} has no prompt. hpd generate needs prompt or messages: map them, for example "
            "data.columns: "
            "{prompt: question}."
        )
    if isinstance(prompt, str) and config.format == "chat":
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt and isinstance(prompt, list) and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    return PromptRow(prompt, reference if reference is not None else answer)


def _read(path: str, config: DataConfig, split: str | None = None, limit: bool = True) -> Any:
    split = split or config.split
    local = None
    # Its log of a parser's error would come before ours, which says more.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        local = _local(path)
        if local is None:
            rows = load_dataset(path, config.name, split=split, streaming=config.streaming)
        else:
            # Cells of a CSV file are text: guessed types would make numbers of answers and null of "NA".
            cells: dict[str, Any] = _text_cells(local[1][0]) if local[0] == "csv" else {}
            rows = load_dataset(
                local[0], data_files=local[1], split=split, streaming=config.streaming, **cells
            )
        if isinstance(rows, Dataset) and len(rows):
            rows[0]  # text that is no UTF-8 is noticed where a row is read
    except _Unusable as error:
        raise ValueError(str(error)) from None
    except FileNotFoundError:
        raise
    except Exception as error:
        # datasets wraps parser errors of five libraries; whatever it was, this dataset cannot be read.
        if "corresponds to no data" in str(error):
            raise ValueError(f"The dataset {path} (split {split}) has no rows.") from None
        raise ValueError(f"The dataset {path} cannot be read: {_why(local, error)}") from None
    return _first(rows, config.limit) if limit and config.limit else rows


def _first(rows: Any, count: int) -> Any:
    """At most so many rows; `take` of older versions of datasets wants them all to be there."""
    return rows.take(min(count, len(rows)) if isinstance(rows, Dataset) else count)


def _text_cells(file: str) -> dict[str, Any]:
    columns = pandas.read_csv(file, nrows=0).columns
    return {"features": Features({str(name): Value("string") for name in columns}), "keep_default_na": False}


def _why(local: tuple[str, list[str]] | None, error: Exception) -> str:
    if local is None:
        return " ".join(str(error.__cause__ or error).split())[:300]
    reasons = {file: why_unreadable(Path(file), local[0], error) for file in local[1]}
    return (
        next(iter(reasons.values()))
        if len(reasons) == 1
        else "; ".join(f"{Path(f).name}: {r}" for f, r in reasons.items())
    )


def _local(path: str) -> tuple[str, list[str]] | None:
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
    if place.suffix in (*_LOADERS, ".gz") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"No dataset at {path}.")
    return None


def _loader(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    return _LOADERS.get(suffixes[-1]) if suffixes else None


def _shape(rows: Any, config: DataConfig, column: str | None = None) -> Any:
    """Rename, wrap into messages, and refuse rows that TRL would fail on later."""
    found = list(next(iter(rows)).keys())
    check_columns(found)
    for wanted, given in config.columns.items():
        if given not in found:
            raise ValueError(
                f"data.columns maps {wanted} to {given!r}, which the dataset does not have: "
                f"{', '.join(found)}."
            )
    keep = (
        "messages",
        "prompt",
        "completion",
        "text",
        "input_ids",
        "labels",
        "tools",
        "chat_template_kwargs",
    )
    if column is not None:
        if column not in found:
            raise ValueError(
                f"teacher.column is {column!r}, which the dataset does not have: {', '.join(found)}."
            )
        keep += (column,)
    renamed = {given: wanted for wanted, given in config.columns.items()}
    available = [renamed.get(name, name) for name in found]
    if {"prompt", "chosen"} <= set(available) and not {"completion", "messages", "text", "input_ids"} & set(
        available
    ):
        # Preference data: the preferred answer is the completion.
        renamed[config.columns.get("chosen", "chosen")] = "completion"
        available = [renamed.get(name, name) for name in found]
    if "messages" in available and config.labels == "last_turn":
        pass
    elif not {"messages", "text", "input_ids"} & set(available) and not {"prompt", "completion"} <= set(
        available
    ):
        raise ValueError(
            f"The dataset has the columns {', '.join(found)}. Training needs prompt and completion, "
            "messages, text, or "
            "input_ids: map them, for example data.columns: {prompt: question, completion: answer}."
        )
    return rows.map(
        _convert,
        with_indices=True,
        fn_kwargs={"config": config, "renamed": renamed, "keep": keep},
        remove_columns=found,
    )


def _convert(
    row: Mapping[str, Any], index: int, config: DataConfig, renamed: Mapping[str, str], keep: tuple[str, ...]
) -> Any:
    out = {renamed.get(name, name): value for name, value in row.items() if renamed.get(name, name) in keep}
    if "input_ids" in out:
        check_row(out, index, config.labels)
        return out
    if "prompt" in out and "completion" in out:
        out.pop("text", None)
        out.pop("messages", None)
        if config.format == "chat" and isinstance(out["prompt"], str):
            out["prompt"] = [{"role": "user", "content": out["prompt"]}]
            out["completion"] = [{"role": "assistant", "content": out["completion"]}]
    elif "messages" in out and config.labels == "last_turn":
        check_types(out, index)
        messages = out.pop("messages")
        out["prompt"], out["completion"] = messages[:-1], messages[-1:]
    check_row(out, index, config.labels)
    first = "prompt" if "prompt" in out else "messages"
    if config.system_prompt and isinstance(out.get(first), list) and out[first][0]["role"] != "system":
        out[first] = [{"role": "system", "content": config.system_prompt}, *out[first]]
    return out


def measure(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, labels: str
) -> Lengths:
    """Tokenise the first rows as training will, to see lengths and labels before any model is loaded.

    Raises:
        ValueError: not a single label is left in the measured rows.
    """
    lengths, kept, finished = [], [], []
    for row in _first(rows, _MEASURED_ROWS):
        ids, mask = _tokenise(dict(row), tokenizer, labels)
        lengths.append(len(ids))
        kept.append(sum(mask[:max_length]))
        if max_length is None or len(ids) <= max_length:
            last = max((i for i, bit in enumerate(mask) if bit), default=None)
            finished.append(last is not None and _is_end(ids, last, tokenizer))
    sizes, left = np.array(lengths), np.array(kept)
    if not left.any():
        raise ValueError(
            f"Every label is masked: none of the first {len(sizes)} rows has a completion token within "
            f"max_length={max_length} (median row: {int(np.median(sizes))} tokens). Raise train.max_length, "
            "or check data.labels and the columns."
        )
    return Lengths(
        len(sizes),
        {p: int(np.percentile(sizes, p)) for p in (50, 90, 99, 100)},
        float(left.mean()),
        float((sizes > (max_length or np.inf)).mean()),
        float((left == 0).mean()),
        float(np.mean(finished or [0.0])),
        float(left.sum() / np.minimum(sizes, max_length or np.inf).sum()),
    )


def _is_end(ids: list[int], last: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the row's last label ends the turn; templates put a newline behind their end token."""
    tail = list(ids[max(0, last - 1) : last + 1])
    return any(i == tokenizer.eos_token_id or i in tokenizer.all_special_ids for i in tail)


def _tokenise(row: dict[str, Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """Token ids and label mask of one row."""
    if "input_ids" in row:
        given = row.get("labels", row["input_ids"])
        return list(row["input_ids"]), [label != IGNORE_INDEX for label in given]
    if "messages" in row:
        return _tokenise_messages(row["messages"], tokenizer, labels)
    if "text" in row:
        ids = tokenizer(row["text"] + _missing_eos(row["text"], tokenizer))["input_ids"]
        return ids, [True] * len(ids)
    if is_conversational(row):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=True
        )
        ids = tokenizer.apply_chat_template(
            row["prompt"] + row["completion"], tokenize=True, return_dict=True
        )["input_ids"]
        prompt = prompt["input_ids"]
    else:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + _missing_eos(row["completion"], tokenizer))[
            "input_ids"
        ]
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
    )
    return ids, [labels == "all" or i >= shared for i in range(len(ids))]


def _tokenise_messages(messages: list[Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """A whole conversation; with labels: assistant only the assistant's turns are labels, as the template
    marks them."""
    if labels != "assistant":
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        return ids, [True] * len(ids)
    rendered = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=training_template(tokenizer, labels),
    )
    return rendered["input_ids"], [bool(bit) for bit in rendered["assistant_masks"]]


def _missing_eos(text: str, tokenizer: Any) -> str:
    return "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token
