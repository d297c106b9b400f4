"""Time and peak memory of a whole training step: HPD with a live teacher beside TRL's SFTTrainer on the
student alone.

    python benchmarks/step.py [--repeats 5] [--methods hpd,forward_kl] [--cached] [--memory]
        [--bf16] [--json | --check]
    python benchmarks/step.py --docs    # docs/performance.md from the stored result, nothing measured
    python benchmarks/step.py --tiny --cached    # in seconds: whether it runs

Same student (SmolLM2's shape cut to 10 layers), data, optimizer and batch: 2 rows of 512 tokens, three
quarters of them labeled, float32 (with --bf16, HPD in bfloat16 mixed precision too). The teacher has
SmolLM2's 30 layers. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import run
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors.torch import save_file
from timing import (
    check_tiny,
    count,
    interleaved,
    machine,
    ratios,
    replace_block,
    resident_mib,
    spread,
    store_or_check,
    stored,
    table,
)
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd import DistillConfig, DistillTrainer
from hpd.batch import TokenBatch
from hpd.data.collator import DistillCollator
from hpd.files import write_atomically
from hpd.teachers import CachedTeacher
from hpd.teachers.cache import FORMAT, read_json, save_index, save_shard

ROWS, LABELED = 2, 0.75


class Body(NamedTuple):
    """One model's shape."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool = True
    dtype: torch.dtype = torch.float32


class Shape(NamedTuple):
    """What both models and the rows are made of."""

    vocab: int
    tokens: int
    student: Body
    teacher: Body


SMOLLM2 = Shape(49152, 512, Body(10, 576, 1536, 9, 3), Body(30, 576, 1536, 9, 3))
TINY = Shape(64, 16, Body(1, 12, 16, 3, 1), Body(2, 12, 16, 3, 1))
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": ROWS,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "max_steps": 1,
}


def config(shape: Shape, body: Body) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=body.layers,
        vocab_size=shape.vocab,
        hidden_size=body.hidden,
        intermediate_size=body.intermediate,
        num_attention_heads=body.heads,
        num_key_value_heads=body.kv_heads,
        tie_word_embeddings=body.tied,
        max_position_embeddings=8192,
    )


def model(shape: Shape, body: Body, seed: int, device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config(shape, body), dtype=body.dtype)


def rows(shape: Shape) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab, (ROWS, shape.tokens), generator=generator).tolist()
    start = int(shape.tokens * (1 - LABELED))
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * start + row[start:]} for row in ids])


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def step_of(trainer: SFTTrainer) -> Callable[[], None]:
    """One optimizer step on one batch, as the trainer's own loop does it."""
    # What `train` does first: without it nothing runs in mixed precision, and no activation is recomputed.
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    assert trainer.optimizer is not None
    batch = next(iter(trainer.get_train_dataloader()))
    count = batch["labels"][:, 1:].ne(-100).sum()

    ask = getattr(trainer.data_collator, "ask", None)
    positions = TokenBatch.pop(dict(batch)) if ask else None

    def step() -> None:
        inputs = dict(batch)
        if ask:
            # As in the trainer's own loop, the teacher is asked about the next step while this one runs.
            batch["asked"] = ask(batch, positions)
        trainer.training_step(trainer.model, inputs, num_items_in_batch=count)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def cached_teacher(shape: Shape, folder: Path) -> CachedTeacher:
    """A hidden cache of the rows: the teacher's shape, random numbers, in its dtype."""
    collator = DistillCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    keys = torch.cat([keys for _, keys in collator.rows(rows(shape))])
    generator = torch.Generator().manual_seed(1)
    shard = {
        "hidden": torch.randn(len(keys), shape.teacher.hidden, generator=generator).to(shape.teacher.dtype),
        "log_z": torch.full((len(keys),), 11.0),
    }
    folder.mkdir(parents=True)
    save_shard(folder, 0, shard)
    weight = torch.randn(shape.vocab, shape.teacher.hidden, generator=generator) * 0.02
    head = {"weight": weight.to(shape.teacher.dtype)}
    write_atomically(folder / "head.safetensors", lambda draft: save_file(head, draft))
    about = {
        "format": FORMAT,
        "kind": "hidden",
        "vocab": shape.vocab,
        "head": {"scale": 1.0, "softcap": None},
        "fingerprint": {},
    }
    save_index(folder, keys.numpy(), [read_json(folder / "shard-00000.json")], about)
    return CachedTeacher(folder)


def candidate(
    name: str, folder: str, shape: Shape, device: str = "cpu", **changed: Any
) -> Callable[[], None]:
    """`SFTTrainer`, or a method of the table with a live teacher or a cached one.

    Args:
        name: METHOD, `METHOD (cached)`, `METHOD (cached, bf16)`, `METHOD (reference)` or `SFTTrainer`.
        folder: of the run.
        shape: of both models and the rows.
        device: that both models are made on.
        changed: settings of the trainer that differ from SETTINGS.
    """
    common = {"train_dataset": rows(shape), "processing_class": tokenizer()}
    folder = str(Path(folder) / name.replace(" ", "_"))
    settings = {**SETTINGS, "output_dir": folder, "max_length": shape.tokens, **changed}
    if name.endswith("bf16)"):
        settings["bf16"] = True
    student = model(shape, shape.student, 0, device)
    if name == "SFTTrainer":
        return step_of(SFTTrainer(model=student, args=SFTConfig(**settings), **common))
    impl = "reference" if name.endswith("(reference)") else "chunked"
    teacher = (
        cached_teacher(shape, Path(folder) / "cache")
        if "(cached" in name
        else model(shape, shape.teacher, 1, device)
    )
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        method=name.split(" ")[0],
        args=DistillConfig(**{"impl": impl, **settings}),
        **common,
    )
    return step_of(trainer)


def peak_mib(name: str, tiny: bool) -> float:
    """Peak resident memory of a process that takes two such steps."""
    command = [sys.executable, __file__, "--peak-of", name, *(["--tiny"] if tiny else [])]
    done = run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def tables(result: dict[str, Any]) -> str:
    """A stored result as docs/performance.md shows it."""
    peaks = result["peak_mib"]
    rows = [
        [name, f"{ratio:.2f}", *spread(result["seconds"][name]), *([f"{peaks[name]:.0f}"] if peaks else [])]
        for name, ratio in result["ratios"]["step"].items()
    ]
    return table(["step", "x SFTTrainer", "median s", "range s", *(["peak MiB"] if peaks else [])], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="hpd,forward_kl,hpd (reference)")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="also HPD with a cached teacher")
    parser.add_argument(
        "--bf16", action="store_true", help="also HPD with a cached teacher, in bfloat16 mixed precision"
    )
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in a process each")
    parser.add_argument(
        "--json", action="store_true", help="store the ratios in benchmarks/results/step.json"
    )
    parser.add_argument("--check", action="store_true", help="compare with the stored ratios")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument(
        "--docs", action="store_true", help="write the stored result into docs/performance.md, and stop"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether the script runs")
    options = parser.parse_args()
    check_tiny(parser, options, options.tiny)
    shape = TINY if options.tiny else SMOLLM2
    if options.docs:
        replace_block("step table", tables(stored("step")))
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.peak_of:
            step = candidate(options.peak_of, folder, shape)
            step(), step()
            print(resident_mib("VmHWM"))
            return
        names = ["SFTTrainer", *options.methods.split(",")]
        names += ["hpd (cached)"] * options.cached + ["hpd (cached, bf16)"] * options.bf16
        seconds = interleaved({name: candidate(name, folder, shape) for name in names}, options.repeats)
    result = {"machine": machine(), "ratios": {"step": ratios(seconds, "SFTTrainer")}, "seconds": seconds}
    result["peak_mib"] = {name: peak_mib(name, options.tiny) for name in names} if options.memory else {}
    print(f"\nstep of {ROWS} x {shape.tokens} tokens, {LABELED:.0%} labeled, {result['machine']}\n")
    print(tables(result))
    store_or_check("step", result, options.json, options.check)


if __name__ == "__main__":
    main()
