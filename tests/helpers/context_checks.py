"""Run by tests/training/test_context.py under torchrun, as distributed_checks.py is, whose files it writes:
rows that two processes share, against whole rows in one.

Usage: torchrun --nproc_per_node N context_checks.py STUDENT_FOLDER OUTPUT NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.utils import ParallelismConfig

from helpers.distributed_checks import (
    GLOBAL_BATCH,
    let_fsdp_run_on_cpu,
    trained,
    world_size,
)
from hpd.training.stopping import leaving_processes

SHARING = 2
"""Processes that share each row, where there are several."""


def launched(accumulation: int = 1, **options) -> dict:
    """Options of a trainer whose global batch is the same in one process and with rows shared by two."""
    readers = max(world_size() // SHARING, 1)
    options |= {
        "accumulation": accumulation,
        "per_device_train_batch_size": GLOBAL_BATCH // accumulation // readers,
    }
    if world_size() == 1:
        return options
    let_fsdp_run_on_cpu()
    layout = ParallelismConfig(cp_size=SHARING, dp_shard_size=readers)
    return {**options, "fsdp": True, "fsdp_config": {"version": 2}, "parallelism_config": layout}


def hpd(pair: Path, output: Path) -> None:
    """HPD on rows of very different lengths; an epoch whose last batch is uneven; validation at each step."""
    options = {"count": 11, "max_steps": -1, "num_train_epochs": 2, "evaluation": 5}
    trained("hpd", pair, output, **launched(**options, eval_strategy="steps", eval_steps=1))


def forward_kl(pair: Path, output: Path) -> None:
    trained("forward_kl", pair, output, **launched(method="forward_kl"))


def sft(pair: Path, output: Path) -> None:
    trained("sft", pair, output, **launched(method="sft"))


def accumulated(pair: Path, output: Path) -> None:
    trained("accumulated", pair, output, **launched(accumulation=2, gradient_checkpointing=True))


CHECKS = {function.__name__: function for function in (hpd, forward_kl, sft, accumulated)}


if __name__ == "__main__":
    models, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    with leaving_processes():
        for check in names:
            CHECKS[check](Path(models), Path(out))
