"""Short dialogues that a tiny model can learn from, and rows made of columns."""

from __future__ import annotations

from typing import Any

__all__ = ["ANSWERS", "DIALOGUES", "NUMBERS", "QUESTIONS", "rows"]

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
QUESTIONS = [f"say {number}:" for number in NUMBERS]
ANSWERS = [f"{' '.join(NUMBERS[: i + 1])}." for i in range(len(NUMBERS))]
DIALOGUES = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    """The rows of a data set, from its columns."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
