"""SIGTERM and Ctrl-C: what was done is saved, and the program says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol

__all__ = ["Interrupted", "Signals", "catch_signals"]


class _Stoppable(Protocol):
    def stop_cleanly(self, reason: str) -> None: ...


class Interrupted(KeyboardInterrupt):
    """A signal arrived where nothing runs that could be stopped cleanly: loading, and evaluation outside training."""


class Signals:
    """The handler. While a trainer trains it is told to stop; elsewhere the signal is raised as `Interrupted`."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._trainer: _Stoppable | None = None
        self._received: str | None = None

    @contextlib.contextmanager
    def stopping(self, trainer: _Stoppable) -> Iterator[None]:
        """Tell `trainer` to stop, instead of raising, inside this context."""
        self._trainer = trainer
        try:
            yield
        finally:
            self._trainer = None

    def handle(self, number: int, frame: Any) -> None:
        """A second signal ends the program at once; checkpoints are then as after a kill."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # A forked helper (a loader's worker, a grader) inherits the handler; Ctrl-C reaches it too, and it is still needed.
        forked = os.getpid() != self._process
        if forked and number == signal.SIGINT:
            return
        if forked or self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = name
        if self._trainer is None:
            raise Interrupted(f"{name}.")
        self._trainer.stop_cleanly(f"{name}.")
        # Not print: the handler may have interrupted one.
        os.write(2, f"\n{name}: saving after this step; once more ends at once\n".encode())


@contextlib.contextmanager
def catch_signals() -> Iterator[Signals]:
    """Handle SIGTERM and SIGINT inside this context, if it runs in the main thread; others cannot."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            # None: not installed from Python, and so not to be had back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
