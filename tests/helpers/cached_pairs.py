"""A tiny recipe whose teacher is cached, shared by the tests of caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from helpers.tiny_models import tiny_pair

__all__ = ["THREADS", "files_of", "make_recipe", "write_here", "write_in_world"]

# Of every process that writes a cache here: only at equal numbers of threads are the bytes promised to be equal.
THREADS = 1
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def make_recipe(folder: Path, num_rows: int = 40, **changes: Any) -> Path:
    """Pair, rows and recipe under `folder`; the last four rows repeat the first."""
    student, teacher = tiny_pair("llama", folder)
    rows = [
        {"prompt": f"say {NUMBERS[i % 10]} {i}:", "completion": " " + " ".join(NUMBERS[: 1 + i % 7])}
        for i in range(num_rows - 4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:4]]))
    recipe = {
        "student": str(student),
        "teacher": str(teacher),
        "method": "hpd",
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.2},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "save_strategy": "no",
            "metric_stride": 1,
            "use_cpu": True,
        },
        "cache": {"path": str(folder / "cache"), "dtype": "float32", "shard_bytes": 6000},
        "output_dir": str(folder / "run"),
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_here(recipe: Path, *overrides: str) -> None:
    """`hpd cache`, as the target of a process that a test may kill."""
    import torch

    torch.set_num_threads(THREADS)
    from hpd.config import load_recipe
    from hpd.training.caching import write_cache

    write_cache(load_recipe(recipe, overrides))


def write_in_world(rank: int, size: int, port: int, recipe: Path, *overrides: str) -> None:
    """The same as one of several processes, told so as torchrun tells them."""
    import os

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    write_here(recipe, *overrides)
    from accelerate import PartialState

    assert PartialState().num_processes == size
