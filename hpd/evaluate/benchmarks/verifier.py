"""Comparisons of mathematical answers by math-verify, each within a time limit that holds."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from hpd.evaluate.benchmarks.workers import Worker

__all__ = ["AnswerPair", "Equality", "compare_all"]

_SECONDS = 20.0
"""Limit of one comparison by the clock, on an idle machine; the worker's own limit of processor time is
lower."""
_MAX_PROCESSES = 8

# A process imports sympy for a second or more, in which another one compares many answers.
_WORTH_A_PROCESS = 24

_MODULE = "hpd.evaluate.benchmarks.math_worker"


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
    """numbers, lists, math-verify, timeout, or the error of a comparison that failed (and is no)."""


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
    worker = Worker(_MODULE, AnswerPair("1", "1")._asdict())
    try:
        replies = {pair: worker.ask(pair._asdict(), seconds) for pair in pairs}
    finally:
        worker.close()
    return {
        pair: Equality(**reply) if reply is not None else Equality(False, "timeout")
        for pair, reply in replies.items()
    }
