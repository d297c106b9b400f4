"""Checks of rows: their types, roles and turns, named by the number of the row."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from hpd.batch import IGNORE_INDEX

__all__ = [
    "ROLES",
    "check_columns",
    "check_mixed",
    "check_row",
    "check_turns",
    "check_types",
    "why_unreadable",
]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_OTHER_MEDIA = ("image", "images", "audio", "audios", "video", "videos")

_KINDS = {
    datetime.datetime: "a time, made of dates in its texts by the reader of that file (JSON lines keep them)",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list",
    type(None): "null",
}

# Of chat completions, and of OpenAI's responses.
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXTS = ("prompt", "completion", "text", "chosen", "rejected", "instruction", "output", "input", "system")


def check_columns(columns: list[str]) -> None:
    """Refuse what the student would be trained without."""
    if media := [name for name in columns if name in _OTHER_MEDIA]:
        raise ValueError(
            f"The dataset has the column {media[0]}, and hpd distills text only: remove rows and column that "
            "need it."
        )


def check_mixed(rows: Any, columns: Mapping[str, str]) -> None:
    """Refuse text in a column that holds other types too: `datasets` stores it as JSON, and reads the
    text "5" back as a number and the text "[1]" as a list.

    Args:
        rows: a dataset, or a stream, which may not tell its types.
        columns: the column of each part that is read.

    Raises:
        ValueError: the column, and the first row that does not read as text.
    """
    for part, column in columns.items():
        kind: Any = (rows.features or {}).get(column)
        turn: Any = kind.feature if isinstance(kind, (datasets.List, datasets.LargeList)) else None
        inside = [key for key in ("content", "value") if isinstance(turn, dict) and key in turn]
        if any(isinstance(turn[key], datasets.Json) for key in inside):
            place = f"the turns of {column} have content"
        elif isinstance(kind, datasets.Json) and part in _TEXTS:
            place = f"the column {column} has values"
        else:
            continue
        other = next((i for i, row in enumerate(rows) if not _is_text(row[column], inside)), 0)
        raise ValueError(
            f"Row {other}: {place} of more than one type: text elsewhere, and here a number, a list or an "
            "object, or text that looks like one. Once read, they cannot be told apart: write all of them as "
            "text, or all as messages."
        )


def _is_text(value: Any, inside: Sequence[str]) -> bool:
    if not inside:
        return isinstance(value, str)
    return all(isinstance(turn.get(key), str) for turn in value or () for key in inside)


def check_row(row: Mapping[str, Any], index: int, labels: str) -> None:
    """Refuse a row that cannot be trained on: no text where text belongs, or nothing to learn.

    Raises:
        ValueError: wrong types, unknown roles, empty texts or turns, or a conversation without an answer.
    """
    if "input_ids" in row:
        _check_ids(row, index)
        return
    check_types(row, index)
    for name in ("prompt", "completion", "messages", "text"):
        if name in row and not row[name]:
            raise ValueError(f"Row {index} has an empty {name}: remove the row or fill it.")
    completion = row.get("completion")
    messages = row.get("messages")
    if (
        "prompt" in row
        and "completion" in row
        and isinstance(row["prompt"], str) != isinstance(completion, str)
    ):
        raise ValueError(
            f"Row {index} has text and messages mixed in prompt and completion: make both text, or both "
            "messages."
        )
    if isinstance(completion, list) and completion[-1]["role"] != "assistant":
        raise ValueError(
            f"Row {index} ends with a {completion[-1]['role']} message: there is no answer to learn."
        )
    if (
        messages
        and labels not in ("all", "conversation")
        and all(turn["role"] != "assistant" for turn in messages)
    ):
        raise ValueError(
            f"Row {index} has no assistant message: there is no answer to learn. Remove it, or set "
            "data.labels: all."
        )


def check_types(row: Mapping[str, Any], index: int) -> None:
    """Refuse a prompt or completion that is not text or messages, text that is not text, and so on."""
    for name in ("prompt", "completion", "text", "messages"):
        value = row.get(name)
        if name not in row or (isinstance(value, str) and name != "messages"):
            continue
        if isinstance(value, list) and name != "text":
            check_turns(value, name, index)
            continue
        wanted = {"text": "text", "messages": "messages (objects with role and content)"}.get(
            name, "text, or messages"
        )
        given = _KINDS.get(type(value), "text" if isinstance(value, str) else type(value).__name__)
        raise ValueError(
            f"Row {index} has a {name} that is {given}, and should be {wanted}: correct or remove the row."
        )


def check_turns(turns: list[Any], name: str, index: int) -> None:
    """Refuse a turn without a known role, or with content that is not text."""
    for number, turn in enumerate(turns):
        where = f"Row {index}: turn {number} of {name}"
        if not isinstance(turn, Mapping):
            raise ValueError(
                f"{where} is {_KINDS.get(type(turn), 'text')}, and should be an object with role and content."
            )
        if not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(
                f"{where} has the keys {', '.join(map(str, turn))}, and needs role and content: rename them "
                "in the file."
            )
        if turn["role"] not in ROLES:
            raise ValueError(
                f"{where} has the role {turn['role']!r}; known: {', '.join(ROLES)}. Rename it in the file."
            )
        content = turn["content"]
        parts = (
            [part for part in content if not isinstance(part, Mapping) or part.get("type") not in _TEXT_PARTS]
            if isinstance(content, list)
            else []
        )
        if parts:
            kind = parts[0].get("type") if isinstance(parts[0], Mapping) else type(parts[0]).__name__
            raise ValueError(
                f"{where} holds a part of type {kind}, and hpd distills text only: remove the row."
            )
        if isinstance(content, list) and not all(isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"{where} has a part of type text without text: correct or remove the row.")
        if not isinstance(content, (str, list, type(None))):
            raise ValueError(
                f"{where} has content that is {_KINDS.get(type(content), type(content).__name__)}, and "
                "should be text."
            )
        if not content and turn["role"] == "assistant" and not turn.get("tool_calls"):
            raise ValueError(f"{where} is an empty assistant message: remove the row or fill it.")


def _check_ids(row: Mapping[str, Any], index: int) -> None:
    ids = row["input_ids"]
    labels = row.get("labels")
    for name, values in (("input_ids", ids), ("labels", labels)):
        if values is not None and not (
            isinstance(values, list) and all(type(value) is int for value in values)
        ):
            raise ValueError(
                f"Row {index} has {name} that are not a list of whole numbers: tokenize them, or use text "
                "columns."
            )
    if not ids:
        raise ValueError(f"Row {index} has an empty input_ids: remove the row or fill it.")
    if labels is not None and len(labels) != len(ids):
        raise ValueError(
            f"Row {index} has {len(ids)} input_ids and {len(labels)} labels: there must be one label per "
            "token."
        )
    if min(ids) < 0:
        raise ValueError(f"Row {index} has the token {min(ids)} among its input_ids: ids start at 0.")
    if labels is not None and (wrong := [v for v in labels if v < 0 and v != IGNORE_INDEX]):
        raise ValueError(
            f"Row {index} has the label {wrong[0]}: labels are token ids, or {IGNORE_INDEX} for none."
        )


def why_unreadable(path: Path, loader: str, error: BaseException) -> str:
    """The fault of a file that `datasets` could not read; for JSON, the first line that is not a row."""
    cause = " ".join(str(error.__cause__ or error).split())[:300]
    return (_first_bad_line(path) if loader == "json" else None) or cause


def _first_bad_line(path: Path) -> str | None:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            if start == b"[":
                return None
            file.seek(0)
            for number, line in enumerate(file, start=1):
                problem = _problem(line)
                if problem is not None:
                    return f"line {number} {problem}"
    except (OSError, EOFError) as error:
        return f"{error} (is it cut short, or not a gzip file?)"
    return None


def _problem(line: bytes) -> str | None:
    try:
        row = json.loads(line.decode("utf-8")) if line.strip() else {}
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text (byte {error.start} of the line)"
    except RecursionError:
        return "is nested too deeply"
    except ValueError as error:
        return f"is not JSON ({error})"
    if isinstance(row, dict):
        return None
    return f"is {_KINDS.get(type(row), 'text')}, and should be an object: one row per line"
