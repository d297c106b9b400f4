"""Folders and files that one process at a time writes to."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["LOCK", "InUse", "empty_folder", "entries", "holding"]

LOCK = ".hpd.lock"
"""Says in a folder which process writes there; gone when that process is done."""

# Locks of this process: file and thread -> descriptor.
_held: dict[tuple[Path, int], int] = {}


class InUse(ValueError):
    """Another process writes there."""


@contextlib.contextmanager
def holding(target: Path, *, is_folder: bool = True, patience: float = 0.0) -> Iterator[None]:
    """Be the only process that writes to a folder or file inside this context.

    Drafts of `hpd.files.write_atomically` that are there are of a process that was killed, and go.

    The system's lock on a small file decides (`flock`), so a process that was killed holds nothing. The file
    also names the process, for messages, and where the lock cannot decide: a file system without locks, or
    one whose locks end at the machine. Inside itself, in the same thread, it does nothing; the processes of
    one launch (RANK) are one, which the first of them stands for.

    Args:
        target: what is written; a folder is made if it is missing, and removed if it is left empty.
        is_folder: the lock is in `target`, else beside it.
        patience: seconds in which another process there may end.

    Raises:
        InUse: names the process, and how to free what a lost machine held; nothing was changed.
        OSError: the lock cannot be written.
    """
    file = Path(os.path.realpath(target / LOCK if is_folder else target.with_name(f".{target.name}{LOCK}")))
    mine = (file, threading.get_ident())
    if mine in _held or int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _held[mine] = _lock_within(file, target, patience)
        except OSError as error:
            raise OSError(
                f"{target} cannot be written: {error.strerror}. Make it writable, make space, or choose "
                "another place."
            ) from error
        try:
            _remove_drafts(target, is_folder)
            yield
        finally:
            handle = _held.pop(mine, None)  # None in a forked child
            if handle is not None:
                with contextlib.suppress(OSError):  # the disk may have become read-only
                    if _is_at(handle, file):
                        file.unlink()
                os.close(handle)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def entries(folder: Path) -> list[Path]:
    """What is in a folder, beside its lock; nothing, where there is no folder."""
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def empty_folder(folder: Path) -> None:
    """Delete what is in a folder, beside its lock."""
    for path in entries(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_drafts(target: Path, is_folder: bool) -> None:
    folder, name = (target, "") if is_folder else (target.parent, re.escape(target.name))
    for path in folder.glob(".*.part"):
        if re.fullmatch(rf"\.{name}.*\.\d+\.part", path.name) and not path.is_dir():
            with contextlib.suppress(OSError):  # a disk that is read-only
                path.unlink()


def _lock_within(file: Path, target: Path, patience: float) -> int:
    end = time.monotonic() + patience
    while True:
        try:
            return _lock(file, target)
        except InUse:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


def _lock(file: Path, target: Path) -> int:
    """A descriptor of the locked file, which names this process now."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_held = not _is_locked(handle)
            if _is_at(handle, file):  # else its holder removed it when it was done
                _require_free(_read_note(handle), is_held, file, target)
                note = json.dumps(_note()).encode()
                with contextlib.suppress(OSError):  # a full disk; the lock itself needs no space
                    os.ftruncate(handle, os.pwrite(handle, note, 0))
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_locked(handle: int) -> bool:
    """Lock an open file; False if another has it. True too where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _require_free(note: dict[str, Any], is_held: bool, file: Path, target: Path) -> None:
    """Raise InUse unless the process that a lock file names has ended."""
    has_ended = _has_ended(note)
    if has_ended and not is_held:
        return
    who = f"process {note.get('pid')} on {note.get('host')}" if note else "another process"
    since = f" since {note['since']}" if note.get("since") else ""
    if is_held or has_ended is False:
        then = f"Wait until it ends, end it (kill {note.get('pid', 'PID')}), or choose another place."
    else:
        then = f"This machine cannot tell whether it still does: if it has ended, delete {file}."
    raise InUse(f"{target} is in use: {who} has been writing there{since}. {then} Nothing was changed here.")


def _has_ended(note: dict[str, Any]) -> bool | None:
    """True if the process of a note is gone; None: it is on another machine."""
    if not note:
        return True
    here = _note()
    is_same_host = note.get("host") == here["host"]
    # Containers have host names of their own and share a system.
    boots = note.get("boot"), here["boot"]
    if boots[0] == boots[1] if None not in boots else is_same_host:
        return not _lives(note)
    if is_same_host:
        return True  # the machine was started again
    # A job that SLURM started again elsewhere: it has ended the first one.
    is_requeued = note.get("job") is not None and note["job"] == here["job"]
    return True if is_requeued and note.get("restarts") != here["restarts"] else None


def _note() -> dict[str, Any]:
    """Names this process among those of all machines."""
    boot = _text_of(Path("/proc/sys/kernel/random/boot_id"))
    return {
        "host": socket.gethostname(),
        "boot": boot and boot.strip(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _read_note(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 2**12, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lives(note: dict[str, Any]) -> bool:
    """True if the process of a note is there, and not another that got its number."""
    pid = note.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is another user's
    return _start_of(pid) == note.get("started")


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since the system did; None where there is no /proc."""
    stat = _text_of(Path(f"/proc/{pid}/stat"))
    # The 22nd field; the command's name, the second, may hold anything.
    return None if stat is None else stat.rpartition(")")[2].split()[19]


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _let_go() -> None:
    """In a forked child: its copies of the descriptors would keep the locks of a parent that is gone."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
