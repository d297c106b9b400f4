"""The interface through which a long job tells its caller how far it is."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:  # `hpd report` does without the seconds that transformers takes to import
    from transformers import TrainerCallback

__all__ = ["Advance", "Bar", "Progress", "drop_lost_output", "quiet_libraries", "saying_warnings"]

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


class _Saying(logging.Handler):
    """Says each warning once, in one line."""

    def __init__(self, progress: Progress, known: Sequence[str]):
        super().__init__(logging.WARNING)
        self._progress, self._known = progress, known
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"^\[RANK \d+\] ", "", " ".join(record.getMessage().split()))
        if text not in self._said and not text.startswith(tuple(self._known)):
            self._said.add(text)
            self._progress.say(f"warning, {record.name.partition('.')[0]}: {text}")


@contextlib.contextmanager
def saying_warnings(progress: Progress, known: Sequence[str] = ()) -> Iterator[None]:
    """Pass on what TRL and transformers warn of, which `quiet_libraries` keeps off the display.

    Args:
        progress: told each warning, once.
        known: beginnings of warnings that were said in other words.
    """
    handler = _Saying(progress, known)
    before = []
    for name in ("trl", "transformers"):
        logger = logging.getLogger(name)
        before.append((logger, logger.level, logger.propagate, logger.handlers[:]))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def drop_lost_output() -> None:
    """Send standard output and error nowhere, where their terminal was closed or nobody reads their pipe: a
    long job does not end because it is not watched any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    lost = [descriptor for descriptor, _ in poll.poll(0)]  # errors and hang-ups are always told
    if lost:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in lost:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def quiet_libraries() -> None:
    """Turn off libraries' own display; `saying_warnings` passes on what they warn of."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at each product of each layer
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
