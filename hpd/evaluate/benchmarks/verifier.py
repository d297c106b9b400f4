"""Comparisons of mathematical answers by math-verify, each within a time limit that holds."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

__all__ = ["Comparison", "Outcome", "compare_all"]


_SECONDS = 20.0
"""Limit of one comparison: more than math-verify's own limits (5 s of parsing twice, 5 s of comparing) take
together."""


_MAX_PROCESSES = 8


# A process imports sympy for a second or more, in which another one compares many answers.
_WORTH_A_PROCESS = 24


class Comparison(NamedTuple):
    """Is this answer the reference?"""

    gold: str
    answer: str
    relative: float = 0.0
    """Numbers count as equal within this share of the reference."""
    absolute: float = 0.0
    """Numbers count as equal within this distance."""


class Outcome(NamedTuple):
    """What came of a comparison."""

    same: bool
    how: str
    """numbers, math-verify, timeout, or the error of a comparison that failed (and is no)."""


def compare_all(comparisons: Sequence[Comparison], seconds: float = _SECONDS) -> dict[Comparison, Outcome]:
    """All comparisons, equal ones once, on as many processes as there are processors (at most 8)."""
    todo = list(dict.fromkeys(comparisons))
    if not todo:
        return {}
    count = min(-(-len(todo) // _WORTH_A_PROCESS), os.cpu_count() or 1, _MAX_PROCESSES)
    outcomes: dict[Comparison, Outcome] = {}
    with ThreadPoolExecutor(count) as pool:
        for part in pool.map(lambda index: _compare_some(todo[index::count], seconds), range(count)):
            outcomes |= part
    return outcomes


def _compare_some(comparisons: Sequence[Comparison], seconds: float) -> dict[Comparison, Outcome]:
    worker = _Worker()
    try:
        outcomes = {}
        for comparison in comparisons:
            outcome = worker.ask(comparison, seconds)
            if outcome is None:
                worker.close()
                worker = _Worker()
                outcome = Outcome(False, "timeout")
            outcomes[comparison] = outcome
        return outcomes
    finally:
        worker.close()


class _Worker:
    """One process of `hpd.evaluate.benchmarks.math_worker`."""

    def __init__(self) -> None:
        # Not multiprocessing: spawn imports the caller's main module again, fork copies the threads' locks of
        # torch.
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hpd.evaluate.benchmarks.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        self._ask(
            '{"gold": "1", "answer": "1", "relative": 0, "absolute": 0}', None
        )  # sympy's import is not on the clock

    def ask(self, comparison: Comparison, seconds: float) -> Outcome | None:
        """The outcome; None where the process was killed at the time limit, or died of its memory limit."""
        reply = self._ask(json.dumps(comparison._asdict()), seconds)
        return Outcome(**reply) if reply is not None else None

    def _ask(self, line: str, seconds: float | None) -> dict | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        timer = threading.Timer(seconds, self._process.kill) if seconds is not None else None
        if timer is not None:
            timer.start()
        try:
            reply = self._process.stdout.readline()
        finally:
            if timer is not None:
                timer.cancel()
        return json.loads(reply) if reply.endswith("\n") else None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
