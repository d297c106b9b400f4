"""Files that are whole or not there, JSON Lines that a later process goes on with, digests, and places that
one process at a time writes to."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

__all__ = [
    "LOCK",
    "InUse",
    "JsonLines",
    "checksum_file",
    "checksum_json",
    "checksum_samples",
    "digest_json",
    "digest_text",
    "digest_tree",
    "empty_folder",
    "entries",
    "flush",
    "holding",
    "write_atomically",
    "write_json",
]


def write_atomically(path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Make a file appear under its name whole and on the disk, or not at all.

    Content and folder are flushed to the disk, so neither a kill nor a power failure leaves a part. A kill
    may leave a draft, `.NAME.PID.part`; an error does not.

    Args:
        path: the file; its folder must exist.
        content: text (written as UTF-8), bytes, or a function that writes the file at the path that it gets.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        if callable(content):
            content(draft)
        else:
            draft.write_bytes(content.encode() if isinstance(content, str) else content)
        # safetensors leaves its files to their owner alone; the umask says who may read.
        os.chmod(draft, mode)
        flush(draft)
        os.replace(draft, path)
    except Exception:
        draft.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file with `write_atomically`."""
    write_atomically(path, _encoded(content, indent=indent) + b"\n")


def flush(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class JsonLines:
    """A file of JSON values, one a line, that a later process goes on with.

    A line counts when all of it is there. One that a kill cut short is left out by `read` and closed by the
    next `append`, so that it swallows nothing. Several processes may append to one file.

    Args:
        path: the file; its folder must exist before anything is written.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Any]:
        """Values of the whole lines; none where there is no file."""
        values = []
        # Split at line feeds only: JSON leaves other line separators inside texts as they are.
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                values += [json.loads(line)] if line else []
            except ValueError:
                continue
        return values

    def append(self, value: Any, *, durable: bool = False) -> None:
        """Add a line. It survives a kill of the process; a power failure too, where it is `durable`."""
        with self.path.open("a+b") as file:
            file.write((b"" if _ends_line(file) else b"\n") + _line(value))
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def write(self, values: Iterable[Any]) -> None:
        """Replace the file with these lines, atomically."""
        write_atomically(self.path, b"".join(map(_line, values)))


def _line(value: Any) -> bytes:
    return _encoded(value) + b"\n"


def _encoded(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; half of a surrogate pair, which UTF-8 lacks, is escaped with all that is no ASCII."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode()


def _ends_line(file: IO[bytes]) -> bool:
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def digest_text(text: str) -> str:
    """SHA-256 of a text, as hex digits: the identity of what it describes."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def digest_json(content: Any, *, ensure_ascii: bool = True) -> str:
    """SHA-256 of a JSON value, the same for any order of keys.

    Args:
        ensure_ascii: as for `json.dumps`; both forms are in files of earlier versions.
    """
    return digest_text(json.dumps(content, sort_keys=True, ensure_ascii=ensure_ascii))


def digest_tree(path: Path) -> str:
    """SHA-256 of names and bytes of a file, or of all files of a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    state = hashlib.sha256()
    for file in files:
        state.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                state.update(block)
    return state.hexdigest()


def checksum_json(content: Any) -> str:
    """XXH3 of a JSON value, the same for any order of keys; what JSON lacks counts as its `str`."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, default=str).encode())


def checksum_file(path: Path, size: int = -1) -> str:
    """XXH3 of a file, or of its first `size` bytes; several GB/s."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size >= 0:
            state.update(file.read(size))
        else:
            while chunk := file.read(2**24):
                state.update(chunk)
    return state.hexdigest()


def checksum_samples(path: Path) -> str:
    """XXH3 of a file's size, its first MiB, and 1,024 blocks of 4 KiB evenly spread over the rest: what is
    rewritten as a whole has another, at the cost of 5 MiB."""
    size = path.stat().st_size
    state = xxhash.xxh3_128(str(size).encode())
    head, block = 2**20, 2**12
    with path.open("rb") as file:
        state.update(file.read(head))
        for start in range(head, size, max(block, (size - head) // 1024)):
            file.seek(start)
            state.update(file.read(block))
        file.seek(max(0, size - block))
        state.update(file.read(block))
    return state.hexdigest()


LOCK = ".hpd.lock"
"""Says in a folder which process writes there; gone when that process is done."""

# Locks of this process: file and thread -> descriptor.
_held: dict[tuple[Path, int], int] = {}


class InUse(ValueError):
    """Another process writes there."""


@contextlib.contextmanager
def holding(target: Path, *, is_folder: bool = True) -> Iterator[None]:
    """Be the only process that writes to a folder or file inside this context.

    The system's lock on a small file decides (`flock`), so a process that was killed holds nothing. The file
    also names the process, for messages, and where the lock cannot decide: a file system without locks, or
    one whose locks end at the machine. Inside itself, in the same thread, it does nothing; the processes of
    one launch (RANK) are one, which the first of them stands for.

    Args:
        target: what is written; a folder is made if it is missing, and removed if it is left empty.
        is_folder: the lock is in `target`, else beside it.

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
            _held[mine] = _lock(file, target)
        except OSError as error:
            raise OSError(
                f"{target} cannot be written: {error.strerror}. Make it writable, make space, or choose "
                "another place."
            ) from error
        try:
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


def _lock(file: Path, target: Path) -> int:
    """A descriptor of the locked file, which names this process now."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_held = not _is_locked(handle)
            if _is_at(handle, file):  # else its holder removed it when it was done
                _require_free(_read_note(handle), is_held, file, target)
                note = _encoded(_note())
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
