"""How a run ends before its end: whatever stopped it, its user learns what is kept and how to go on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from hpd.checkpoints import CheckpointFailed, newest_complete
from hpd.interrupts import Interrupted, Signals, catch_signals
from hpd.nonfinite import NonFinite
from hpd.teachers import TeacherUnavailable

__all__ = ["RunStopped", "ends_resumable", "stopped"]

# A disk that takes no more, or nothing at all.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RunStopped(RuntimeError):
    """The run ended before its last step, in a state that it can go on from.

    Args:
        message: why, and what is kept.
        overrides: what the command needs besides, or it would stop there again.
    """

    def __init__(self, message: str, overrides: tuple[str, ...] = ()):
        super().__init__(message)
        self.overrides = overrides


def stopped(reason: str, run: Path, overrides: tuple[str, ...] = ()) -> RunStopped:
    """The error for a run that was stopped for a reason."""
    kept = newest_complete(run)
    what = (
        f"the checkpoint of step {kept.name.removeprefix('checkpoint-')} is in {run}" if kept else "there is no checkpoint yet"
    )
    how = "goes on from there" if kept else "starts again"
    same = f"the same command with {' '.join(overrides)}" if overrides else "the same command"
    return RunStopped(f"{reason} Training stopped: {what}, and {same} {how}.", overrides)


@contextlib.contextmanager
def ends_resumable(run: Path) -> Iterator[Signals]:
    """Signals, a full disk, a teacher that stays away and NaN end what is in this context as `RunStopped`.

    Raises:
        RunStopped: says what is kept, and what goes on from there.
    """
    try:
        with catch_signals() as signals:
            yield signals
    except NonFinite as error:
        raise stopped(str(error), run, ("guards.non_finite=skip",)) from error
    except (CheckpointFailed, TeacherUnavailable, Interrupted) as error:
        raise stopped(str(error), run) from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise stopped(f"{error.filename or run} could not be written: {error.strerror}.", run) from error
