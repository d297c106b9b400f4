"""Every setting of TRL's SFTConfig: used, refused by name, or without effect for a stated reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Mapping
from typing import Any

from hpd.methods.fields import nearest

__all__ = [
    "IN_RECIPES",
    "REFUSED",
    "USED",
    "WITHOUT_EFFECT",
    "check_before",
    "check_operator",
    "check_settings",
    "check_special_tokens",
]

_READ = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm bf16 fp16
    bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend
    torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
    torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order remove_unused_columns train_sampling_strategy length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics model_init_kwargs trust_remote_code
    router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token
    pad_token max_length truncation_mode shuffle_dataset packing packing_strategy padding_free
    pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss activation_offloading
    vocabulary byte_length impl chunk_bytes metric_stride kl_estimator
    gradient_filter
"""

USED = tuple(_READ.split())
"""Fields that the trainer, its parents or the engine read."""

REFUSED: Mapping[str, str] = {
    "loss_type": "the loss is chosen by method or terms (method: sft is the negative log-likelihood)",
    "label_smoothing_factor": (
        "the loss is that of method or terms, and the teacher's distribution is what softens its targets; "
        'another objective is named as terms: [{objective: "my_module:name"}]'
    ),
    "label_names": "labels are the dataset's column labels, or are found in its rows as TRL does",
}
"""Fields that change a loss or an evaluation that is not the one here, and what to use instead."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "do_train": "scripts read it; a trainer trains when train() is called",
    "do_eval": "scripts read it; transformers sets it from eval_strategy",
    "do_predict": "scripts read it; a trainer predicts when predict() is called",
    "resume_from_checkpoint": "scripts read it and hand it to train(resume_from_checkpoint=...)",
    "local_rank": "launchers tell it to accelerate; transformers reads it no more",
}
"""Fields that no trainer reads, which scripts set for themselves; recipes refuse them."""

IN_RECIPES: Mapping[str, str] = {
    "output_dir": "set output_dir beside train instead",
    "trust_remote_code": "set student.trust_remote_code (and teacher.trust_remote_code) instead",
    "model_init_kwargs": "set student.dtype, student.attn_implementation and student.revision instead",
    "assistant_only_loss": "set data.labels: assistant instead",
    "completion_only_loss": "set data.labels: completion, or all, instead",
    "dataset_text_field": "set data.columns, such as {text: body}, instead",
    "do_train": "hpd train trains anyway; remove it",
    "do_eval": "set train.eval_strategy and data.validation instead",
    "do_predict": "set eval instead, whose tasks are done after training",
    "resume_from_checkpoint": "hpd train resumes from the newest checkpoint of output_dir; remove it",
    "local_rank": "accelerate launch and torchrun tell each process its place; remove it",
}
"""Fields that have their place elsewhere in a recipe, which loads model, tokenizer and rows itself."""

_READ_OF_FSDP = """
    version reshard_after_forward cpu_offload auto_wrap_policy transformer_layer_cls_to_wrap min_num_params
    state_dict_type activation_checkpointing cpu_ram_efficient_loading xla xla_fsdp_v2 xla_fsdp_settings
    xla_fsdp_grad_ckpt forward_prefetch backward_prefetch use_orig_params sync_module_states limit_all_gathers
"""
_OF_FSDP = tuple(_READ_OF_FSDP.split())
"""Keys of fsdp_config that transformers reads; it passes over others."""

_OF_OPTIMIZERS = {
    "bitsandbytes": ("bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_"),
    "galore_torch": ("galore",),
    "apollo_torch": ("apollo",),
    "lomo_optim": ("lomo", "adalomo"),
    "grokadamw": ("grokadamw",),
    "schedulefree": ("schedule_free",),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "optimi": ("stable_adamw",),
    "torchdistx": ("adamw_anyprecision",),
}
"""Importable packages, by what begins the name of an optimizer that needs them ("bnb": what is in it)."""

# Metrics that are better where they are smaller.
_LOWER = re.compile(
    r"(?:^|_)kl(?:_|$)|(?:loss|perplexity|runtime|_tokens|_truncated|_mass_outside|_tail_mass)$"
)

_ON_PYPI = {
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "lomo_optim": "lomo-optim",
    "optimi": "torch-optimi",
    "liger_kernel": "liger-kernel",
}


def check_before(args: Any) -> None:
    """Refuse what cannot go together, and set `greater_is_better`, before transformers fills settings in.

    Args:
        args: a `DistillConfig`.

    Raises:
        ValueError: the setting's name.
    """
    _check_bytes(args)
    check_operator(args)
    _set_direction(args)
    if args.fsdp_config and not args.fsdp:
        raise ValueError(
            "train.fsdp_config has an effect with train.fsdp: true only: set that too, or remove it (an "
            "engine that accelerate launch starts has its settings in accelerate's file, such as "
            "recipes/accelerate/fsdp2.yaml)."
        )


def check_settings(args: Any) -> None:
    """Refuse settings that would do nothing, or need a package that is not installed.

    Args:
        args: an `SFTConfig` or a class derived from it.

    Raises:
        ValueError: a field of REFUSED was changed; one that is in none of the tables: of a version of
            transformers or TRL that is newer than they are; or the package, and how it is installed.
    """
    _check_packages(args)
    if unknown := [key for key in args.fsdp_config or () if key not in _OF_FSDP]:
        raise ValueError(f"train.fsdp_config has no key {unknown[0]!r}. {nearest(unknown[0], _OF_FSDP)}")
    if (version := (args.fsdp_config or {}).get("version", 2)) != 2:
        raise ValueError(
            f"train.fsdp_config: version {version!r} is not supported: set version: 2 (FSDP2), or remove it."
        )
    known = {*USED, *REFUSED, *WITHOUT_EFFECT}
    for field in dataclasses.fields(args):
        if not _is_changed(args, field):
            continue
        if field.name in REFUSED:
            raise ValueError(f"train.{field.name} has no effect: {REFUSED[field.name]}.")
        if field.name not in known and _is_theirs(args, field.name):
            raise ValueError(
                f"train.{field.name} is newer than this version of hpd, which cannot say that it has an "
                "effect: leave it at its default."
            )


def _set_direction(args: Any) -> None:
    """Set `greater_is_better`, if nobody has: for transformers a metric whose name does not end with loss is
    better where it is higher, and the checkpoint with the largest KL would be kept.

    Args:
        args: an `SFTConfig` or a class derived from it, before transformers has filled it in.

    Raises:
        ValueError: an entropy, which is neither better high nor low.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if args.greater_is_better is not None or not metric:
        return
    if metric.endswith("entropy"):
        raise ValueError(
            f"train.metric_for_best_model: {metric} is neither better high nor low: choose another metric, "
            "such as forward_kl, or say with train.greater_is_better which is."
        )
    if _LOWER.search(metric):
        args.greater_is_better = False


def _check_bytes(args: Any) -> None:
    """Refuse settings that have no effect with two tokenizers, or without.

    Args:
        args: `DistillConfig`.

    Raises:
        ValueError: the setting's name.
    """
    if args.vocabulary != "bytes":
        if args.byte_length != "geometric":
            raise ValueError(
                f"train.byte_length: {args.byte_length} has an effect with train.vocabulary: bytes only: "
                "remove it."
            )
        return
    for name, only in (
        ("impl", "chunked"),
        ("kl_estimator", "exact"),
        ("gradient_filter", 0.0),
        ("truncation_mode", "keep_start"),
    ):
        if getattr(args, name) != only:
            raise ValueError(
                f"train.{name}: {getattr(args, name)} has no form for two tokenizers (train.vocabulary: "
                f"bytes): set {only}, or remove it."
            )
    if args.packing and args.packing_strategy != "bfd":
        raise ValueError(
            f"train.packing_strategy: {args.packing_strategy} cuts rows in the middle, and two tokenizers "
            "(train.vocabulary: bytes) need whole ones: set packing_strategy: bfd."
        )


def check_operator(args: Any, clips: bool = False) -> None:
    """Refuse settings of the loss operator that would have no effect.

    Args:
        args: `DistillConfig`.
        clips: the strategy is policy_gradient, which has an operator of its own.

    Raises:
        ValueError: the setting's name.
    """
    if args.gradient_filter >= 1.0:
        raise ValueError(
            f"train.gradient_filter is a share of a position's gradient, below 1 (such as 5.0e-5), got "
            f"{args.gradient_filter}."
        )
    if args.gradient_filter and args.impl == "reference":
        raise ValueError(
            "train.gradient_filter has no effect on train.impl: reference, which multiplies whole logits: "
            "remove one of the two."
        )
    for name, only in (("impl", "chunked"), ("kl_estimator", "exact"), ("gradient_filter", 0.0)):
        if clips and getattr(args, name) != only:
            raise ValueError(
                f"train.{name}: {getattr(args, name)} has no effect under strategy: policy_gradient, whose "
                "operator is another: remove it."
            )


def _check_packages(args: Any) -> None:
    """Refuse settings that need a package which is not installed.

    Raises:
        ValueError: the package's name, and how it is installed.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    needed = {
        package: f"train.optim: {optim}"
        for package, names in _OF_OPTIMIZERS.items()
        if any(optim.startswith(name) or (name == "bnb" and name in optim) for name in names)
    }
    if args.use_liger_kernel:
        needed["liger_kernel"] = "train.use_liger_kernel"
    for package, setting in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{setting} needs the package {package}, which is not installed: pip install "
                f"{_ON_PYPI.get(package, package)}, or choose another setting."
            )


def check_special_tokens(args: Any, tokenizer: Any) -> None:
    """Look `train.eos_token` and `train.pad_token` up in the tokenizer.

    Args:
        args: `SFTConfig`.
        tokenizer: or a processor that has one.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    vocabulary = getattr(tokenizer, "tokenizer", tokenizer)
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name, None)
        if token is None or token in vocabulary.get_vocab():
            continue
        ends = ", ".join(repr(t) for t in list(dict.fromkeys(vocabulary.all_special_tokens))[:8])
        raise ValueError(
            f"train.{name} is {token!r}, which the student's tokenizer does not have: name one of its tokens "
            f"(its special ones are {ends}), or remove it for the tokenizer's own."
        )


def _is_changed(args: Any, field: dataclasses.Field[Any]) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return field.init and getattr(args, field.name) != default


def _is_theirs(args: Any, name: str) -> bool:
    """True for a field of transformers or TRL: people derive classes with fields of their own."""
    owners = [kind for kind in type(args).__mro__ if name in inspect.get_annotations(kind)]
    return bool(owners) and owners[-1].__module__.split(".")[0] in ("transformers", "trl", "hpd")
