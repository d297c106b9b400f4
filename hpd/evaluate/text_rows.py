"""Texts that distribution metrics read: prompts and completions of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpd.evaluate.benchmarks.forms import chat_turns
from hpd.evaluate.benchmarks.rows import read_rows
from hpd.generation.texts import Prompt

__all__ = ["TextRow", "read_text_rows"]

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")
COMPLETION_COLUMNS = ("completion", "answer", "response", "solution", "output", "chosen")


class TextRow(NamedTuple):
    """A prompt and its completion in the data."""

    prompt: Prompt
    completion: str


def read_text_rows(
    data: str | Path,
    *,
    limit: int | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> list[TextRow]:
    """Prompts and completions of a file: columns of these names, or `messages` that end with the assistant's
    turn.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or lacks a column or a text.
    """
    rows = read_rows(data)[:limit]
    if "messages" in rows[0] and prompt_column is None and completion_column is None:
        return [_from_messages(row.get("messages"), data, number) for number, row in enumerate(rows, start=1)]
    names = [
        _column(data, role, list(rows[0]), given, known)
        for role, given, known in (
            ("prompt", prompt_column, PROMPT_COLUMNS),
            ("completion", completion_column, COMPLETION_COLUMNS),
        )
    ]
    texts = []
    for number, row in enumerate(rows, start=1):
        prompt, completion = (row.get(name) for name in names)
        try:
            prompt = chat_turns(prompt) if isinstance(prompt, list) else prompt
            completion = chat_turns(completion)[-1]["content"] if isinstance(completion, list) else completion
        except (ValueError, IndexError) as error:
            raise ValueError(f"{data}: row {number}: {error}; correct or remove it.") from None
        if not prompt or not isinstance(completion, str) or not completion.strip():
            raise ValueError(
                f"{data}: row {number} has no text in {names[0]!r} or {names[1]!r}; fill or remove it."
            )
        texts.append(TextRow(prompt, completion))
    return texts


def _column(data: str | Path, role: str, columns: list[str], given: str | None, known: Sequence[str]) -> str:
    found = next((name for name in ((given,) if given else known) if name in columns), None)
    if found is None:
        wanted = given or " | ".join(known)
        raise ValueError(
            f"{data} has no {role} column {wanted}; it has {', '.join(columns)}. Name it with "
            f"--{role}-column."
        )
    return found


def _from_messages(messages: Any, data: str | Path, number: int) -> TextRow:
    try:
        turns = chat_turns(messages if isinstance(messages, list) else [])
    except ValueError as error:
        raise ValueError(f"{data}: row {number}: {error}; correct or remove it.") from None
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise ValueError(
            f"{data}: the messages of row {number} do not end with an assistant turn; fill or remove the row."
        )
    return TextRow(turns[:-1], turns[-1]["content"])
