"""`DistillConfig`, the settings of a trainer: from a recipe, checked; and the engine that was asked for."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import ConfigDict, TypeAdapter, ValidationError
from trl import SFTConfig

from hpd.config.schema import Recipe
from hpd.config.yaml_file import shorten
from hpd.losses.heads import POLICIES
from hpd.losses.operator import IMPLEMENTATIONS
from hpd.methods.fields import nearest
from hpd.objectives.estimators import ESTIMATORS

__all__ = ["DistillConfig", "check_engine", "train_arguments"]

# Names that a field takes.
_CHOICES = {"vocabulary": POLICIES, "impl": tuple(IMPLEMENTATIONS), "kl_estimator": ESTIMATORS}

# Least values of fields that their libraries take without a check, or complain about in the middle of a run.
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "chunk_bytes": 1,
    "metric_stride": 0,
}

# Fields that would do nothing in a recipe, which loads model and tokenizer itself.
_ELSEWHERE = {
    "trust_remote_code": "student.trust_remote_code (and teacher.trust_remote_code)",
    "model_init_kwargs": "student.dtype, student.attn_implementation and student.revision",
}

# How `accelerate launch` and its configuration files ask for an engine, and the field of TrainingArguments
# that asks too.
_ENGINES = (
    (DistributedType.FSDP, "ACCELERATE_USE_FSDP", "fsdp"),
    (DistributedType.DEEPSPEED, "ACCELERATE_USE_DEEPSPEED", "deepspeed"),
    (DistributedType.MEGATRON_LM, "ACCELERATE_USE_MEGATRON_LM", ""),
)


@dataclass
class DistillConfig(SFTConfig):
    """Every setting of TRL's `SFTConfig`, and those of the distillation loss.

    Raises:
        ValueError: a name that is not declared, or a number out of range or not finite.
    """

    vocabulary: str = field(
        default="error", metadata={"help": "Unequal vocabularies: 'error', or 'shared_prefix'."}
    )
    impl: str = field(
        default="chunked",
        metadata={
            "help": "Operator: 'chunked' (fused), 'compiled' (also torch.compile), or 'reference' (whole "
            "logits)."
        },
    )
    chunk_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Bytes of one chunk of logits; two chunks are kept. null: 128 MiB on a CPU, 512 MiB on "
            "an accelerator."
        },
    )
    metric_stride: int = field(
        default=16,
        metadata={
            "help": "KLs, entropies and agreement on every n-th label position while training (evaluation "
            "uses all); 0 turns them off. They are the only part of HPD that costs passes over the "
            "vocabulary."
        },
    )
    kl_estimator: str = field(
        default="exact",
        metadata={
            "help": "Also log the reverse KL as k1, k2, k3 or rao_blackwell estimate it at the drawn tokens."
        },
    )
    # A check of every micro-batch's loss would synchronise the device; a non-finite loss shows at the next
    # log.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Skip non-finite losses when averaging."}
    )

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"train.{name} is {value!r}. {nearest(str(value), allowed)}")
        for name in (f.name for f in dataclasses.fields(self) if f.init):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"train.{name} must be finite, got {value}.")
            if name in _AT_LEAST and isinstance(value, (int, float)) and value < _AT_LEAST[name]:
                raise ValueError(f"train.{name} must be >= {_AT_LEAST[name]}, got {value}.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"train.num_train_epochs must be > 0 without train.max_steps, got {self.num_train_epochs}."
            )
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError(
                "train.activation_offloading moves activations from an accelerator to the CPU's memory, and "
                "there is none here: remove it (gradient_checkpointing saves memory everywhere)."
            )
        if self.bf16 is None and not self.fp16:
            # TRL's default is bf16 everywhere; on a CPU its products are tens of times slower than float32's.
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


def train_arguments(recipe: Recipe, **forced: Any) -> DistillConfig:
    """`DistillConfig` from `train:`, every value checked against its field.

    Raises:
        ValueError: unknown field (with the nearest one), a value of the wrong type or out of range, or a
            field that has its place elsewhere in the recipe.
    """
    hints = get_type_hints(DistillConfig)
    names = [f.name for f in dataclasses.fields(DistillConfig) if f.init]
    values: dict[str, Any] = {}
    for key, value in recipe.train.items():
        if key not in names:
            close = get_close_matches(key, names, n=1)
            hint = (
                f"; did you mean {close[0]!r}?"
                if close
                else ": a field of TRL's SFTConfig, such as learning_rate or max_steps."
            )
            raise ValueError(f"unknown key 'train.{key}'{hint}")
        if key in forced:
            raise ValueError(f"train.{key} is set by the recipe's own keys; remove it from train.")
        if key in _ELSEWHERE and value:
            raise ValueError(f"train.{key} has no effect: set {_ELSEWHERE[key]} instead.")
        if value is False and not _takes(hints[key], bool) and _takes(hints[key], str):
            value = "no"  # YAML reads save_strategy: no, and off, as a truth value
        try:
            values[key] = TypeAdapter(
                hints[key], config=ConfigDict(arbitrary_types_allowed=True)
            ).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"train.{key}: {error.errors()[0]['msg']}, got {shorten(value)}") from None
    if recipe.data.streaming and values.get("max_steps", -1) <= 0:
        raise ValueError("data.streaming needs train.max_steps: a stream has no known length.")
    values.setdefault("max_length", 1024)
    values["assistant_only_loss"] = recipe.data.labels == "assistant"
    values["completion_only_loss"] = None if recipe.data.labels != "all" else False
    try:
        return DistillConfig(output_dir=recipe.output_dir, **{**values, **forced})
    except (TypeError, ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        # transformers, TRL and accelerate check the fields against each other and the machine, each with its
        # own error.
        text = " ".join(str(error).split())
        raise ValueError(text if text.startswith("train.") else f"train: {text}") from None


def _takes(hint: Any, kind: type) -> bool:
    """True if a type hint has `kind` among its alternatives."""
    return hint is kind or any(_takes(part, kind) for part in get_args(hint))


def check_engine(args: Any, accelerator: Accelerator, recomputes: bool = False) -> None:
    """Refuse what would run silently under another engine than asked for, and what the loss cannot work
    under.

    Accelerate falls back to DDP silently where FSDP is asked for and no accelerator is found (or
    `use_cpu` is set).

    Args:
        args: TrainingArguments.
        accelerator: built from them.
        recomputes: the loss reads the head again in the backward pass.

    Raises:
        ValueError: another engine than asked for; FSDP 1, Megatron-LM, context or sequence parallelism.
    """
    got = accelerator.distributed_type
    _check_asked(args, accelerator)
    if got == DistributedType.MEGATRON_LM:
        raise ValueError(
            "Megatron-LM computes its own loss: use FSDP2 or DeepSpeed ZeRO (recipes/accelerate/)."
        )
    state: Any = accelerator.state
    if got == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP version 1 is not supported: set fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)."
        )
    if got == DistributedType.DEEPSPEED:
        deepspeed = state.deepspeed_plugin
        if deepspeed.zero_stage == 3:
            _check_zero3(deepspeed.deepspeed_config["zero_optimization"], recomputes)
    _check_layout(accelerator.parallelism_config)


def _check_asked(args: Any, accelerator: Accelerator) -> None:
    got = accelerator.distributed_type
    for engine, variable, name in _ENGINES:
        asked = os.environ.get(variable, "false").lower() in ("true", "1") or bool(
            name and getattr(args, name, None)
        )
        if asked and got != engine:
            raise ValueError(
                f"{engine.value} was asked for (accelerate's configuration or train.{name or 'fsdp'}), and "
                f"accelerate chose {got.value} on {accelerator.num_processes} {accelerator.device.type} "
                "process(es): FSDP and DeepSpeed need two or more processes, each with an accelerator. "
                "Launch it there, or ask for DDP (recipes/accelerate/ddp.yaml, on a CPU cpu.yaml)."
            )


def _check_layout(layout: Any) -> None:
    if layout is None:
        return
    for name, flag in (("context", "cp_enabled"), ("sequence", "sp_enabled")):
        if getattr(layout, flag, False):
            # They cut each row into pieces after collation, and `TokenBatch.index` names positions of whole
            # rows.
            raise ValueError(
                f"{name} parallelism cuts rows after their label positions were found, and the loss would "
                "read wrong ones: for long rows use FSDP2 with gradient checkpointing and a smaller "
                "train.per_device_train_batch_size."
            )
    if layout.tp_enabled:
        raise ValueError(
            "Tensor parallelism shards a model when it is loaded, and recipes load whole models: use FSDP2 "
            "(recipes/accelerate/fsdp2.yaml), or serve a large teacher with vLLM (teacher: {type: server})."
        )


def _check_zero3(settings: Mapping[str, Any], recomputes: bool) -> None:
    if not settings.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "ZeRO-3 without zero3_save_16bit_model exports no weights: set it "
            "(recipes/accelerate/zero3.yaml)."
        )
    if recomputes:
        raise ValueError(
            "strategy: policy_gradient reads the head again in the backward pass, when ZeRO-3 has emptied "
            "it: use ZeRO-2 or FSDP2."
        )
