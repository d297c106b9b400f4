"""`DistillConfig`, the settings of a trainer: from a recipe, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from trl import SFTConfig

from hpd.config.schema import Recipe
from hpd.config.slips import trainer_name
from hpd.config.yaml_file import shorten
from hpd.losses.byte_chunks import LENGTHS
from hpd.losses.heads import POLICIES
from hpd.losses.operator import IMPLEMENTATIONS, METRIC_STRIDE
from hpd.methods.fields import nearest
from hpd.objectives.estimators import ESTIMATORS
from hpd.training.settings import IN_RECIPES, REFUSED, check_before, check_operator, check_settings

__all__ = [
    "DistillConfig",
    "as_config",
    "check_names",
    "label_policy",
    "train_arguments",
]

# Names that a field takes.
_CHOICES = {"vocabulary": (*POLICIES, "bytes"), "impl": tuple(IMPLEMENTATIONS), "kl_estimator": ESTIMATORS}
_CHOICES["byte_length"] = LENGTHS

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
    "gradient_filter": 0,
}


@dataclass
class DistillConfig(SFTConfig):
    """Every setting of TRL's `SFTConfig`, and those of the distillation loss.

    Raises:
        ValueError: a name that is not declared, or a number out of range or not finite.
    """

    vocabulary: str = field(
        default="error",
        metadata={"help": "Unequal vocabularies: 'error', 'shared_prefix', or 'bytes' (two tokenizers)."},
    )
    byte_length: str = field(
        default="geometric",
        metadata={"help": "For 'bytes': a chunk of n tokens counts to the power of 1/n, or as a 'product'."},
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
        default=METRIC_STRIDE,
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
    gradient_filter: float = field(
        default=0.0,
        metadata={
            "help": "Tokens whose gradient (logits) is nowhere above this share of a position's are "
            "multiplied together, at rank one, instead of one by one: see Speed and memory. 0: off."
        },
    )
    assistant_only_loss: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "null: of `messages` the assistant's turns are learned, of other rows the completion. "
            "true: the assistant's turns, of completions too. false: all of `messages`."
        },
    )
    # A check of every micro-batch's loss would synchronize the device; a non-finite loss shows at the next
    # log.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Skip non-finite losses when averaging."}
    )

    project: str = field(
        default="hpd", metadata={"help": "Project of the run in trackio, Weights & Biases and MLflow."}
    )

    # Not to be given: what trackers are told beside the other fields (`tracking.described`).
    described: Mapping[str, Any] = field(default_factory=dict, init=False, repr=False)

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
        check_before(self)
        super().__post_init__()
        check_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with `described`: what trackers keep as the configuration of a run."""
        return {**super().to_dict(), **self.described}


def as_config(args: TrainingArguments | None) -> DistillConfig:
    """The settings as `DistillConfig`, whose own fields have their defaults.

    Args:
        args: None, a `DistillConfig`, or TRL's `SFTConfig` or transformers' `TrainingArguments`, as
            `SFTTrainer` takes them.

    Raises:
        TypeError: something else.
        ValueError: the class of another trainer of TRL, whose own fields would have no effect.
    """
    if args is None:
        return DistillConfig(output_dir="hpd-student")
    if isinstance(args, DistillConfig):
        return args
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args is a {type(args).__name__}: give a DistillConfig, or TRL's SFTConfig or transformers' "
            "TrainingArguments, whose fields it has too."
        )
    names = {f.name for f in dataclasses.fields(DistillConfig) if f.init}
    own = [f.name for f in dataclasses.fields(args) if f.init and f.name not in names]
    if own and type(args).__module__.startswith("trl."):
        raise ValueError(
            f"args is a {type(args).__name__}, whose {', '.join(own[:4])} would have no effect: give a "
            "DistillConfig, and say with method, method_kwargs and prefixes what is learned."
        )
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init and f.name in names}
    # As transformers has filled it in; a KL is better where it is smaller.
    if given["greater_is_better"] == (not (args.metric_for_best_model or "loss").endswith("loss")):
        given["greater_is_better"] = None
    return DistillConfig(**given)


def check_names(recipe: Recipe) -> None:
    """Check the keys of `train:`, without a look at their values.

    Raises:
        ValueError: unknown field (with the nearest one), or one without effect.
    """
    names = [f.name for f in dataclasses.fields(DistillConfig) if f.init]
    for key, value in recipe.train.items():
        if key not in names:
            slip = trainer_name(key)
            close = [slip] if slip is not None else get_close_matches(key, names, n=1)
            hint = (
                f"; did you mean {close[0]!r}?"
                if close
                else ": a field of TRL's SFTConfig, such as learning_rate or max_steps."
            )
            raise ValueError(f"unknown key 'train.{key}'{hint}")
        if value in (None, _default_of(key)):
            continue
        if key in IN_RECIPES:
            raise ValueError(f"train.{key} has no effect: {IN_RECIPES[key]}.")
        if key in REFUSED:
            raise ValueError(f"train.{key} has no effect: {REFUSED[key]}.")


def _default_of(name: str) -> Any:
    return next(f.default for f in dataclasses.fields(DistillConfig) if f.name == name)


def train_arguments(recipe: Recipe, **forced: Any) -> DistillConfig:
    """`DistillConfig` from `train:`, every value checked against its field.

    Raises:
        ValueError: unknown field (with the nearest one), a value of the wrong type or out of range, or a
            field that has its place elsewhere in the recipe.
    """
    check_names(recipe)
    hints = get_type_hints(DistillConfig)
    hints["fsdp"] |= bool  # declared as its former words, documented as a switch
    values: dict[str, Any] = {}
    for key, value in recipe.train.items():
        if key in forced:
            raise ValueError(f"train.{key} is set by the recipe's own keys; remove it from train.")
        if key in IN_RECIPES:
            continue
        try:
            values[key] = TypeAdapter(
                hints[key], config=ConfigDict(arbitrary_types_allowed=True)
            ).validate_python(_as_word(value, hints[key]))
        except ValidationError as error:
            raise ValueError(f"train.{key}: {error.errors()[0]['msg']}, got {shorten(value)}") from None
    if recipe.data.streaming and values.get("max_steps", -1) <= 0:
        raise ValueError("data.streaming needs train.max_steps: a stream has no known length.")
    values.setdefault("max_length", 1024)
    values.setdefault("run_name", Path(recipe.output_dir).name)
    values["assistant_only_loss"] = True if recipe.data.labels == "assistant" else None
    values["completion_only_loss"] = None if recipe.data.labels != "all" else False
    try:
        args = DistillConfig(output_dir=recipe.output_dir, **{**values, **forced})
        check_operator(args, clips=recipe.choose_regime().strategy.type == "policy_gradient")
        return args
    except (TypeError, ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        # transformers, TRL and accelerate check the fields against each other and the machine, each with its
        # own error.
        text = " ".join(str(error).split())
        raise ValueError(text if text.startswith("train.") else f"train: {text}") from None


def _as_word(value: Any, hint: Any) -> Any:
    """`no` where YAML made false of it and the field is a choice of words, one of which is no."""
    choices = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    is_word = value is False and any("no" in [member.value for member in kind] for kind in choices)
    return "no" if is_word else value


def label_policy(args: DistillConfig) -> str:
    """The rule by which labels are chosen, as `hpd.data.rendering.tokenize` takes it."""
    if args.assistant_only_loss:
        return "assistant"
    if args.completion_only_loss is False:
        return "all"
    return "completion" if args.assistant_only_loss is None else "conversation"
