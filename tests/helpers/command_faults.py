"""Disturb commands again and again until they end: the harness of `helpers.faults` for whole command lines.

A life is `hpd WORDS` in a session of its own, as a terminal or a batch system starts it. Lives share what
they write to; what is there when one ends by itself is compared with what an undisturbed one left.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from helpers.faults import Account, limit_file_size, repair, same, spoil, without_clock
from helpers.forked import context, run_words

__all__ = [
    "COMMAND_KINDS",
    "Command",
    "disturb",
    "files_of",
    "require_no_survivors",
    "results_of",
    "start_command",
]

COMMAND_KINDS = (
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "SIGHUP",
    "disk full",
    "read-only",
    "file limit",
    "two at once",
)
# As a terminal does: to everything that was started from it.
_TO_THE_GROUP = ("SIGINT", "SIGHUP")
_LIFE_SECONDS = 600
_STOPPED = (75, 128 + signal.SIGINT, -signal.SIGINT, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)
"""Exit codes of what goes on; a signal that comes before a command handles any ends it as ever."""


class Command(NamedTuple):
    """One command that writes to a place."""

    words: Callable[[Path], Sequence[str]]
    """The command line, given the place."""
    left: Callable[[Path], Any]
    """What is there in the end, without figures of the clock."""
    failed: int = 2
    """Exit code where the place cannot be written."""


def live_command(words: Sequence[str], log: str, plan: Mapping[str, Any]) -> None:
    """`hpd WORDS` in this process."""
    os.setsid()
    if plan["kind"] == "file limit":
        limit_file_size(plan["bytes"])
    import torch

    torch.set_num_threads(1)
    run_words(list(words), log)


def start_command(words: Sequence[str], log: Path, plan: Mapping[str, Any] | None = None) -> Any:
    """A child that lives the command."""
    process = context().Process(target=live_command, args=(list(words), str(log), plan or {"kind": "none"}))
    process.start()
    return process


def disturb(
    command: Command, folder: Path, log: Path, faults: int, seed: int, kinds: Sequence[str] = COMMAND_KINDS
) -> tuple[Account, int]:
    """Disturb a command until it has survived `faults` faults and ended; the account, and how many ends
    equalled the undisturbed one, which is all of them."""
    draw, account, sessions = random.Random(seed), Account(), []
    began = time.monotonic()
    assert _end(start_command(command.words(folder / "undisturbed"), log)) == 0, log.read_text()[-3000:]
    expected = command.left(folder / "undisturbed")
    # How long a life takes, learned on the way.
    span, number = time.monotonic() - began, 0
    while True:
        kind = draw.choice(kinds) if account.survived < faults else "none"
        place = folder / f"run-{number}"
        began = time.monotonic()
        codes = _one_life(command, place, log, kind, draw, span, sessions)
        span = 0.8 * span + 0.2 * (time.monotonic() - began)
        account.lives += 1
        account.exits.update(map(str, codes))
        assert set(codes) <= _allowed(kind, command), (kind, codes, log.read_text()[-3000:])
        if codes != [0]:
            account.kills[kind] += 1
            account.moments["ended" if 0 in codes else "disturbed"] += 1
        if 0 in codes:
            same(expected, command.left(place), str(place))
            number += 1
            if account.survived >= faults:
                require_no_survivors(sessions)
                return account, number
        assert kind != "none" or 0 in codes


def _one_life(
    command: Command,
    place: Path,
    log: Path,
    kind: str,
    draw: random.Random,
    span: float,
    sessions: list[int],
) -> list[int]:
    """Exit codes of a life, or of two at once."""
    plan: dict[str, Any] = {"kind": kind}
    if kind == "file limit":
        plan["bytes"] = draw.choice([100, 2_000, 20_000, 60_000])
    words = command.words(place)
    # The limit holds for the log as well.
    process = start_command(words, Path(os.devnull) if kind == "file limit" else log, plan)
    sessions.append(process.pid)
    if kind in ("none", "file limit"):
        return [_end(process)]
    _wait_for_moment(process, place, draw, span)
    if kind == "two at once":
        other = start_command(words, log)
        sessions.append(other.pid)
        codes = [_end(process), _end(other)]
        assert 0 in codes, (codes, log.read_text()[-3000:])
        return codes
    if kind in ("disk full", "read-only"):
        spoil(kind, place.parent)
        try:
            return [_end(process)]
        finally:
            repair(kind, place.parent)
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            send = os.killpg if kind in _TO_THE_GROUP or draw.random() < 0.3 else os.kill
            send(process.pid, getattr(signal, kind))
    return [_end(process)]


def _allowed(kind: str, command: Command) -> set[int]:
    """Exit codes that a life may have."""
    if kind == "two at once":
        return {0, 2}
    if kind in ("disk full", "read-only", "file limit"):
        return {0, 2, 75, command.failed}
    return {0, *_STOPPED}


def _wait_for_moment(process: Any, place: Path, draw: random.Random, span: float) -> None:
    """Half of the moments lie just behind a change of a file, the others anywhere in a life."""
    if draw.random() < 0.5:
        process.join(draw.uniform(0.0, span))
        return
    known, wanted, seen = _state(place), draw.randint(1, 8), 0
    while process.is_alive() and seen < wanted:
        now = _state(place)
        if now != known:
            known, seen = now, seen + 1
        time.sleep(0.0005)
    time.sleep(draw.choice([0.0, draw.uniform(0.0, 0.05)]))


def _state(place: Path) -> list[tuple[str, int]]:
    found = []
    for parent, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(OSError):
                found.append((f"{parent}/{name}", os.stat(f"{parent}/{name}").st_size))
    return found


def _end(process: Any) -> int:
    process.join(_LIFE_SECONDS)
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        raise AssertionError(f"A life took more than {_LIFE_SECONDS} s.")
    return process.exitcode


def require_no_survivors(sessions: Sequence[int], seconds: float = 30.0) -> None:
    """Raise AssertionError where a process of these sessions is still there after a while."""
    end = time.monotonic() + seconds
    while found := list(_members(set(sessions))):
        assert time.monotonic() < end, found
        time.sleep(0.1)


def _members(sessions: set[int]) -> Iterator[str]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                yield f"{stat.parent.name}: {(stat.parent / 'cmdline').read_text()!r}"


def files_of(place: Path) -> dict[str, bytes]:
    """Every file below a place, with PLACE for its path; hidden ones too, so that no draft and no lock is
    left."""
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(place)): path.read_bytes().replace(os.fsencode(place), b"PLACE")
        for path in files
    }


def results_of(place: Path) -> dict[str, Any]:
    """The same without figures of the clock in JSON, and without checkpoints, of which a stop leaves one
    more."""
    return {
        name: _parsed(name, content)
        for name, content in files_of(place).items()
        # The card shows seconds; the other is a pickle.
        if "checkpoint-" not in name and not name.endswith(("README.md", "training_args.bin"))
    }


def _parsed(name: str, content: bytes) -> Any:
    if name.endswith("environment.json"):
        return None  # somebody may commit meanwhile
    if name.endswith("manifest.json"):
        return without_clock({**json.loads(content), "environment": None})
    if name.endswith(".json"):
        return without_clock(json.loads(content))
    if name.endswith(".jsonl"):
        return [without_clock(json.loads(line)) for line in content.splitlines()]
    return content
