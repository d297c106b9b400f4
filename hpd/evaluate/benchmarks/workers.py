"""A process that answers lines of JSON, and that is killed where one takes too long."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from hpd.evaluate.sandbox import load_factor

__all__ = ["Worker"]


class Worker:
    """One process of a module that reads a JSON object a line and writes one.

    Args:
        module: its name; it is run with ``python -m``.
        first: a request that makes it import what it needs, which is not on the clock.
    """

    def __init__(self, module: str, first: dict[str, Any]) -> None:
        self._module = module
        self._first = first
        self._process = self._start()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply; None where the process was killed at the time limit, which grows with the machine's
        load, or died of the request. The next request gets a new one."""
        reply = self._exchange(request, seconds * load_factor())
        if reply is None:
            self.close()
            self._process = self._start()
        return reply

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what it did not read is lost on purpose
                    continue

    def _start(self) -> subprocess.Popen[str]:
        # Not multiprocessing: spawn imports the caller's main module again, fork copies the threads' locks of
        # torch.
        root = Path(__file__).resolve().parents[3]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        self._exchange(self._first, None)
        return self._process

    def _exchange(self, request: dict[str, Any], seconds: float | None) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill) if seconds is not None else None
        if timer is not None:
            timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            if timer is not None:
                timer.cancel()
        return json.loads(reply) if reply.endswith("\n") else None
