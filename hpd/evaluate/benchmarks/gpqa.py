"""GPQA: four options in a seeded order. The data are your own file: their authors ask that they not be shown
in plain text."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from hpd.evaluate.benchmarks.choices import chosen_letter
from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.task import Example, Verdict
from hpd.generation.texts import Answer

__all__ = ["Gpqa", "chosen_letter"]

_LETTERS = "ABCD"

_CORRECT, _WRONG = "Correct Answer", ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

_INSTRUCTION = r"Please reason step by step, and put the letter of the right option within \boxed{}."


class Gpqa:
    """Multiple choice (Rein et al. 2023); the answer is a letter.

    Args:
        data: a file with the columns of the authors' (Question, Correct Answer, Incorrect Answer 1 to 3), or
            the Hub data set.
        limit: first n problems only.
        shuffle_seed: of the options' order, which differs from problem to problem.
    """

    name = "gpqa"
    metric = "accuracy"

    def __init__(self, data: Data, *, limit: int | None = None, shuffle_seed: int = 0):
        rows = read_rows(data)
        missing = [
            column for column in ("Question", _CORRECT, *_WRONG) if not all(row.get(column) for row in rows)
        ]
        if missing:
            raise ValueError(
                f"{data} lacks {', '.join(missing)} in some rows; GPQA's columns are Question, {_CORRECT}, "
                f"{', '.join(_WRONG)}."
            )
        self.options: Mapping[str, Any] = {"data": str(data), "limit": limit, "shuffle_seed": shuffle_seed}
        self.defaults: Mapping[str, Any] = {"max_new_tokens": 8192, "system_prompt": _INSTRUCTION}
        self._examples = [_example(index, row, shuffle_seed) for index, row in enumerate(rows[:limit])]

    def examples(self) -> Sequence[Example]:
        return self._examples

    def same(self, first: str, second: str) -> bool:
        return first == second

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        letters = [chosen_letter(answer.text) for answer in answers]
        return [
            Verdict(correct=letter == example.answer, extracted=letter)
            for example, letter in zip(examples, letters, strict=True)
        ]


def _example(index: int, row: Row, seed: int) -> Example:
    texts = [str(row[column]).strip() for column in (_CORRECT, *_WRONG)]
    order = list(range(len(texts)))
    random.Random(f"{seed}/{index}").shuffle(order)
    lines = [f"{letter}) {texts[position]}" for letter, position in zip(_LETTERS, order, strict=True)]
    return Example(
        id=str(row.get("Record ID", index)),
        prompt="\n".join([str(row["Question"]).strip(), "", *lines]),
        answer=_LETTERS[order.index(0)],
        solution=str(row.get("Explanation") or texts[0]),
        metadata=row,
    )
