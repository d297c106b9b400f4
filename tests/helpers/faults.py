"""Kill a training run again and again, at random moments and in every way a machine can, until it ends.

A server process imports everything once and forks a child for each life, so that a life costs the training
alone. `harass` tells what it did; the tests compare what the run left with what an undisturbed one leaves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.forked import context

__all__ = [
    "Account",
    "disk",
    "harass",
    "left_behind",
    "limit_file_size",
    "live",
    "repair",
    "same",
    "spoil",
    "start",
    "without_clock",
]

LIFE_SECONDS = 120
KINDS = ("SIGKILL", "SIGTERM", "disk full", "file limit", "read-only", "ENOSPC in a shard")
# Figures of a session or of the clock: nothing that training depends on.
_OF_THE_CLOCK = ("runtime", "per_second", "train_loss", "seconds", "total_flos", "started")


@dataclass
class Account:
    """What a run went through."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    lives: int = 0

    @property
    def survived(self) -> int:
        return sum(self.kills.values())


def live(tree: dict[str, Any], log: str, plan: dict[str, Any]) -> None:
    """One life of the run, in this process; exit code 0 when it ended, 75 when it stopped and can go on."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from hpd.config import load_recipe
    from hpd.training.run import train
    from hpd.training.stopping import RunStopped

    _set_up(plan)
    try:
        train(load_recipe(tree))
    except (RunStopped, OSError) as error:
        with contextlib.suppress(OSError):
            print(f"{plan['kind']}: {error}", flush=True)
        os._exit(75 if isinstance(error, RunStopped) else 2)
    os._exit(0)


def _set_up(plan: dict[str, Any]) -> None:
    if plan["kind"] == "file limit":
        limit_file_size(plan["bytes"])
    elif plan["kind"] == "ENOSPC in a shard":
        _fail_writes_of_shards(plan["after"])


def limit_file_size(num_bytes: int) -> None:
    """What a quota does: a file of this process may grow to here and no further."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def _fail_writes_of_shards(after: int) -> None:
    """The n-th file of weights is written half, and then the disk is full."""
    import safetensors.torch
    import transformers.modeling_utils

    original, seen = safetensors.torch.save_file, []

    def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(filename)
        original(tensors, filename, *args, **kwargs)
        if len(seen) >= after:
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(filename))

    safetensors.torch.save_file = save_file
    transformers.modeling_utils.safe_save_file = save_file  # type: ignore[attr-defined]


def start(tree: dict[str, Any], log: Path, plan: dict[str, Any] | None = None) -> Any:
    """A child that lives the run."""
    process = context().Process(target=live, args=(tree, str(log), plan or {"kind": "none"}))
    process.start()
    return process


def harass(
    tree: dict[str, Any], folder: Path, log: Path, kills: int, seed: int, kinds: Sequence[str] = KINDS
) -> Account:
    """Disturb a run until it has survived `kills` faults, then let it end.

    A run that ends before is begun again in the next folder, `folder`/run-N, which the caller compares like
    the others.
    """
    draw, account, number = random.Random(seed), Account(), 0
    target: dict[str, Any] = {**tree, "output_dir": str(folder / "run-0")}
    # How long a life takes to its first step and to its end, learned on the way.
    spans = [2.0, 6.0]
    while True:
        kind = draw.choice(kinds) if account.survived < kills else "none"
        run = Path(target["output_dir"])
        before = time.monotonic()
        fatal, moment = _one_life(target, log, kind, draw, spans)
        spans[1] = 0.8 * spans[1] + 0.2 * (time.monotonic() - before)
        account.lives += 1
        account.exits[str(fatal)] += 1
        finished = (run / "summary.json").is_file()
        assert fatal in (0, 75, 2, -signal.SIGKILL, -signal.SIGTERM), (kind, fatal, log.read_text()[-3000:])
        if fatal != 0:
            account.kills[kind] += 1
            account.moments[moment] += 1
        assert kind != "none" or finished, log.read_text()[-3000:]
        if finished:
            if account.survived >= kills:
                return account
            number += 1
            target = {**tree, "output_dir": str(folder / f"run-{number}")}


def _one_life(
    tree: dict[str, Any], log: Path, kind: str, draw: random.Random, spans: list[float]
) -> tuple[int, str]:
    """A life and its end: exit code, and what went on at that moment."""
    run = Path(tree["output_dir"])
    plan: dict[str, Any] = {"kind": kind}
    if kind == "file limit":
        plan["bytes"] = draw.choice([2_000, 20_000, 60_000, 120_000])
    if kind == "ENOSPC in a shard":
        plan["after"] = draw.randint(1, 4)
    process = start(tree, log, plan)
    if kind in ("none", "file limit", "ENOSPC in a shard"):
        return _end(process), "writing"
    moment = _wait_for_moment(process, run, draw, spans)
    if kind in ("disk full", "read-only"):
        spoil(kind, run.parent)
        try:
            return _end(process), moment
        finally:
            repair(kind, run.parent)
    if process.is_alive():
        os.kill(process.pid, getattr(signal, kind))
    return _end(process), moment


def _wait_for_moment(process: Any, run: Path, draw: random.Random, spans: list[float]) -> str:
    """Half of the moments lie in the writing of a checkpoint, the others anywhere in a life."""
    if draw.random() < 0.5:
        process.join(draw.uniform(0.0, spans[1]))
    else:
        known, wanted, seen = set(run.glob("checkpoint-*")), draw.randint(1, 3), 0
        while process.is_alive() and seen < wanted:
            now = set(run.glob("checkpoint-*"))
            if now - known:
                known, seen = known | now, seen + 1
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 0.04))
    newest = max(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and not (newest / "complete.json").is_file():
        return "saving"
    if (run / "model.safetensors").is_file():
        return "after training"
    return "training" if (run / "metrics.jsonl").is_file() else "before training"


@contextlib.contextmanager
def disk(folder: Path, mebibytes: int = 256) -> Iterator[bool]:
    """A file system of its own at `folder`, where this user may mount one; says whether that is so."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def spoil(kind: str, folder: Path) -> None:
    """Fill the disk that is mounted at a folder, or make it read-only."""
    if kind == "disk full":
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:
        # Busy while a file is open for writing.
        while subprocess.run(["mount", "-o", "remount,ro", str(folder)], capture_output=True).returncode:
            time.sleep(0.001)


def repair(kind: str, folder: Path) -> None:
    """The opposite of `spoil`."""
    if kind == "disk full":
        (folder / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def _end(process: Any) -> int:
    process.join(LIFE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"A life took more than {LIFE_SECONDS} s.")
    return process.exitcode


def left_behind(run: Path) -> dict[str, Any]:
    """What must be the same: weights, the last checkpoint's optimizer and schedule, the metrics and the
    summary."""
    import torch
    from safetensors.torch import load_file

    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = (
        "adapter_model.safetensors" if (run / "adapter_model.safetensors").is_file() else "model.safetensors"
    )
    files = {"weights": load_file(run / weights), "last weights": load_file(last / weights)}
    for name in ("optimizer.pt", "scheduler.pt"):
        files[name] = torch.load(last / name, weights_only=True)
    for path in last.glob("state-*"):
        saved = torch.load(path, weights_only=True)
        rows = saved["on_policy"]["rows"]
        if rows is not None:
            del rows["sums"]  # with seconds
        files[path.name] = {name: saved.get(name) for name in ("on_policy", "terms", "share")}
    logs = [without_clock(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((last / "trainer_state.json").read_text())
    kept = {key: state[key] for key in ("global_step", "epoch", "best_metric", "best_global_step")}
    return {
        **files,
        "metrics": logs,
        "state": kept,
        "summary": without_clock(json.loads((run / "summary.json").read_text())),
    }


def without_clock(value: Any) -> Any:
    """JSON values without figures of a session or of the clock."""
    if isinstance(value, dict):
        return {
            key: without_clock(part)
            for key, part in value.items()
            if not any(word in key for word in _OF_THE_CLOCK)
        }
    return [without_clock(part) for part in value] if isinstance(value, list) else value


def same(one: Any, other: Any, where: str = "") -> None:
    """Raise AssertionError at the first difference; tensors bit for bit."""
    import torch

    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other) or sorted(map(str, one)) == sorted(map(str, other)), (
            where,
            list(one),
            list(other),
        )
        for key in one:
            same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), (where, one, other)
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{where}/{i}")
    else:
        assert one == other, (where, one, other)
