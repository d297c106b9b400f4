"""The end of a run before its last step: whatever stopped it, its user learns what is kept and how to go
on."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import distributed
from transformers import Trainer

from hpd.progress import drop_lost_output
from hpd.teachers import TeacherUnavailable
from hpd.training.checkpoints import CheckpointFailed, newest_complete
from hpd.training.nonfinite import NonFinite

__all__ = [
    "Interrupted",
    "RunStopped",
    "Signals",
    "catch_signals",
    "ends_kept",
    "ends_resumable",
    "ends_with_program",
    "leaving_processes",
    "stopped",
]

# A disk that takes no more, or nothing at all.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


_NAMES: dict[int, str] = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "SIGHUP (the terminal was closed)",
    signal.SIGUSR1: "SIGUSR1",
}
"""Signals that save and stop. SLURM sends SIGUSR1 as a warning (--signal=USR1@120)."""


class RunStopped(RuntimeError):
    """A run, or another long job, ended before its last step, in a state that it can go on from.

    Args:
        message: why, and what is kept.
        overrides: what the command needs besides, or it would stop there again.
    """

    def __init__(self, message: str, overrides: tuple[str, ...] = ()):
        super().__init__(message)
        self.overrides = overrides


def stopped(reason: str, job: str, kept: str | None, overrides: tuple[str, ...] = ()) -> RunStopped:
    """The error for a job that was stopped for a reason.

    Args:
        reason: a sentence.
        job: what stopped, such as Training.
        kept: what can be gone on from, and where it is; None: nothing yet.
        overrides: as for `RunStopped`.
    """
    same = f"the same command with {' '.join(overrides)}" if overrides else "the same command"
    how = "resumes from there" if kept else "starts again"
    state = kept or "there is nothing to resume from yet"
    return RunStopped(f"{reason} {job} stopped: {state}, and {same} {how}.", overrides)


def _kept_by(run: Path) -> str | None:
    newest = newest_complete(run)
    if newest is not None:
        return f"the checkpoint of step {newest.name.removeprefix('checkpoint-')} is in {run}"
    finished = [path.parent.name for path in sorted(run.glob("*/summary.json"))]
    return f"the finished stages ({', '.join(finished)}) are in {run}" if finished else None


@contextlib.contextmanager
def ends_resumable(run: Path) -> Iterator[Signals]:
    """Signals, a full disk, a teacher that stays away and NaN end what is in this context as `RunStopped`.

    Raises:
        RunStopped: says what is kept, and what goes on from there.
    """
    try:
        with ends_kept(run, "Training", lambda: _kept_by(run)) as signals:
            yield signals
    except NonFinite as error:
        raise stopped(str(error), "Training", _kept_by(run), ("guards.non_finite=skip",)) from error
    except TeacherUnavailable as error:
        raise stopped(str(error), "Training", _kept_by(run)) from error


@contextlib.contextmanager
def ends_kept(place: Path, job: str, kept: Callable[[], str | None]) -> Iterator[Signals]:
    """Signals and a full disk end what is in this context, a job that keeps what it has done, as
    `RunStopped`.

    Args:
        place: where the job writes.
        job, kept: as for `stopped`.
    """
    try:
        with catch_signals() as signals:
            yield signals
    except (CheckpointFailed, Interrupted) as error:
        raise stopped(str(error), job, kept()) from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        reason = f"{error.filename or place} could not be written: {error.strerror}."
        raise stopped(reason, job, kept()) from error


@contextlib.contextmanager
def leaving_processes() -> Iterator[None]:
    """End the group of processes behind a program's last collective operation, on errors too.

    A thread of gloo lets go of the last operation's tensors whenever it is scheduled next, and needs the
    interpreter for that. Where the interpreter has ended before, the process aborts ("terminate called
    without an active exception", SIGABRT), which fails the whole launch. A group waits for its threads when
    nothing refers to it any more: a trainer does, through DDP, and lives in cycles and an error's frames.
    """
    try:
        yield
    except BaseException as error:
        _let_go_of_frames(error)
        raise
    finally:
        _end_processes()


_TRAINERS: weakref.WeakSet[Trainer] = weakref.WeakSet()


def ends_with_program(trainer: Trainer) -> None:
    """Have the program's end, whatever it is, do for this trainer what `leaving_processes` does: scripts keep
    their trainer in a global variable."""
    _TRAINERS.add(trainer)
    atexit.unregister(_end_program)
    atexit.register(_end_program, os.getpid())


def _end_program(process: int) -> None:
    # A forked helper has none of the threads. NCCL has no such thread, and may wait here for a process that
    # an error keeps from its next operation.
    here = os.getpid() == process and distributed.is_available() and distributed.is_initialized()
    if here and distributed.get_backend() == "gloo":
        _let_go_of_frames(getattr(sys, "last_value", None))
        _end_processes()


def _let_go_of_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _end_processes() -> None:
    if distributed.is_available() and distributed.is_initialized():
        for trainer in tuple(_TRAINERS):
            trainer.accelerator.free_memory()
            trainer.model_wrapped = trainer.model
        gc.collect()
        distributed.destroy_process_group()


class _Stoppable(Protocol):
    def stop_cleanly(self, reason: str) -> None: ...


class Interrupted(KeyboardInterrupt):
    """A signal arrived where nothing runs that could be stopped cleanly: loading, and evaluation outside
    training."""


class Signals:
    """The handler. While a trainer trains it is told to stop; elsewhere the signal is raised as
    `Interrupted`."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._trainer: _Stoppable | None = None
        self._received: str | None = None
        self._urged = False

    @contextlib.contextmanager
    def stopping(self, trainer: _Stoppable) -> Iterator[None]:
        """Tell `trainer` to stop, instead of raising, inside this context.

        A signal that came before and whose `Interrupted` was swallowed (Python only prints what is raised in
        a finalizer or in a callback from C) stops it at once.
        """
        self._trainer = trainer
        if self._received is not None:
            trainer.stop_cleanly(self._received)
        try:
            yield
        finally:
            self._trainer = None

    def handle(self, number: int, frame: Any) -> None:
        """A second SIGTERM or Ctrl-C ends the program at once; checkpoints are then as after a kill."""
        # A forked helper (a loader's worker, a grader) inherits the handler. What a terminal or SLURM sends
        # to all processes reaches it too, and it is still needed.
        forked = os.getpid() != self._process
        if forked and number != signal.SIGTERM:
            return
        urgent = number in (signal.SIGTERM, signal.SIGINT)
        if forked or (urgent and self._urged):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._urged |= urgent
        if number == signal.SIGHUP:
            drop_lost_output()
        if self._received is not None:
            return  # a shell and the system both tell of a closed terminal; SIGTERM follows SLURM's warning
        name = _NAMES[number]
        self._received = f"{name}."
        if self._trainer is None:
            raise Interrupted(self._received)
        self._trainer.stop_cleanly(self._received)
        with contextlib.suppress(OSError):
            # Not print: the handler may have interrupted one.
            os.write(
                2, f"\n{name}: saving after this step; SIGTERM or Ctrl-C once more ends at once\n".encode()
            )


@contextlib.contextmanager
def catch_signals() -> Iterator[Signals]:
    """Handle SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 inside this context, if it runs in the main thread; others
    cannot. A SIGHUP that the program was started to ignore (nohup) stays ignored."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [number for number in _NAMES if not _is_ignored(number)]
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            # None: not installed from Python, and so not available.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_ignored(number: int) -> bool:
    return number in (signal.SIGHUP, signal.SIGUSR1) and signal.getsignal(number) is signal.SIG_IGN
