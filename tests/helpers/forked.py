"""Processes that start in milliseconds: forked from one that has imported everything and run nothing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["context", "hpd", "run_words", "start"]

_IMPORTED = [
    "hpd.cli",
    "hpd.terminal.doctor",
    "hpd.terminal.evaluation",
    "hpd.terminal.training",
    "hpd.evaluate.tasks",
    "hpd.evaluate.command",
    "hpd.experiments.worker",
    "hpd.training.single",
    "hpd.training.caching",
]


def context() -> Any:
    """Of multiprocessing; a process of pytest has one such server, whichever test asks first."""
    forks: Any = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(_IMPORTED)
    return forks


def hpd(
    *arguments: object, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """`hpd ARGUMENTS` as its entry point runs it, without the seconds of imports."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        process = context().Process(target=_main, args=(words, cwd, *files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        stdout, stderr = (Path(file).read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def start(*arguments: object) -> Any:
    """The same, of which nobody reads the output and which may be killed."""
    process = context().Process(
        target=_main, args=([str(argument) for argument in arguments], None, os.devnull, os.devnull)
    )
    process.start()
    return process


def run_words(words: list[str], log: str) -> None:
    """`hpd WORDS` in this process, which ends; what it shows is added to a file."""
    _main(words, None, log, log)


def _main(words: list[str], cwd: Path | None, stdout: str, stderr: str) -> None:
    for file, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(COLUMNS="220", NO_COLOR="1", TERM="dumb")
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["hpd", *words]
    from hpd.cli import main
    from hpd.terminal.console import console

    console.width = 220  # imported before COLUMNS was set
    main()
