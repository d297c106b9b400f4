"""Is the engine that shards or replicates the model the one that was asked for, and does the loss work under it?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

__all__ = ["check_engine"]

# How `accelerate launch` and its configuration files ask for an engine, and the field of TrainingArguments that asks too.
_ENGINES = (
    (DistributedType.FSDP, "ACCELERATE_USE_FSDP", "fsdp"),
    (DistributedType.DEEPSPEED, "ACCELERATE_USE_DEEPSPEED", "deepspeed"),
    (DistributedType.MEGATRON_LM, "ACCELERATE_USE_MEGATRON_LM", ""),
)


def check_engine(args: Any, accelerator: Accelerator, recomputes: bool = False) -> None:
    """Refuse what would run silently under another engine than asked for, and what the loss cannot work under.

    Accelerate falls back to DDP, without a word, where FSDP is asked for and no accelerator is found (or `use_cpu` is set).

    Args:
        args: TrainingArguments.
        accelerator: built from them.
        recomputes: whether the loss reads the head again in the backward pass.

    Raises:
        ValueError: another engine than asked for; FSDP 1, Megatron-LM, context or sequence parallelism.
    """
    got = accelerator.distributed_type
    for engine, variable, field in _ENGINES:
        asked = os.environ.get(variable, "false").lower() in ("true", "1") or bool(field and getattr(args, field, None))
        if asked and got != engine:
            raise ValueError(
                f"{engine.value} was asked for (accelerate's configuration or train.{field or 'fsdp'}), and accelerate chose "
                f"{got.value} on {accelerator.num_processes} {accelerator.device.type} process(es): FSDP and DeepSpeed need "
                "two or more processes, each with an accelerator. Launch it there, or ask for DDP "
                "(recipes/accelerate/ddp.yaml, on a CPU cpu.yaml)."
            )
    if got == DistributedType.MEGATRON_LM:
        raise ValueError("Megatron-LM computes its own loss: use FSDP2 or DeepSpeed ZeRO (recipes/accelerate/).")
    if got == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:  # type: ignore[union-attr]
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2 (recipes/accelerate/fsdp2.yaml).")
    if got == DistributedType.DEEPSPEED:
        deepspeed: Any = accelerator.state.deepspeed_plugin
        if deepspeed.zero_stage == 3:
            _check_zero3(deepspeed.deepspeed_config["zero_optimization"], recomputes)
    layout = accelerator.parallelism_config
    for name, flag in (("context", "cp_enabled"), ("sequence", "sp_enabled")):
        if layout is not None and getattr(layout, flag, False):
            # They cut each row into pieces after collation, and `TokenBatch.index` names positions of whole rows.
            raise ValueError(
                f"{name} parallelism cuts rows after their label positions were found, and the loss would read wrong ones: "
                "for long rows use FSDP2 with gradient checkpointing and a smaller train.per_device_train_batch_size."
            )
    if layout is not None and layout.tp_enabled:
        raise ValueError(
            "Tensor parallelism shards a model when it is loaded, and recipes load whole models: use FSDP2 "
            "(recipes/accelerate/fsdp2.yaml), or serve a large teacher with vLLM (teacher: {type: server})."
        )


def _check_zero3(settings: Mapping[str, Any], recomputes: bool) -> None:
    if not settings.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError("ZeRO-3 without zero3_save_16bit_model exports no weights: set it (recipes/accelerate/zero3.yaml).")
    if recomputes:
        raise ValueError(
            "strategy: policy_gradient reads the head again in the backward pass, when ZeRO-3 has emptied it: use ZeRO-2 or "
            "FSDP2."
        )
