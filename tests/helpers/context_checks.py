"""Run by tests/training/test_context.py under torchrun, as distributed_checks.py is, whose files it writes:
rows that two processes share, against whole rows in one.

Usage: torchrun --nproc_per_node N context_checks.py STUDENT_FOLDER OUTPUT NAME...
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import ParallelismConfig
from peft import LoraConfig
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.distributed_checks import (
    DESCENT,
    GLOBAL_BATCH,
    let_fsdp_run_on_cpu,
    make_trainer,
    report,
    run_checks,
    trained,
    whole_weights,
    world_size,
)
from hpd import TermConfig
from hpd.batch import token_batch
from hpd.config import load_recipe
from hpd.files import write_atomically
from hpd.models.forward import model_inputs
from hpd.models.slices import RowSlices
from hpd.teachers import CachedTeacher
from hpd.training.run import train

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
    trained("forward_kl", pair, output, **launched(method="forward_kl", **DESCENT))


def sft(pair: Path, output: Path) -> None:
    trained("sft", pair, output, **launched(method="sft", **DESCENT))


def accumulated(pair: Path, output: Path) -> None:
    """Backward computes the layers again, and gathers again."""
    options = launched(accumulation=2, gradient_checkpointing=True, **DESCENT)
    trained("accumulated", pair, output, **options)


def self_teacher(pair: Path, output: Path) -> None:
    terms = [TermConfig(objective="nll"), TermConfig(objective="forward_kl")]
    trained("self_teacher", pair, output, **launched(teacher="self", terms=terms, **DESCENT))


def cached(pair: Path, output: Path) -> None:
    """Each process looks its part of the label positions up; the last batch is uneven, and validated."""
    options = {"count": 11, "max_steps": 2, "evaluation": 5, "eval_strategy": "steps"}
    options["teacher"] = CachedTeacher(pair / "cache")
    trained("cached", pair, output, **launched(**options, **DESCENT, eval_steps=1))


def adapter(pair: Path, output: Path) -> None:
    """LoRA works on a token alone."""
    options = {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "method": "forward_kl", **DESCENT}
    trained("adapter", pair, output, **launched(**options))


def low_precision(pair: Path, output: Path) -> None:
    trained("low_precision", pair, output, **launched(bf16=True, gradient_checkpointing=True))


def resumed(pair: Path, output: Path) -> None:
    """Two steps, then as a new trainer from their checkpoint; next to a run that nothing stopped."""
    folder = output / f"resumed-{world_size()}"
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    make_trainer(pair, folder, **launched(max_steps=2, **options)).train()
    again = make_trainer(pair, folder, **launched(**options))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    report("resumed", output, whole_weights(again), again.state.log_history)
    trained("straight", pair, output, **launched(lr_scheduler_type="constant"))


def recipe(pair: Path, output: Path) -> None:
    """`hpd train`: tasks while it trains, validation before and behind, the student written whole."""
    _recipe("recipe", pair, output)


def recipe_of_adapter(pair: Path, output: Path) -> None:
    """The same of an adapter."""
    _recipe("recipe_of_adapter", pair, output, lora={"r": 4})


def _recipe(name: str, pair: Path, output: Path, **changes) -> None:
    run, options = output / f"{name}-{world_size()}", launched()
    if world_size() > 1:
        # As `accelerate launch` says it with recipes/accelerate/fsdp2_context.yaml.
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_CP_SIZE": str(SHARING),
        }
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(16)]
    problems = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows[:3]]
    # By every process, alike.
    for file, lines in (("rows", rows), ("problems", problems)):
        write_atomically(Path(f"{run}-{file}.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    tree = {
        "student": str(pair / "student"),
        "teacher": str(pair / "teacher"),
        "data": {"path": f"{run}-rows.jsonl", "validation": 0.3},
        "train": {
            "per_device_train_batch_size": options["per_device_train_batch_size"],
            "num_train_epochs": 1,
            "logging_steps": 1,
            "metric_stride": 1,
            "max_length": 64,
            "use_cpu": True,
            **DESCENT,
        },
        "eval": {"data": f"{run}-problems.jsonl", "max_new_tokens": 8, "every": 1},
        "output_dir": str(run),
        **changes,
    }
    write_atomically(Path(f"{run}.yaml"), yaml.safe_dump(tree))
    train(load_recipe(f"{run}.yaml"))


def memory(pair: Path, output: Path) -> None:
    """Bytes that a student's body keeps for its backward pass, of one row of 4,096 tokens: all tensors that
    autograd saves, weights left out, each storage once."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    student: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **heads)).train()
    inputs = {"input_ids": torch.arange(4096)[None] % 200 + 5}
    inputs["labels"] = inputs["input_ids"]
    if world_size() > 1:
        slices = RowSlices(distributed.group.WORLD)
        slices.attach(student, "student")
        inputs, _ = slices.cut(inputs, token_batch(inputs))
    found = {"kept": _kept(student, inputs)}
    student.gradient_checkpointing_enable()
    found["recomputed"] = _kept(student, inputs)
    report("memory", output, torch.zeros(1), [], **found)


def _kept(student: Any, inputs: dict[str, Any]) -> int:
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The tensor too: what is freed would give its address to another.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.model(**model_inputs(inputs), use_cache=False)
    return sum(size for size, _ in kept.values())


CHECKS = {
    function.__name__: function
    for function in (
        hpd,
        forward_kl,
        sft,
        accumulated,
        self_teacher,
        cached,
        adapter,
        low_precision,
        resumed,
        recipe,
        recipe_of_adapter,
        memory,
    )
}


if __name__ == "__main__":
    run_checks(CHECKS)
