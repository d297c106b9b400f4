"""Parts of an evaluation: examples, a model's answers, verdicts, and the task that ties them
together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hpd.generation.texts import Answer, Prompt


class CannotGrade(ValueError):
    """A task cannot be graded at all: no verdict of a single answer is to blame."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One problem with its reference answer."""

    id: str
    prompt: Prompt
    """Plain text, or chat messages that end with the user's turn."""
    answer: str = ""
    """The reference, for people who read the records; what else `Task.grade` needs is in `metadata`."""
    solution: str = ""
    """The reference with its working, where the data have it: what few-shot prompts show."""
    follow_ups: tuple[str, ...] = ()
    """Further user turns, each sent after the model's reply to the one before (MT-Bench)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row as the data file holds it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The grade of one answer."""

    correct: bool | None
    """None: no right or wrong (a score alone), or ungraded (a judge that said nothing readable)."""
    extracted: str | None = None
    """The part of the answer that was graded; None where none was found."""
    score: float | None = None
    """The value that is averaged; None: 1 for correct, 0 for wrong, ungraded where `correct` is None too."""
    detail: str = ""
    """Why: an error message, a judge's text, ..."""

    @property
    def value(self) -> float | None:
        """The number that is averaged; None: ungraded, counted as such and never averaged."""
        if self.score is not None:
            return self.score
        return None if self.correct is None else float(self.correct)


@runtime_checkable
class Task(Protocol):
    """A benchmark: its examples, its grader and its identity."""

    @property
    def name(self) -> str:
        """The task's key in `hpd.evaluate.tasks.TASKS`; part of file names."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Everything else that decides the examples and the grades, as JSON values."""
        ...

    @property
    def metric(self) -> str:
        """Name of the mean of `Verdict.value`: accuracy, rouge_l, win_rate, ... A share in [0, 1], except
        that the values of a metric whose name ends in ``score`` are what they are."""
        ...

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Fields of `GenerationSettings` that this benchmark's protocol sets; what the user sets goes before
        them."""
        ...

    def examples(self) -> Sequence[Example]: ...

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Sequence[Verdict]:
        """Verdicts of all answers at once, in their order. An example appears once per sample.

        Raises:
            CannotGrade: nothing can be graded. After any other error the answers are graded one at a time,
                and those that it comes from are wrong.
        """
        ...


@runtime_checkable
class Summary(Protocol):
    """A task with figures beyond the mean of its verdicts, such as a length-controlled win rate."""

    def summary(
        self, examples: Sequence[Example], answers: Sequence[Answer], verdicts: Sequence[Verdict]
    ) -> Mapping[str, float]: ...


@runtime_checkable
class Comparable(Protocol):
    """A task whose extracted answers can be compared with each other, so that samples can vote (maj@n)."""

    def same(self, first: str, second: str) -> bool: ...


@runtime_checkable
class Notice(Protocol):
    """A task with something to say before it starts, such as what a judge will cost."""

    def notice(self, num_samples: int) -> str: ...
