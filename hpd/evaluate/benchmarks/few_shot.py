"""Few-shot prompts: worked examples before the question, as plain text, for models that follow no
instructions."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from hpd.evaluate.task import Comparable, Example, Summary, Task, Verdict
from hpd.generation.texts import Answer

__all__ = ["FewShot", "Subset"]


class FewShot:
    """A task whose prompts begin with solved problems.

    The prompt is ``Question: ...\\nAnswer: ...`` for each of them and for the question, without its answer;
    the model stops where it would write the next question.

    Args:
        task: what is asked and graded.
        shots: a task whose examples have solutions: the training file of the same benchmark.
        count: solved problems per prompt, >= 1.
        seed: which ones; the same for every question.

    Raises:
        ValueError: fewer shots than `count`; prompts that are chats.
    """

    def __init__(self, task: Task, shots: Task, count: int, seed: int = 0):
        available = list(shots.examples())
        if not 1 <= count <= len(available):
            raise ValueError(
                f"few_shot must be between 1 and the {len(available)} examples of its data, got {count}."
            )
        self._task = task
        self._shots = random.Random(seed).sample(available, count)
        chats = [
            example for example in (*task.examples(), *self._shots) if not isinstance(example.prompt, str)
        ]
        if isinstance(task, Summary):
            raise ValueError(
                f"few-shot prompts are for tasks that are graded answer by answer; {task.name!r} is not."
            )
        if chats or any(example.follow_ups for example in task.examples()):
            raise ValueError(f"few-shot prompts are plain text; {task.name!r} asks in chats.")
        self.name = task.name
        self.metric = task.metric
        self.options: Mapping[str, Any] = {
            **task.options,
            "few_shot": count,
            "few_shot_seed": seed,
            "few_shot_data": shots.options.get("data"),
        }
        self.defaults: Mapping[str, Any] = {
            **{key: value for key, value in task.defaults.items() if key != "system_prompt"},
            "chat_template": "never",
            "stop": (*task.defaults.get("stop", ()), "\nQuestion:"),
        }

    def examples(self) -> list[Example]:
        head = "".join(
            f"Question: {shot.prompt}\nAnswer: {shot.solution or shot.answer}\n\n" for shot in self._shots
        )
        return [
            Example(
                id=example.id,
                prompt=f"{head}Question: {example.prompt}\nAnswer:",
                answer=example.answer,
                solution=example.solution,
                metadata=example.metadata,
            )
            for example in self._task.examples()
        ]

    def same(self, first: str, second: str) -> bool:
        return self._task.same(first, second) if isinstance(self._task, Comparable) else first == second

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Sequence[Verdict]:
        return self._task.grade(examples, answers)


class Subset:
    """`count` problems of a task, drawn with a seed and kept in the task's order.

    Raises:
        ValueError: count outside [1, problems]; a task whose figures are of all its problems together.
    """

    def __init__(self, task: Task, count: int, seed: int):
        examples = task.examples()
        if not 1 <= count <= len(examples):
            raise ValueError(
                f"limit must be between 1 and the {len(examples)} problems of {task.name!r}, got {count}."
            )
        if isinstance(task, Summary):
            raise ValueError(
                f"{task.name!r} sums up its problems in their order: use limit without limit_seed."
            )
        self._task = task
        self._examples = [
            examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))
        ]
        self.name = task.name
        self.metric = task.metric
        self.defaults = task.defaults
        self.options: Mapping[str, Any] = {**task.options, "limit": count, "limit_seed": seed}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def same(self, first: str, second: str) -> bool:
        return self._task.same(first, second) if isinstance(self._task, Comparable) else first == second

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Sequence[Verdict]:
        return self._task.grade(examples, answers)
