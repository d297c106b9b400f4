"""Mistakes of users, and stops that are resumed later, as one paragraph and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["user_errors", "wrap_warnings"]

_PACKAGE = Path(__file__).parents[1]
_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong with the input, and the same command may succeed later."""


_MEMORY = (
    "Give the process more (ulimit -v, the container's or the batch system's limit), end what else runs on "
    "this machine, or choose a smaller model; hpd doctor says how much a run needs."
)


class _Paragraph(logging.Formatter):
    """A warning, in a terminal broken between words."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not sys.stderr.isatty():
            return text
        width = shutil.get_terminal_size().columns - 1
        return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def wrap_warnings() -> None:
    """Break what modules warn of, without a handler of their own, as errors are; a warning of this package
    is one paragraph, without the line of source that raised it."""
    # Whichever import finds it, it says there which kernels it did not find.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Paragraph())
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
            _complain("warning", str(message))
        else:
            usual(message, category, filename, *rest)

    warnings.showwarning = show


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A mistake in the input is one paragraph and exit code 2; HPD_DEBUG=1 shows where it was raised."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HPD_DEBUG"):
            raise
        _complain("error", str(error) if str(error) else type(error).__name__)
        raise typer.Exit(2) from None
    except MemoryError as error:
        if os.environ.get("HPD_DEBUG"):
            raise
        _complain("error", f"There is not enough memory{f' ({error})' if str(error) else ''}. {_MEMORY}")
        raise typer.Exit(2) from None
    except RuntimeError as error:
        # By name: importing the classes would load transformers for every command.
        if type(error).__name__ not in ("RunStopped", "TeacherUnavailable") or os.environ.get("HPD_DEBUG"):
            raise
        words = [word for word in sys.argv[1:] if word != "--overwrite"]
        again = shlex.join(["hpd", *words, *getattr(error, "overrides", ())])
        _complain("stopped", f"{error} Resume with: {again}")
        raise typer.Exit(_TRY_AGAIN) from None
    except KeyboardInterrupt:  # before a command's own handling: while it imports what it needs
        raise typer.Exit(128 + signal.SIGINT) from None


def _complain(kind: str, text: str) -> None:
    from hpd.config.secrets import redact  # it loads torch, and `hpd --help` does without

    # One paragraph, whatever a library wrote; and no control characters, since names and messages may be a
    # stranger's.
    text = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(redact(text).split())
    )
    with contextlib.suppress(OSError):  # the disk that is full may be that of a log
        to = Console(stderr=True)
        # Broken between words in a terminal, and one line in a log.
        line = f"[bold red]{kind}:[/] {escape(text)}"
        to.print(line, highlight=False, soft_wrap=not to.is_terminal)
