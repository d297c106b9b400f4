"""The interface through which a long job tells its caller how far it is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:  # `hpd report` does without the seconds that transformers takes to import
    from transformers import TrainerCallback

__all__ = ["Advance", "Bar", "Progress", "quiet_libraries"]

Advance: TypeAlias = Callable[[int, int], None]
"""Called with (done, total) as a job proceeds."""


class Bar(Protocol):
    """One row of a display."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`, with a note beside; its further lines, if any, below."""
        ...


class Progress:
    """Shows how far a long job is; silent unless overridden."""

    def say(self, text: str) -> None:
        """Show a line of text."""

    def bar(self, name: str) -> Bar:
        """Start a bar; it ends when `done` reaches `total`."""
        return _ignore

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Callbacks for the trainer of a run."""
        return ()


def _ignore(done: int, total: int, note: str = "") -> None: ...


def quiet_libraries() -> None:
    """Turn off libraries' notices that a user of the command line cannot act on."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
