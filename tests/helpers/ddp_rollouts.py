"""Run by tests/training/test_distributed_rollouts.py on two processes: a few on-policy steps, steps on stored
rollouts or with rules over positions, or generation under FSDP2.

Usage: torchrun --nproc_per_node 2 ddp_rollouts.py MODE STUDENT TEACHER OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd import DistillConfig, DistillTrainer, TermConfig
from hpd.batch import uniforms
from hpd.data.taken_apart import rows_of
from hpd.generation.rollouts import make_engine
from hpd.methods.position_rules import PositionRule
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.training.stopping import leaving_processes

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def few_steps(output: Path, steps: int, processes: int) -> DistillConfig:
    """Steps of eight rows in all, in the order of the dataset."""
    return DistillConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=8 // processes,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_length=64,
        use_cpu=True,
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        dataset_num_proc=None,
        metric_stride=1,
    )


def train(student: str, teacher: str, output: Path, processes: int) -> None:
    """Three steps of eight rows in all; every process writes down the rows it trained on."""
    rows = [
        {"prompt": f"say {WORDS[i % 8]} {WORDS[i // 8]}:", "completion": f" {WORDS[i % 8]}"}
        for i in range(24)
    ]
    args = few_steps(output, 3, processes)
    trainer = DistillTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        method="forward_kl",
        prefixes=Prefixes(student=0.7),
        rollouts=RolloutConfig(max_new_tokens=6),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    seen, collate = [], trainer._step.begin

    def begin(batches, step, progress):
        out = collate(batches, step, progress)
        seen.append([row.input_ids for batch in out for row in rows_of(batch)])
        return out

    trainer._step.begin = begin
    trainer.train()
    rank = trainer.accelerator.process_index
    norm = sum(float(p.detach().double().square().sum()) for p in trainer.model.parameters())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    (output / f"{processes}-{rank}.json").write_text(json.dumps({"rows": seen, "norm": norm, "logs": logs}))


RULES = (
    PositionRule(rule="column", column="merit"),
    PositionRule(rule="first", share=0.5),
    PositionRule(rule="entropy", share=0.5),
    PositionRule(rule="drift", gain=0.7),
)


def train_prepared(student: str, teacher: str, output: Path, name: str) -> None:
    """Two steps of eight rows of token ids in all: rollouts that were stored, streamed or not, or rows whose
    tokens weigh differently (`name`)."""
    lengths = [1 + i % 5 for i in range(16)]
    rows = [
        {
            "input_ids": [1, *(10 + (7 * i + j) % 200 for j in range(3 + length))],
            "labels": [-100] * 4 + [10 + (7 * i + j) % 200 for j in range(3, 3 + length)],
            "behavior_logprobs": [None] * 4 + [-3.0 - 0.4 * (j % 7) for j in range(length)],
        }
        for i, length in enumerate(lengths)
    ]
    learned: dict[str, Any] = {"method": "opd", "prefixes": Prefixes(student=1.0, stored=True)}
    if name == "weighed":
        rows = [
            {"input_ids": row["input_ids"], "labels": row["labels"], "merit": 0.5 + i % 3}
            for i, row in enumerate(rows)
        ]
        learned = {"terms": [TermConfig(objective="forward_kl", weight=rule) for rule in RULES]}
    data = Dataset.from_list(rows)
    processes = int(os.environ["WORLD_SIZE"])
    trainer = DistillTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        **learned,
        args=few_steps(output / name, 2, processes),
        train_dataset=data.to_iterable_dataset() if name.startswith("stream") else data,
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    norm = sum(float(p.detach().double().square().sum()) for p in trainer.model.parameters())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    rank = trainer.accelerator.process_index
    (output / f"{name}-{processes}-{rank}.json").write_text(json.dumps({"norm": norm, "logs": logs}))


def generate(student: str, output: Path) -> None:
    """The same prompts by a sharded student and by a whole one; the processes have unequal numbers of
    them."""
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    tokenizer = AutoTokenizer.from_pretrained(student)
    whole, sharded = (AutoModelForCausalLM.from_pretrained(student) for _ in range(2))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    prompts = [tokenizer(f"say {word}:")["input_ids"] for word in WORDS[: 5 - 2 * rank]]
    numbers = uniforms(torch.arange(len(prompts)), seed=rank, step=0, count=8)
    accelerator, config = Accelerator(cpu=True), RolloutConfig(batch_size=2)
    results = []
    for model in (whole, sharded):
        engine = make_engine(config, lambda model=model: model, model, accelerator, tokenizer, None)
        results.append(
            [rollout.tokens for rollout in engine.generate(prompts, [8] * len(prompts), numbers, 0)]
        )
    (output / f"fsdp-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    mode, student_path, teacher_path, out = sys.argv[1:]
    torch.set_num_threads(1)
    with leaving_processes():
        if mode == "fsdp":
            generate(student_path, Path(out))
        elif mode in ("stored", "stream", "weighed"):
            train_prepared(student_path, teacher_path, Path(out), mode)
        else:
            train(student_path, teacher_path, Path(out), int(mode))
