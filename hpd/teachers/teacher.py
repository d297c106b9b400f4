"""The teacher's interface: one base class with defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from hpd.batch import TokenBatch
from hpd.losses import TeacherScores
from hpd.methods.terms import Term, TermConfig
from hpd.models.pairing import CheckResult

__all__ = ["RemoteTeacher", "RoutedScores", "Teacher"]


class RoutedScores(NamedTuple):
    """The answers of several teachers, each for its own positions of a batch."""

    parts: tuple[tuple[Int[Tensor, "n"], TeacherScores], ...]
    """(positions among the batch's label positions, their teacher's answer about them); at least one."""


class Teacher:
    """Anything that can score the label positions of a batch: `scores` is all that a teacher must have.

    The order of calls: `vocab` is read, then `prepare` and `register_rows` once; for each batch `ask`, `wait`
    and `scores`; after each optimizer step `follow`.
    """

    vocab: int | None = None
    """Tokens of the teacher's vocabulary; None for a teacher that has the student's."""
    model: Any = None
    """The live model, where there is one beside the student: rollouts can mix it in."""
    asks_ahead: bool = False
    """True if `ask` begins something: it runs where batches are collated, one batch ahead of the step."""
    reads_as_student: bool = False
    """True if the teacher is the student's own model, which reads whatever the student does."""
    may_fail: bool = False
    """True if answers may fail to come: all processes wait for them together, at the start of a step."""
    remote: bool = False
    """True if a loader's workers cannot ask, which have no connection."""
    drawn: bool = False
    """True if answers are tokens drawn from its distribution: what is not linear in it cannot be measured."""
    follows: bool = False
    """True if the teacher moves as the student does: checkpoints then hold its `state_dict`."""

    def check_terms(self, terms: Sequence[Term | TermConfig]) -> None:
        """Raise ValueError where the loss reads what the teacher cannot tell; called before training."""

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        """Place the teacher like the student."""

    def probe(self, packed: bool) -> list[CheckResult]:
        """Try a few tokens on the teacher's models, and packed rows where training packs them.

        Called once, beside `prepare`: before it where that shards models, after it elsewhere.
        """
        return []

    def register_rows(self, rows: Iterable[tuple[Mapping[str, Any], Tensor]]) -> None:
        """See every row of the datasets with the keys of its label positions, once."""

    def ask(self, inputs: Mapping[str, Any], batch: TokenBatch) -> Any:
        """Begin to answer about a collated batch, and return at once.

        The handle that is returned becomes `inputs["asked"]`, which `scores` reads.
        """
        return None

    def wait(self, handle: Any) -> None:
        """Return when the answer behind a handle of `ask` is there.

        Raises:
            TeacherUnavailable: it does not come.
        """

    def follow(self) -> None:
        """Move after the student, each time that its optimizer has made a step."""

    def state_dict(self) -> dict[str, Any]:
        """This process's part of what has moved, by name; a checkpoint holds it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores | RoutedScores:
        """Hidden states and head at the label positions, or the likeliest tokens there; no gradient.

        A live teacher reads `inputs` at `batch.index`; one that remembers looks `batch.keys` up. Where
        `inputs` hold no handle of `ask`, it was not called.
        """
        raise NotImplementedError


class RemoteTeacher(Teacher):
    """A teacher that takes its time and can fail: asked early, waited for at the start of a step."""

    asks_ahead = True
    may_fail = True
    remote = True
