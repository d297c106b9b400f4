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

__all__ = ["AnswerPair", "Equality", "compare_all"]

_SECONDS = 20.0
"""Limit of one comparison: more than math-verify's own limits (5 s of parsing twice, 5 s of comparing) take
together."""
_MAX_PROCESSES = 8

# A process imports sympy for a second or more, in which another one compares many answers.
_WORTH_A_PROCESS = 24


class AnswerPair(NamedTuple):
    """A reference, an answer, and how far numbers may differ."""

    gold: str
    answer: str
    relative: float = 0.0
    """Numbers count as equal within this share of the reference."""
    absolute: float = 0.0
    """Numbers count as equal within this distance."""


class Equality(NamedTuple):
    """True if an answer equals its reference, and how that was found."""

    same: bool
    how: str
    """numbers, math-verify, timeout, or the error of a comparison that failed (and is no)."""


def compare_all(pairs: Sequence[AnswerPair], seconds: float = _SECONDS) -> dict[AnswerPair, Equality]:
    """Compare all pairs, equal ones once, on as many processes as there are processors (at most 8)."""
    todo = list(dict.fromkeys(pairs))
    if not todo:
        return {}
    count = min(-(-len(todo) // _WORTH_A_PROCESS), os.cpu_count() or 1, _MAX_PROCESSES)
    found: dict[AnswerPair, Equality] = {}
    with ThreadPoolExecutor(count) as pool:
        for part in pool.map(lambda index: _compare_some(todo[index::count], seconds), range(count)):
            found |= part
    return found


def _compare_some(pairs: Sequence[AnswerPair], seconds: float) -> dict[AnswerPair, Equality]:
    worker = _Worker()
    try:
        found = {}
        for pair in pairs:
            equality = worker.ask(pair, seconds)
            if equality is None:
                worker.close()
                worker = _Worker()
                equality = Equality(False, "timeout")
            found[pair] = equality
        return found
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
        # sympy's import is not on the clock.
        self._ask('{"gold": "1", "answer": "1", "relative": 0, "absolute": 0}', None)

    def ask(self, pair: AnswerPair, seconds: float) -> Equality | None:
        """Compare a pair; None where the process was killed at the time limit, or died of its memory
        limit."""
        reply = self._ask(json.dumps(pair._asdict()), seconds)
        return Equality(**reply) if reply is not None else None

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
