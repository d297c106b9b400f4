"""Files that many experiments share: made once, kept in `$HPD_HOME/tasks` (`~/.cache/hpd/tasks`)."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from hpd.config.load import load_recipe
from hpd.demo.build_teacher import encode_rows
from hpd.demo.task import SolvedProblem
from hpd.files import JsonLines, digest_text
from hpd.training.caching import write_cache

__all__ = ["copy_to", "distill", "home", "learn", "prepare", "write_rows"]

_CACHE = "cache"


def home() -> Path:
    """The folder of files that many runs share: `$HPD_HOME`, by default `~/.cache/hpd`."""
    return Path(os.environ.get("HPD_HOME") or Path.home() / ".cache" / "hpd")


def prepare(name: str, choices: Any, build: Callable[[Path], Mapping[str, Any] | None]) -> Path:
    """The folder of a task's files, made where it is missing; a half-made one is never seen.

    Args:
        choices: what the files follow from, as JSON; other choices make another folder.
        build: writes the files into a folder and returns the recipe whose rows and teacher are cached beside
            them (hidden states in float32: exact for every method, and no run pays for the teacher's forward
            again), or None where there is nothing to cache.
    """
    digest = digest_text(json.dumps(choices))[:8]
    root = home() / "tasks"
    target = root / f"{name}-{digest}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as draft:
        files = Path(draft) / "files"
        recipe = build(files)
        if recipe is not None:
            _write_cache(files, recipe)
        try:
            os.replace(files, target)
        except OSError:
            if not target.is_dir():  # another process was first
                raise
    return target


def copy_to(folder: Path, prepared: Path) -> dict[str, str]:
    """Copy the files to an experiment's folder; return the teacher that reads the cache, which stays."""
    ignored = shutil.ignore_patterns(_CACHE)
    shutil.copytree(prepared, folder, ignore=ignored, dirs_exist_ok=True, copy_function=_renew)
    return {"type": "cached", "model": str(folder / "teacher"), "path": str(prepared / _CACHE)}


def _renew(source: str, target: str) -> None:
    """Copy a file that is missing or another, as a new one: the runs of a grid may be reading the old."""
    found = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, filter(os.path.isfile, (source, target)))]
    if len(found) == 2 and found[0] == found[1]:
        return
    draft = f"{target}.{os.getpid()}.part"
    shutil.copy2(source, draft)
    os.replace(draft, target)


def distill(folder: Path, student: str, **train: Any) -> dict[str, Any]:
    """The recipe of a prepared folder with its live teacher; `train` says what is the task's own."""
    shared = {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "logging_steps": 10,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "dataloader_drop_last": True,
    }
    return {
        "student": str(folder / student),
        "teacher": str(folder / "teacher"),
        "method": "hpd",
        "data": {"path": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")},
        "train": {**shared, **train},
    }


def _write_cache(folder: Path, recipe: Mapping[str, Any]) -> None:
    cache = {"path": str(folder / _CACHE), "kind": "hidden", "dtype": "float32"}
    write_cache(load_recipe({**recipe, "cache": cache, "output_dir": str(folder / "unused")}))


def learn(
    config: Any,
    tokenizer: Any,
    draw: Callable[[random.Random], SolvedProblem],
    name: str,
    *,
    num_steps: int,
    batch_size: int,
    rate: float,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A model that learned solutions with the next-token loss, each row new: AdamW, one cycle of the rate.

    `seed` decides its first weights, `name` the rows.
    """
    rng = random.Random(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=num_steps, pct_start=0.1)
        for _ in range(num_steps):
            ids, labels = encode_rows(tokenizer, [draw(rng) for _ in range(batch_size)])
            # Padding stands on the right, where causal attention never looks at it.
            model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return model.eval()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    JsonLines(path).write(rows)
