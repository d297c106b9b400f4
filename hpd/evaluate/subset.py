"""Some problems of a task, drawn at random."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from hpd.evaluate.task import Answer, Comparable, Example, Summary, Task, Verdict

__all__ = ["Subset"]


class Subset:
    """`count` problems of a task, drawn with a seed and kept in the task's order.

    Raises:
        ValueError: count outside [1, problems]; a task whose figures are of all its problems together.
    """

    def __init__(self, task: Task, count: int, seed: int):
        examples = task.examples()
        if not 1 <= count <= len(examples):
            raise ValueError(f"limit must be between 1 and the {len(examples)} problems of {task.name!r}, got {count}.")
        if isinstance(task, Summary):
            raise ValueError(f"{task.name!r} sums up its problems in their order: use limit without limit_seed.")
        self._task = task
        self._examples = [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]
        self.name, self.metric, self.defaults = task.name, task.metric, task.defaults
        self.options: Mapping[str, Any] = {**task.options, "limit": count, "limit_seed": seed}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def same(self, first: str, second: str) -> bool:
        return self._task.same(first, second) if isinstance(self._task, Comparable) else first == second

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Sequence[Verdict]:
        return self._task.grade(examples, answers)
