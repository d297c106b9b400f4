"""`hpd doctor`: what a recipe will do, before it does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from hpd.config import Recipe, TeacherConfig
from hpd.display import console, show_verdicts
from hpd.losses.operator import default_chunk_bytes
from hpd.methods import name_terms
from hpd.stages import stage_recipes
from hpd.train import Plan, plan, steps_of

__all__ = ["Memory", "diagnose", "estimate_memory"]

_GIB = 2**30


class Memory(NamedTuple):
    """Bytes of one training step on one process, by owner."""

    student: int
    gradients: int
    optimizer: int
    teacher: int
    head: int
    """The loss operator: two chunks of logits and the gradient of the head."""
    activations: int
    """Hidden states kept for the backward pass (an estimate: kernels differ in what they keep)."""

    @property
    def total(self) -> int:
        return sum(self)


def estimate_memory(planned: Plan) -> Memory:
    """Memory of a step, from the configurations alone."""
    recipe, args = planned.recipe, planned.args
    student = _num_parameters(planned.student_config)
    trained = student if recipe.lora is None else _lora_parameters(planned.student_config, recipe.lora)
    config = planned.student_config.get_text_config()
    width = 4 if recipe.student.dtype in ("auto", "float32") else 2
    teacher_bytes = _teacher_bytes(planned)
    vocab, hidden = config.vocab_size, config.hidden_size
    chunk_bytes = args.chunk_bytes or default_chunk_bytes("cuda" if torch.cuda.is_available() else "cpu")
    rows = min(chunk_bytes // (4 * vocab), args.per_device_train_batch_size * _row_tokens(planned))
    head_gradient = 0 if recipe.lora is not None else vocab * hidden * 4
    return Memory(
        student=student * width,
        gradients=trained * width,
        optimizer=trained * width * _optimizer_states(str(args.optim)),
        teacher=teacher_bytes,
        head=2 * max(rows, 1) * vocab * 4 + head_gradient,
        activations=_activation_bytes(planned),
    )


def _num_parameters(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _lora_parameters(config: Any, lora: Any) -> int:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=lora.r, target_modules=lora.target_modules))
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _teacher_bytes(planned: Plan) -> int:
    teacher = planned.recipe.teacher
    parts = teacher.teachers.values() if teacher.teachers else [teacher]
    return sum(_bytes_of(part, config, planned) for part, config in zip(parts, planned.teacher_configs.values(), strict=True))


def _bytes_of(teacher: TeacherConfig, config: Any, planned: Plan) -> int:
    if teacher.type == "server":
        # Only the head is here, and with likeliest tokens not even that.
        width = {"bfloat16": 2, "float16": 2}.get(teacher.dtype, 4)
        return config.vocab_size * config.hidden_size * width if teacher.protocol == "hpd" else 0
    if teacher.type == "self":
        return 0 if planned.recipe.lora else _num_parameters(config) * 4
    if teacher.type == "cached":
        head = Path(str(teacher.path)) / "head.safetensors"
        return head.stat().st_size if head.is_file() else 0
    saved = getattr(config, "dtype", None)
    width = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}.get(teacher.dtype) or (saved.itemsize if saved else 4.0)
    if teacher.quantization:
        width = {"4bit": 0.55, "8bit": 1.05}[teacher.quantization]  # weights and their scales
    return int(_num_parameters(config) * width)


def _optimizer_states(name: str) -> int:
    """Numbers kept per trained parameter, in the parameter's own width."""
    return 0 if "sgd" in name else 1 if "adafactor" in name or "lion" in name or "8bit" in name else 2


def _row_tokens(planned: Plan) -> int:
    return min(planned.lengths.percentiles[99], planned.args.max_length or planned.lengths.percentiles[100])


def _activation_bytes(planned: Plan) -> int:
    """A llama-shaped layer keeps about 8 D + 2 D_kv + 4 I numbers per token; checkpointing keeps one D per layer."""
    config, args = planned.student_config.get_text_config(), planned.args
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    key_value = hidden * (getattr(config, "num_key_value_heads", None) or heads) // heads
    layer = 8 * hidden + 2 * key_value + 4 * inner
    per_token = config.num_hidden_layers * layer
    if args.gradient_checkpointing:
        per_token = config.num_hidden_layers * hidden + layer
    width = 2 if args.bf16 or args.fp16 else 4
    return args.per_device_train_batch_size * _row_tokens(planned) * per_token * width


def _show_regime(recipe: Recipe) -> None:
    """Who writes the rows, where it is not the dataset alone, and the stages."""
    regime = recipe.choose_regime()
    if regime.prefixes.on_policy:
        first, last = regime.prefixes.student_share(0.0), regime.prefixes.student_share(1.0)
        span = f"{first:.0%}" if first == last else f"{first:.0%} to {last:.0%}"
        what = f"up to {regime.prefixes.continue_tokens or regime.rollouts.max_new_tokens} tokens by {regime.rollouts.engine}"
        adaptive = ", then as the validation loss says" if regime.prefixes.adaptive else ""
        console.print(f"student writes {span} of the rows{adaptive}: {what}", highlight=False)
    if regime.strategy.type != "direct":
        console.print(f"strategy {regime.strategy.type}, {regime.strategy.updates} updates a batch", highlight=False)
    for stage in stage_recipes(recipe):
        kind = "dpo" if stage.dpo else stage.recipe.method or ("terms" if stage.recipe.terms else "hpd")
        console.print(f"stage {stage.name}: {kind}, in {stage.recipe.output_dir}", highlight=False)


def diagnose(recipe: Recipe) -> bool:
    """Print everything known about a run before its start; False when it would fail."""
    planned = plan(recipe)
    show_verdicts(planned.verdicts)
    rows = planned.rows
    count = f"{len(rows.train):,}" if hasattr(rows.train, "__len__") else "a stream of"  # type: ignore[arg-type]
    held_out = f", {len(rows.validation):,} held out" if hasattr(rows.validation, "__len__") else ""  # type: ignore[arg-type]
    steps = steps_of(planned)
    args = planned.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    console.print(f"{count} rows{held_out}; {steps if steps is not None else 'unknown'} steps of {batch} rows", highlight=False)
    for term in name_terms(recipe.choose_terms()):
        console.print(f"term {term.name}: weight {term.weight:g} on {term.support}", highlight=False)
    _show_regime(recipe)
    table = Table(title="memory of a step, per process", title_justify="left", show_footer=True)
    memory = estimate_memory(planned)
    table.add_column("", footer="total")
    table.add_column("GiB", justify="right", footer=f"{memory.total / _GIB:.2f}")
    for name, size in memory._asdict().items():
        table.add_row(name, f"{size / _GIB:.2f}")
    console.print(table)
    return not any(verdict.level == "error" for verdict in planned.verdicts)
