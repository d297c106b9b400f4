"""A task of one's own: named in `hpd eval --tasks` or a recipe's `eval` as "reversal:Reversal"."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hpd.evaluate import Answer, Example, Verdict


class Reversal:
    """Words to be written backwards. A text is right if its first word is; half right if it has the letters.

    Args:
        data: a file of words, {"word": "step"} on each line.
        limit: first n words; None is all.
    """

    name = "reversal"
    metric = "letters"
    defaults: ClassVar = {"max_new_tokens": 8}

    def __init__(self, data: str | Path, *, limit: int | None = None) -> None:
        words = [json.loads(line)["word"] for line in Path(data).read_text("utf-8").splitlines()][:limit]
        # What decides the examples and the grades: an evaluation goes on only where it is equal.
        self.options = {"data": str(data), "limit": limit}
        self._examples = [
            Example(id=str(number), prompt=f"{word} backwards:", answer=word[::-1])
            for number, word in enumerate(words)
        ]

    def examples(self) -> Sequence[Example]:
        return self._examples

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        return [
            self._verdict(example, answer.text) for example, answer in zip(examples, answers, strict=True)
        ]

    def _verdict(self, example: Example, text: str) -> Verdict:
        word = next(iter(text.split()), None)
        right = word == example.answer
        has_letters = word is not None and sorted(word) == sorted(example.answer)
        return Verdict(correct=right, extracted=word, score=1.0 if right else 0.5 * has_letters)
