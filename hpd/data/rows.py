"""Datasets as rows that TRL's SFTTrainer takes: prompt-completion, messages, text or input_ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational

from hpd.config.schema import DataConfig
from hpd.data.checks import check_columns, check_row, check_types
from hpd.data.reading import LOADERS, local_files, read, why_not

__all__ = ["PromptRow", "Rows", "load_preferences", "load_prompts", "load_rows"]

# Columns that training reads.
_KEPT = (
    "messages",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "tools",
    "chat_template_kwargs",
)


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


def load_rows(config: DataConfig, column: str | None = None) -> Rows:
    """Read the dataset and bring it into a TRL format.

    Args:
        config: its place, and the meaning of its columns.
        column: one more column that rows keep (it names their teacher).

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable or empty file, unknown columns, a row without text.
    """
    datasets.disable_progress_bars()
    train = read(config.path, config)
    validation = None
    if isinstance(config.validation, str):
        is_file = Path(config.validation).suffix in (*LOADERS, ".gz")
        other = config.validation if is_file else config.path
        validation = read(other, config, "train" if is_file else config.validation, limit=False)
    if isinstance(train, Dataset) and len(train) == 0:
        raise ValueError(f"The dataset {config.path} (split {config.split}) has no rows.")
    try:
        train, validation = (
            None if rows is None else _shape(rows, config, column) for rows in (train, validation)
        )
    except UnicodeDecodeError as error:
        # JSON is taken apart without a look at its text, which fails where a row is read.
        local = local_files(config.path)
        raise ValueError(f"The dataset {config.path} cannot be read: {why_not(local, error)}") from None
    assert train is not None
    if isinstance(config.validation, float):
        assert isinstance(train, Dataset)
        if len(train) < 2:
            raise ValueError("data.validation as a share needs at least two rows.")
        parts = train.train_test_split(test_size=config.validation, seed=0)
        train = parts["train"]
        validation = parts["test"]
    return Rows(train, validation, is_conversational(dict(next(iter(train)))))


def load_preferences(config: DataConfig) -> Dataset:
    """Rows with prompt, chosen and rejected, for preference optimisation.

    Raises:
        FileNotFoundError, ValueError: as `load_rows`; a column is missing.
    """
    rows = read(config.path, config)
    wanted = ("prompt", "chosen", "rejected")
    given = {name: config.columns.get(name, name) for name in wanted}
    if missing := [name for name in given.values() if name not in rows.column_names]:
        raise ValueError(
            f"Preference pairs need the columns prompt, chosen and rejected, and {config.path} lacks "
            f"{', '.join(missing)} (found: {', '.join(rows.column_names)}): map them in data.columns."
        )
    rows = rows.select_columns(list(given.values())).rename_columns(
        {v: k for k, v in given.items() if v != k}
    )
    return rows.map(_preference_row, fn_kwargs={"system_prompt": config.system_prompt})


def _preference_row(row: dict[str, Any], system_prompt: str | None) -> dict[str, Any]:
    """A pair as TRL reads it.

    Where both are whole dialogues and the prompt is a text, as in UltraFeedback, the prompt becomes what
    stands before the last turn.
    """
    if isinstance(row["prompt"], str) and isinstance(row["chosen"], list):
        prompt, chosen = row["chosen"][:-1], row["chosen"][-1:]
        row = {"prompt": prompt, "chosen": chosen, "rejected": row["rejected"][-1:]}
    prompt = row["prompt"]
    if system_prompt and isinstance(prompt, list) and prompt[0]["role"] != "system":
        row["prompt"] = [{"role": "system", "content": system_prompt}, *prompt]
    return row


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
    for index, given in enumerate(read(config.path, config)):
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
        *prompt, last = row["messages"]
        answer = last["content"] if last["role"] == "assistant" else None
        prompt = prompt if last["role"] == "assistant" else row["messages"]
    else:
        prompt = row.get("prompt")
        answer = row.get("completion")
        answer = answer[-1]["content"] if isinstance(answer, list) and answer else answer
    if not prompt:
        raise ValueError(
            f"Row {index} has no prompt. hpd generate needs prompt or messages: map them, for example "
            "data.columns: {prompt: question}."
        )
    if isinstance(prompt, str) and config.format == "chat":
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt and isinstance(prompt, list) and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    return PromptRow(prompt, reference if reference is not None else answer)


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
    if column is not None and column not in found:
        raise ValueError(
            f"teacher.column is {column!r}, which the dataset does not have: {', '.join(found)}."
        )
    renamed = {given: wanted for wanted, given in config.columns.items()}
    available = {renamed.get(name, name) for name in found}
    whole = {"messages", "text", "input_ids"}
    if {"prompt", "chosen"} <= available and not (whole | {"completion"}) & available:
        # Preference data: the preferred answer is the completion.
        renamed[config.columns.get("chosen", "chosen")] = "completion"
        available.add("completion")
    if not whole & available and not {"prompt", "completion"} <= available:
        raise ValueError(
            f"The dataset has the columns {', '.join(found)}. Training needs prompt and completion, "
            "messages, text, or input_ids: map them, for example data.columns: {prompt: question, "
            "completion: answer}."
        )
    return rows.map(
        _convert,
        with_indices=True,
        fn_kwargs={
            "config": config,
            "renamed": renamed,
            "keep": _KEPT if column is None else (*_KEPT, column),
        },
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
        out["prompt"] = messages[:-1]
        out["completion"] = messages[-1:]
    check_row(out, index, config.labels)
    first = "prompt" if "prompt" in out else "messages"
    if config.system_prompt and isinstance(out.get(first), list) and out[first][0]["role"] != "system":
        out[first] = [{"role": "system", "content": config.system_prompt}, *out[first]]
    return out
