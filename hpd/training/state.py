"""A process's part of a checkpoint: the state of everything that has one, by name, in one file."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from hpd.training.checkpoints import reading

__all__ = [
    "EARLIER_NAMES",
    "SavedState",
    "follow_schedule",
    "get_random",
    "read_state",
    "set_random",
    "write_state",
]

_LOGGER = logging.getLogger(__name__)

# What the layout before kept in trainer_state.json: "terms" and "share".
EARLIER_NAMES = ("hpd_adaptive", "hpd_student_share")
# Names within rows and frozen updates, before and now.
_RENAMED = {"behavior": "behavior_logprobs", "old": "old_logprobs"}


class SavedState(NamedTuple):
    """State by name, and the file that it was read from."""

    file: Path
    parts: dict[str, Any]


def follow_schedule(scheduler: Any, optimizer: Any) -> None:
    """Take the next step at the rate of a schedule over another number of steps; the optimizer's state holds
    that of the old one.

    Args:
        scheduler: the Trainer's, after its state was loaded; only those of transformers' `get_scheduler` know
            the number of steps.
        optimizer: whose rates are set.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(schedule, LambdaLR) or optimizer is None:
        return
    scaled = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base * scale(schedule.last_epoch) for base, scale in scaled]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def write_state(checkpoint: Path, rank: int, parts: Mapping[str, Any]) -> None:
    """Write a process's part of a checkpoint."""
    torch.save(dict(parts), _file(checkpoint, rank))


def read_state(checkpoint: Path, rank: int, device: str, names: Iterable[str], required: bool) -> SavedState:
    """Read a process's part of a checkpoint, of this layout or the one before.

    Args:
        device: type of the device that tensors go to.
        names: what a process's own part must hold.
        required: True if nothing can go on without this process's own part.

    Returns:
        Without a part of this process (earlier versions wrote none), what all of them share.

    Raises:
        CheckpointUnreadable: a file is damaged.
        ValueError: there is no part of this process, and it is required.
    """
    file = _file(checkpoint, rank)
    if file.is_file():
        saved = SavedState(file, _load(file, device))
        with reading(file):
            if lacking := [name for name in names if name not in saved.parts]:
                raise ValueError(f"it lacks {', '.join(lacking)}")
        return saved
    saved = _read_earlier_layout(checkpoint, rank, device, required)
    if required and "on_policy" not in saved.parts:
        raise ValueError(
            f"{checkpoint} holds no {file.name}, which replay and repeated updates need to continue: start "
            "again with --overwrite."
        )
    if "sums" not in saved.parts:
        _LOGGER.warning(
            "%s holds no %s (hpd did not write it): the next log covers the steps from here on only.",
            checkpoint,
            file.name,
        )
    return saved


def get_random() -> dict[str, Any]:
    """The state of all random numbers of this process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random(state: dict[str, Any]) -> None:
    """Go on where `get_random` was called."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"state-rank{rank}.pt"


def _load(file: Path, device: str) -> dict[str, Any]:
    with reading(file):
        # Several processes on a CPU call it cpu:0, which torch.load does not know; so only its type.
        return torch.load(file, weights_only=True, map_location=device)


def _read_earlier_layout(checkpoint: Path, rank: int, device: str, required: bool) -> SavedState:
    """Two files a process, and in trainer_state.json what all processes share."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    shared = zip(("terms", "share"), map(state["stateful_callbacks"].get, EARLIER_NAMES), strict=True)
    parts = {name: found for name, found in shared if found is not None}
    window_file, rows_file = (checkpoint / f"{name}-rank{rank}.pt" for name in ("window", "rollouts"))
    sums: dict[str, float] = {}
    if window_file.is_file():
        window = _load(window_file, device)
        with reading(window_file):
            sums = window["rollouts"]
            parts["sums"] = window["sums"]
            parts["watch"] = {"skipped_steps": window["skipped_steps"]}
            loss, last_logged = window["loss"], window["last_logged"]
            parts["window"] = {"loss": loss, "last_logged": last_logged, "last_step": window.get("last_step")}
    written: dict[str, Any] = {"frozen": [], "rows": {"replay": None, "current": None}}
    if rows_file.is_file():
        written = _renamed(_load(rows_file, device))
    if rows_file.is_file() or (window_file.is_file() and not required):
        with reading(rows_file):
            frozen, rows = written["frozen"], written["rows"]
            parts["on_policy"] = {"frozen": frozen, "rows": None if rows is None else {**rows, "sums": sums}}
    return SavedState(rows_file if required else window_file, parts)


def _renamed(found: Any) -> Any:
    """The same with the names of now."""
    if isinstance(found, dict):
        return {_RENAMED.get(name, name): _renamed(value) for name, value in found.items()}
    return type(found)(map(_renamed, found)) if isinstance(found, (list, tuple)) else found
