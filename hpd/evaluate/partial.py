"""Answers of an unfinished evaluation, kept so that it can go on."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpd.evaluate.task import Answer

__all__ = ["PartialAnswers"]


class PartialAnswers:
    """A JSON Lines file: what the evaluation is, then one line per finished batch.

    A file of another evaluation (another model, other weights, prompts or settings) is started anew; a last line that a kill
    cut short is dropped.

    Args:
        path: the file; made with the first batch.
        identity: everything that decides the answers, as JSON values.
    """

    def __init__(self, path: Path, identity: Any):
        self.path = path
        self._identity = json.loads(json.dumps(identity))
        self._batches: dict[int, tuple[list[Answer], float]] = {}
        self._kept: list[Any] | None = self._read()

    def __len__(self) -> int:
        """Answers that need not be generated again."""
        return sum(len(answers) for answers, _ in self._batches.values())

    def batch(self, number: int) -> tuple[list[Answer], float] | None:
        """Answers and seconds of a finished batch; None where it is not finished."""
        return self._batches.get(number)

    def append(self, number: int, answers: Sequence[Answer], seconds: float) -> None:
        if self._kept is not None:
            # Written anew in any case: a line that was cut short would swallow the next one.
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._kept)
            self.path.write_text(text, encoding="utf-8")
            self._kept = None
        line = {"batch": number, "seconds": seconds, "answers": [asdict(answer) for answer in answers]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[Any]:
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else []
        kept: list[Any] = [self._identity]
        for position, text in enumerate(lines):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if position == 0:
                if line != self._identity:
                    break
                continue
            answers = [Answer(**{**answer, "turns": tuple(answer["turns"])}) for answer in line["answers"]]
            self._batches[line["batch"]] = answers, line["seconds"]
            kept.append(line)
        return kept
