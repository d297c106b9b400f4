"""Old rollouts, kept with their age: a buffer that a checkpoint can hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hpd.prefixes import ReplayConfig

__all__ = ["ReplayBuffer", "Stored"]


class Stored(NamedTuple):
    """A row that the student wrote."""

    row: dict[str, list[Any]]
    """As the collator takes it."""
    step: int
    """The optimiser step whose weights wrote it."""


class ReplayBuffer:
    """First in, first out; rows that are too old leave before they are drawn.

    Args:
        config: capacity and staleness limit.
    """

    def __init__(self, config: ReplayConfig):
        self._config = config
        self._stored: deque[Stored] = deque(maxlen=config.capacity)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def full(self) -> bool:
        """Whether the next row pushes the oldest one out."""
        return len(self._stored) == self._config.capacity

    def add(self, rows: Iterable[Mapping[str, list[Any]]], step: int) -> None:
        """Keep rows that the weights of `step` wrote."""
        self._stored.extend(Stored(dict(row), step) for row in rows)

    def expire(self, step: int) -> int:
        """Drop what is too old at `step`; returns how many rows that were."""
        limit, before = self._config.max_age_steps, len(self._stored)
        while limit is not None and self._stored and step - self._stored[0].step > limit:
            self._stored.popleft()
        return before - len(self._stored)

    def draw(self, uniform: float) -> Stored:
        """The row at a place in [0, 1) of the buffer; the row stays.

        Raises:
            IndexError: the buffer is empty.
        """
        return self._stored[int(uniform * len(self._stored))]

    def state_dict(self) -> list[tuple[dict[str, list[Any]], int]]:
        """What a checkpoint must hold."""
        return [(stored.row, stored.step) for stored in self._stored]

    def load_state_dict(self, state: Iterable[tuple[dict[str, list[Any]], int]]) -> None:
        """Go on where `state_dict` was taken."""
        self._stored = deque((Stored(row, step) for row, step in state), maxlen=self._config.capacity)
