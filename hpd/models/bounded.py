"""A limit for programs that come with a model: chat templates may loop without end, or eat the memory."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["rendering"]

_SECONDS = 20.0
"""Processor time of one conversation; a long one takes a hundredth."""
_BYTES = 2**30
"""Memory of one conversation."""
_active = threading.local()


class _TooSlow(BaseException):
    """A template has used its time up; no Exception, which Jinja would take for a constant that it cannot
    compute in advance, and compute again."""


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """Bound what a chat template takes inside this context: 20 s of processor time and 1 GiB of memory.

    Time is processor time, which another busy process does not use up; it is bounded in the main thread
    only, where Python runs signals. Memory is bounded as long as no accelerator is in use.

    Raises:
        ValueError: it took more.
    """
    if getattr(_active, "inside", False):
        yield
        return
    _active.inside = True
    try:
        with _less_memory(), _less_time():
            yield
    except _TooSlow:
        raise ValueError(
            f"it did not end within {_SECONDS:.0f} s of processor time, so it may never"
        ) from None
    except MemoryError:
        raise ValueError(f"it takes more than {_BYTES // 2**30} GiB of memory") from None
    finally:
        _active.inside = False


@contextlib.contextmanager
def _less_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS, 1.0)  # again, where something swallows it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if before is None else before)


def _stop(number: int, frame: Any) -> None:
    raise _TooSlow


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    # Beside a model on an accelerator other threads allocate; templates have been tried before it loads.
    size = None if torch.cuda.is_initialized() else _address_space()
    if size is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (size + _BYTES, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes of this process's address space; None where there is no /proc."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return None
    return int(pages) * resource.getpagesize()
