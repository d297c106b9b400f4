"""Checkpoints as the version before wrote them: two files a process, adaptive numbers in the Trainer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hpd.training.checkpoints import mark_complete

__all__ = ["rewrite_as_earlier"]

_EARLIER = {"behavior_logprobs": "behavior", "old_logprobs": "old"}


def rewrite_as_earlier(checkpoint: Path) -> None:
    """Put what a complete checkpoint holds into the earlier layout, of which nothing else is left."""
    notes = json.loads((checkpoint / "complete.json").read_text())
    state_file = checkpoint / "trainer_state.json"
    state = json.loads(state_file.read_text())
    for file in sorted(checkpoint.glob("state-rank*.pt")):
        rank = file.stem.removeprefix("state-rank")
        found = torch.load(file, weights_only=True)
        rows = found["on_policy"]["rows"]
        window = {
            "sums": found["sums"],
            "rollouts": {} if rows is None else rows.pop("sums"),
            "loss": found["window"]["loss"],
            "last_logged": found["window"]["last_logged"],
            "skipped_steps": found["watch"]["skipped_steps"],
            "last_step": found["window"]["last_step"],
        }
        torch.save(window, checkpoint / f"window-rank{rank}.pt")
        if (rows and (rows["replay"] or rows["current"])) or found["on_policy"]["frozen"]:
            torch.save(_renamed(found["on_policy"]), checkpoint / f"rollouts-rank{rank}.pt")
        if found["terms"]:
            state["stateful_callbacks"]["hpd_adaptive"] = found["terms"]
        if "share" in found:
            state["stateful_callbacks"]["hpd_student_share"] = found["share"]
        file.unlink()
    state_file.write_text(json.dumps(state))
    del notes["bytes"]
    mark_complete(checkpoint, notes)


def _renamed(found: Any) -> Any:
    if isinstance(found, dict):
        return {_EARLIER.get(name, name): _renamed(value) for name, value in found.items()}
    return type(found)(map(_renamed, found)) if isinstance(found, (list, tuple)) else found
