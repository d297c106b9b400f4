"""Run by tests/training/test_distributed_bytes.py under torchrun, as distributed_checks.py is, whose files it
writes: teachers with another tokenizer on two processes, against one.

Usage: torchrun --nproc_per_node N byte_checks.py FOLDER OUTPUT NAME...

FOLDER holds what that test's `folder` writes: a and b, as `mixed_pairs` does, a cache of a's teacher, and the
address of a server of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.distributed_checks import (
    DESCENT,
    make_trainer,
    report,
    rows,
    run_checks,
    trained,
    under_fsdp2,
    whole_weights,
    world_size,
)
from helpers.servers import connected
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.teachers import CachedTeacher, MixtureTeacher, ModelTeacher, RoutedTeacher, Teacher

WRITES = {"prefixes": Prefixes(student=0.5), "rollouts": RolloutConfig(max_new_tokens=5)}
CONTINUES = {"prefixes": Prefixes(student=0.7, continue_tokens=3)}
FLAT = {"padding_free": True, "max_length": None}
WATCHED = {"eval_strategy": "steps", "eval_steps": 1}


def named(count: int) -> Dataset:
    """Rows that name their teacher; of eleven, the second process has none in the last step, and some
    micro-batches have rows of one teacher alone."""
    return rows(count).add_column("who", ["ba"[i % 5 > 0] for i in range(count)])


def live(folder: Path, scale: float = 1.0, pair: str = "a") -> ModelTeacher:
    """The teacher of a pair, or one that is surer than it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / pair / "teacher")
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    return ModelTeacher(model)


def swapped(folder: Path) -> Teacher:
    """Byte-level, of a student whose tokenizer is SentencePiece-like."""
    return live(folder, pair="b")


def served(folder: Path) -> Teacher:
    student = AutoTokenizer.from_pretrained(folder / "a" / "student")
    return connected((folder / "url").read_text(), student, protocol="hpd")


def mixture(folder: Path) -> Teacher:
    return MixtureTeacher({"a": live(folder), "b": live(folder, 3.0)}, {"a": 1.0, "b": 3.0})


def routed(folder: Path) -> Teacher:
    return RoutedTeacher({"a": live(folder), "b": live(folder, 3.0)}, "who")


def mixed_with_served(folder: Path) -> Teacher:
    return MixtureTeacher({"a": served(folder), "b": live(folder, 3.0)}, {"a": 1.0, "b": 3.0})


def routed_to_served(folder: Path) -> Teacher:
    return RoutedTeacher({"a": served(folder), "b": live(folder, 3.0)}, "who")


def cached(folder: Path) -> Teacher:
    return CachedTeacher(folder / "cache")


Run = tuple[Callable[[Path], Teacher], dict[str, Any]]
DDP: dict[str, Run] = {
    "live": (live, {"method": "hpd", **WATCHED}),
    "served": (served, {"method": "hpd", **WATCHED}),
    "served_written": (served, {"method": "reverse_kl", **WRITES}),
    "served_flat": (served, {"method": "forward_kl", **FLAT, "dataloader_num_workers": 1}),
    "mixture": (mixture, {"method": "hpd"}),
    "mixture_written": (mixture, {"method": "forward_kl", **WRITES}),
    "routed": (routed, {"method": "reverse_kl", **WATCHED}),
    "routed_flat": (routed, {"method": "hpd", **FLAT, "dataloader_num_workers": 1}),
    "routed_to_served": (routed_to_served, {"method": "label_reverse_kl"}),
    "cached": (cached, {"method": "hpd", **WATCHED}),
    "streamed": (live, {"method": "forward_kl", "count": 16, "streamed": True}),
    "continued": (live, {"method": "hpd", **CONTINUES}),
    "written_flat": (live, {"method": "gkd", **WRITES, **FLAT}),
    "written_behind_a_hint": (live, {"method": "forward_kl", "hinted": True, **WRITES}),
    "written_swapped": (swapped, {"method": "hpd", **WRITES}),
    "written": (live, {"method": "reverse_kl", "count": 16, **WRITES, "lr_scheduler_type": "constant"}),
}
"""Teacher and options of each run."""
FSDP2: dict[str, Run] = {
    "fsdp2_live": (live, {"method": "forward_kl", **WATCHED}),
    "fsdp2_written": (live, {"method": "hpd", **WRITES}),
    "fsdp2_written_swapped": (swapped, {"method": "reverse_kl", **WRITES, "gradient_checkpointing": True}),
    "fsdp2_continued": (live, {"method": "forward_kl", **CONTINUES, **FLAT}),
    "fsdp2_mixed_with_served_written": (mixed_with_served, {"method": "forward_kl", **WRITES}),
    "fsdp2_routed": (routed, {"method": "reverse_kl", **WATCHED}),
    "fsdp2_routed_to_served": (routed_to_served, {"method": "hpd"}),
    "fsdp2_cached": (cached, {"method": "forward_kl"}),
}
"""The same, sharded where there are several processes."""


def options_of(name: str, folder: Path) -> dict[str, Any]:
    make, given = (DDP | FSDP2)[name]
    pair = folder / ("b" if make is swapped else "a")
    options = {"max_steps": 2, "vocabulary": "bytes", "teacher": make(folder), **DESCENT, **given}
    options["teacher_tokenizer"] = AutoTokenizer.from_pretrained(pair / "teacher")
    train = named(options.pop("count", 11))
    options["train_dataset"] = train.to_iterable_dataset() if options.pop("streamed", False) else train
    if "eval_strategy" in options:
        options["eval_dataset"] = named(5)
    return {"pair": pair, **options}


def run(name: str) -> Callable[[Path, Path], None]:
    def check(folder: Path, output: Path) -> None:
        options = options_of(name, folder)
        (under_fsdp2 if name in FSDP2 else trained)(name, options.pop("pair"), output, **options)

    return check


def accumulated(folder: Path, output: Path) -> None:
    """`written` in twice as many micro-batches."""
    options = options_of("written", folder)
    trained("accumulated", options.pop("pair"), output, accumulation=2, **options)


def resumed(folder: Path, output: Path) -> None:
    """`written` as one step, and as a new trainer from its checkpoint."""
    saved = {"folder": output / f"resumed-{world_size()}", "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options_of("written", folder) | saved | {"max_steps": 1}).train()
    again = make_trainer(**options_of("written", folder), **saved)
    again.train(resume_from_checkpoint=str(saved["folder"] / "checkpoint-1"))
    report("resumed", output, whole_weights(again), again.state.log_history)


if __name__ == "__main__":
    run_checks({name: run(name) for name in DDP | FSDP2} | {"accumulated": accumulated, "resumed": resumed})
