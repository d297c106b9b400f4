"""Time and peak memory of a whole training step: HPD with a live teacher beside TRL's SFTTrainer on the
student alone.

    python benchmarks/step.py [--repeats 5] [--methods hpd,forward_kl] [--cached] [--memory]
        [--json | --check]
    python benchmarks/step.py --docs    # docs/performance.md from the stored result, nothing measured
    python benchmarks/step.py --tiny --cached    # in seconds: whether it runs

Same student (SmolLM2's shape cut to 10 layers), data, optimizer and batch: 2 rows of 512 tokens, three
quarters of them labeled, float32. The teacher has SmolLM2's 30 layers. Weights are random: time does not
depend on them.
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
from hpd.batch import DistillCollator, TokenBatch
from hpd.files import write_atomically
from hpd.teachers import CachedTeacher
from hpd.teachers.cache import FORMAT, read_json, save_index, save_shard

ROWS, LABELED = 2, 0.75


class Shape(NamedTuple):
    """What both models and the rows are made of."""

    vocab: int = 49152
    tokens: int = 512
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    student_layers: int = 10
    teacher_layers: int = 30


TINY = Shape(64, 16, 12, 16, 3, 1, 1, 2)
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


def model(shape: Shape, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=layers,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config)


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
    trainer.create_optimizer()
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
    """A float32 hidden cache of the rows: the teacher's shape, random numbers."""
    collator = DistillCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    keys = torch.cat([keys for _, keys in collator.rows(rows(shape))])
    generator = torch.Generator().manual_seed(1)
    shard = {
        "hidden": torch.randn(len(keys), shape.hidden, generator=generator),
        "log_z": torch.full((len(keys),), 11.0),
    }
    folder.mkdir()
    save_shard(folder, 0, shard)
    head = {"weight": torch.randn(shape.vocab, shape.hidden, generator=generator) * 0.02}
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


def candidate(name: str, folder: str, shape: Shape) -> Callable[[], None]:
    """`SFTTrainer`, or a method of the table with a live teacher or a cached one."""
    common = {"train_dataset": rows(shape), "processing_class": tokenizer()}
    settings = {**SETTINGS, "output_dir": folder, "max_length": shape.tokens}
    student = model(shape, shape.student_layers, 0)
    if name == "SFTTrainer":
        return step_of(SFTTrainer(model=student, args=SFTConfig(**settings), **common))
    impl = "reference" if name.endswith("(reference)") else "chunked"
    teacher = (
        cached_teacher(shape, Path(folder) / "cache")
        if name.endswith("(cached)")
        else model(shape, shape.teacher_layers, 1)
    )
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        method=name.split(" ")[0],
        args=DistillConfig(impl=impl, **settings),
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="also HPD with a cached teacher")
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
    shape = TINY if options.tiny else Shape()
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
        names = ["SFTTrainer", *options.methods.split(","), *(["hpd (cached)"] if options.cached else [])]
        seconds = interleaved({name: candidate(name, folder, shape) for name in names}, options.repeats)
    result = {"machine": machine(), "ratios": {"step": ratios(seconds, "SFTTrainer")}, "seconds": seconds}
    result["peak_mib"] = {name: peak_mib(name, options.tiny) for name in names} if options.memory else {}
    print(f"\nstep of {ROWS} x {shape.tokens} tokens, {LABELED:.0%} labeled, {result['machine']}\n")
    print(tables(result))
    store_or_check("step", result, options.json, options.check)


if __name__ == "__main__":
    main()
