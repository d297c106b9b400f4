"""Processes that start in milliseconds: forked from one that has imported everything and run nothing."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["Popen", "context", "hpd", "run", "run_words", "start"]

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
    *arguments: object,
    cwd: Path | None = None,
    timeout: float = 240,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`hpd ARGUMENTS` as its entry point runs it, without the seconds of imports.

    Its variables are those of the first process that was forked; `environment` is added to them.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        process = context().Process(target=_main, args=(words, cwd, *files, dict(environment or {})))
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
        target=_main, args=([str(argument) for argument in arguments], None, os.devnull, os.devnull, {})
    )
    process.start()
    return process


class Popen:
    """`subprocess.Popen` of a Python program, `[python, FILE, ...]` or `[python, "-m", MODULE, ...]`."""

    def __init__(
        self,
        command: Sequence[str],
        stdout: IO[str],
        stderr: IO[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ):
        target = (list(command[1:]), cwd, stdout.name, stderr.name, dict(env or {}))
        self._process = context().Process(target=_program, args=target)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(command, capture_output=True, text=True, check=True)` of such a program."""
    with tempfile.NamedTemporaryFile("r+") as stdout, tempfile.NamedTemporaryFile("r+") as stderr:
        status = Popen(command, stdout, stderr).wait()
        if status:
            raise subprocess.CalledProcessError(status, command, stdout.read(), stderr.read())
        return subprocess.CompletedProcess(command, status, stdout.read(), stderr.read())


def _program(
    words: list[str], cwd: Path | None, stdout: str, stderr: str, environment: dict[str, str]
) -> None:
    _write_to(stdout, stderr)
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def _write_to(stdout: str, stderr: str) -> None:
    for file, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


def run_words(words: list[str], log: str) -> None:
    """`hpd WORDS` in this process, which ends; what it shows is added to a file."""
    _main(words, None, log, log, {})


def _main(words: list[str], cwd: Path | None, stdout: str, stderr: str, environment: dict[str, str]) -> None:
    _write_to(stdout, stderr)
    os.environ.update(COLUMNS="220", NO_COLOR="1", TERM="dumb", **environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["hpd", *words]
    from hpd.cli import main
    from hpd.terminal.console import console

    console.width = 220  # imported before COLUMNS was set
    main()
