"""The engine that was asked for: DDP, FSDP2 or DeepSpeed, and what the loss cannot work under."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ParallelismConfig

__all__ = ["check_engine", "check_launch", "check_launched", "check_sizes", "engines_asked", "layout_asked"]

# How `accelerate launch` and its configuration files ask for an engine, and the field of TrainingArguments
# that asks too.
_ENGINES = (
    (DistributedType.FSDP, "ACCELERATE_USE_FSDP", "fsdp"),
    (DistributedType.DEEPSPEED, "ACCELERATE_USE_DEEPSPEED", "deepspeed"),
    (DistributedType.MEGATRON_LM, "ACCELERATE_USE_MEGATRON_LM", ""),
)


_ACCELERATORS = "it needs two or more processes, each with an accelerator."
_NEEDS = {
    DistributedType.FSDP: "it needs two or more processes, each with an accelerator "
    "(recipes/accelerate/fsdp2.yaml).",
    DistributedType.DEEPSPEED: "it needs a launcher (accelerate launch, torchrun), and on a CPU neither "
    "train.use_cpu nor accelerate's use_cpu, which switch it off.",
}
"""What an engine needs to be chosen, where that is not `_ACCELERATORS`."""
_UNSHARDED: tuple[DistributedType, ...] = (DistributedType.NO, DistributedType.MULTI_CPU)
"""Processes of which accelerate never makes FSDP."""


def check_launch(args: Any) -> None:
    """Refuse, before a model loads, what is known of a launch as soon as its processes are joined.

    Args:
        args: TrainingArguments.

    Raises:
        ValueError: processes that are not joined, FSDP where accelerate would run none, or processes laid out
            in a way in which the loss cannot work.
    """
    assert args.device is not None  # asking for it joins the processes
    check_launched(args, args.world_size)
    if DistributedType.FSDP in engines_asked(args) and PartialState().distributed_type in _UNSHARDED:
        _refuse(DistributedType.FSDP, PartialState())
    _check_layout(layout_asked(args))


def check_sizes(args: Any) -> None:
    """Refuse sizes of a layout of processes that are not those of the launch, or that nothing would follow.

    Args:
        args: TrainingArguments.

    Raises:
        ValueError: another number of processes, or rows or weights that are to be shared without FSDP2.
    """
    layout = layout_asked(args)
    if layout is None or layout.total_size == 1:
        return
    if layout.total_size != args.world_size:
        raise ValueError(
            f"The launch asks for {layout.total_size} processes (cp_size {layout.cp_size} x dp_shard_size "
            f"{layout.dp_shard_size} x the other sizes), and there are {args.world_size}: start as many, or "
            "change the sizes under parallelism_config."
        )
    if DistributedType.FSDP not in engines_asked(args) and (layout.cp_enabled or layout.dp_shard_enabled):
        raise ValueError(
            f"Processes share rows (cp_size: {layout.cp_size}) or weights (dp_shard_size: "
            f"{layout.dp_shard_size}) under FSDP2 only, and it was not asked for: launch with "
            "distributed_type: FSDP on as many processes with an accelerator each "
            "(recipes/accelerate/fsdp2_context.yaml, fsdp2.yaml), or without these sizes."
        )


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
        ValueError: another engine than asked for; FSDP 1, Megatron-LM, sequence or tensor parallelism.
    """
    got = accelerator.distributed_type
    check_launched(args, accelerator.num_processes)
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


def check_launched(args: Any, num_processes: int) -> None:
    """Refuse processes that a launcher started together and that do not know of each other: each would train
    on all rows, into one folder.

    Raises:
        ValueError: fewer processes (`num_processes`) are joined than the launcher started.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched <= num_processes:
        return
    way = "with train.use_cpu: true (recipes/accelerate/cpu.yaml)"
    if DistributedType.DEEPSPEED in engines_asked(args):
        # Of train.deepspeed transformers tells accelerate no backend, and without an accelerator there is no
        # other.
        way = "by accelerate launch (recipes/accelerate/zero2.yaml) with train.ddp_backend: gloo"
        way += " and without train.deepspeed" if getattr(args, "deepspeed", None) else ""
    raise ValueError(
        f"The launcher started {launched} processes, and each would train alone on all rows: "
        f"without an accelerator they are joined only {way}. Set it, or start one process."
    )


def engines_asked(args: Any) -> list[DistributedType]:
    """The engines that accelerate's configuration or TrainingArguments ask for, beside DDP."""
    return [
        engine
        for engine, variable, name in _ENGINES
        if os.environ.get(variable, "false").lower() in ("true", "1") or (name and getattr(args, name, None))
    ]


def layout_asked(args: Any) -> ParallelismConfig | None:
    """The layout of processes that TrainingArguments or accelerate's launcher ask for."""
    if args.parallelism_config is not None:
        return args.parallelism_config
    by_launcher = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
    return ParallelismConfig() if by_launcher else None


def _check_asked(args: Any, accelerator: Accelerator) -> None:
    for asked in engines_asked(args):
        if asked != accelerator.distributed_type:
            _refuse(asked, accelerator)


def _refuse(asked: DistributedType, got: Any) -> NoReturn:
    """`got` is an Accelerator, or the PartialState before it."""
    raise ValueError(
        f"{asked.value} was asked for (accelerate's configuration, train.fsdp or train.deepspeed), and "
        f"accelerate chose {got.distributed_type.value} on {got.num_processes} {got.device.type} "
        f"process(es): {_NEEDS.get(asked, _ACCELERATORS)} Launch it so, or ask for DDP "
        "(recipes/accelerate/ddp.yaml, on a CPU cpu.yaml)."
    )


def _check_layout(layout: Any) -> None:
    if layout is None:
        return
    if getattr(layout, "sp_enabled", False):
        # Its batches are cut after collation, and `TokenBatch.index` names positions of whole rows.
        raise ValueError(
            "Sequence parallelism (sp_size) is DeepSpeed's, which cuts rows after their label positions were "
            "found, and the loss would read wrong ones: use FSDP2 with cp_size "
            "(recipes/accelerate/fsdp2_context.yaml)."
        )
    if layout.cp_enabled:
        if layout.cp_handler.cp_comm_strategy != "allgather":
            raise ValueError(
                f"parallelism_config_cp_comm_strategy: {layout.cp_handler.cp_comm_strategy} has no effect, "
                "since hpd gathers keys and values of all slices in every layer: set allgather."
            )
        if layout.dp_replicate_enabled:
            raise ValueError(
                "Context parallelism (cp_size) was not tried with parallelism_config_dp_replicate_size above "
                "1: shard over all processes (parallelism_config_dp_shard_size), and leave it out."
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
