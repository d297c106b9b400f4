"""Checks of single sections of a recipe, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from hpd.config import GenerateConfig, Recipe, TeacherConfig

__all__ = ["check_answers_anything", "check_generate", "check_served", "check_teacher", "check_train_values"]

_SERVER_FIELDS = ("url", "protocol", "api_key_env", "top_k", "tail", "concurrency", "timeout_seconds", "wait_seconds")
_LOADING_FIELDS = ("quantization", "attn_implementation", "trust_remote_code", "allow_pickle")
# Least values of fields of `train` that their libraries take without a check, or complain about in the middle of a run.
_AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 2,
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "logging_steps": 0, "save_steps": 0,
    "save_total_limit": 1, "dataloader_num_workers": 0, "seed": 0,
}  # fmt: skip
# Fields that would do nothing: the recipe loads model and tokenizer itself.
_ELSEWHERE = {
    "trust_remote_code": "student.trust_remote_code (and teacher.trust_remote_code)",
    "model_init_kwargs": "student.dtype, student.attn_implementation and student.revision",
}
# Fields that only some types read.
_TEACHER_FIELDS = {
    "path": ("cached",), "teachers": ("mixture", "routed"), "weights": ("mixture",), "column": ("routed",),
    "quantization": ("model", "cached"),
}  # fmt: skip


def check_served(teacher: TeacherConfig) -> None:
    """The fields of `teacher: {type: server}`, which no other type may set.

    Raises:
        ValueError: a field without effect, a missing one, or one that would put a secret into the run folder.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(teacher)}
    served = teacher.type == "server"
    idle = [name for name in (_LOADING_FIELDS if served else _SERVER_FIELDS) if getattr(teacher, name) != defaults[name]]
    if idle:
        raise ValueError(f"teacher.{idle[0]} has no effect on teacher type {teacher.type}: remove it, or change the type.")
    if not served:
        return
    try:
        parts = urlsplit(teacher.url or "")
        parts.port  # noqa: B018 (reading it checks it)
    except ValueError as error:
        raise ValueError(f"teacher.url is no address: {error}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("teacher.url must be the server's base address, such as http://127.0.0.1:8765, without a query.")
    if parts.username or parts.password:
        raise ValueError(
            "teacher.url holds a password, which run folders would keep: name an environment variable in api_key_env."
        )
    # A key in the place of its variable's name is not shown: the message may end up in a log.
    if teacher.api_key_env is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", teacher.api_key_env):
        raise ValueError(
            "teacher.api_key_env must name an environment variable in capitals, such as TEACHER_API_KEY, not be a key."
        )
    if teacher.protocol in (None, "openai", "echo") and not teacher.model:
        raise ValueError("teacher.model is missing: the name that the server knows the model by.")
    if teacher.protocol == "hpd" and (teacher.top_k is not None or teacher.tail != "exact"):
        raise ValueError("teacher.top_k and tail have no effect with protocol hpd, which is exact: remove them.")
    if teacher.protocol != "hpd" and teacher.dtype != "auto":
        raise ValueError("teacher.dtype has an effect on types model and server with protocol hpd only: remove it.")
    too_few = teacher.top_k is not None and teacher.top_k < 1
    if too_few or teacher.concurrency < 1 or teacher.timeout_seconds <= 0 or teacher.wait_seconds < 0:
        raise ValueError("teacher needs top_k >= 1, concurrency >= 1, timeout_seconds > 0 and wait_seconds >= 0.")


def check_generate(config: GenerateConfig) -> None:
    """Raise ValueError where settings of `hpd generate` make no sense, or have no effect."""
    if config.samples < 1:
        raise ValueError(f"generate.samples must be >= 1, got {config.samples}.")
    if config.temperature == 0 and config.samples > 1:
        raise ValueError("generate.samples > 1 at temperature 0 would write the same completion again and again.")
    if config.temperature == 0 and (config.top_p < 1 or config.top_k > 0):
        raise ValueError("generate.top_p and top_k have no effect at temperature 0: remove them.")
    if config.temperature < 0 or not 0 < config.top_p <= 1 or config.top_k < 0 or config.max_new_tokens < 1:
        raise ValueError("generate needs temperature >= 0, top_p in (0, 1], top_k >= 0 and max_new_tokens >= 1.")
    if config.batch_size < 1 or config.seed < 0:
        raise ValueError("generate needs batch_size >= 1 and seed >= 0.")
    if config.reference is not None and config.filter == "none":
        raise ValueError("generate.reference has no effect without filter: correct.")
    if not config.output.endswith(".jsonl"):
        raise ValueError(f"generate.output must end with .jsonl, got {config.output!r}.")


def check_teacher(teacher: TeacherConfig, recipe: Recipe, where: str = "teacher") -> None:
    """The fields of a teacher and of those that it is made of; `where` is its place in the recipe.

    Raises:
        ValueError: a missing field, one without effect, or teachers that cannot be combined.
    """
    check_served(teacher)
    if teacher.type == "model" and not teacher.model:
        raise ValueError(f"{where}.model is missing: give a Hub id or folder, or teacher: self for self-distillation.")
    if teacher.type == "self" and (teacher.model or teacher.quantization):
        raise ValueError(f"{where}: self is the student itself: remove {where}.model and {where}.quantization.")
    if teacher.type == "self" and recipe.student.init == "random":
        raise ValueError(f"{where}: self would distil from random weights: give a teacher model, or init: pretrained.")
    if teacher.type == "cached" and not teacher.path:
        raise ValueError(f"{where}.path is missing: give the folder that hpd cache wrote.")
    for name, types in _TEACHER_FIELDS.items():
        if getattr(teacher, name) and teacher.type not in types:
            raise ValueError(f"{where}.{name} is for type {' or '.join(types)}, and the type is {teacher.type}: remove it.")
    if teacher.type in ("mixture", "routed"):
        _check_teachers(teacher, recipe, where)


def _check_teachers(teacher: TeacherConfig, recipe: Recipe, where: str) -> None:
    if where != "teacher" or len(teacher.teachers) < 2 or teacher.model:
        raise ValueError(
            f"{where} of type {teacher.type} needs teachers: {{name: path, other: path}}, two or more, not nested."
        )
    if teacher.type == "mixture" and (set(teacher.weights) != set(teacher.teachers) or min(teacher.weights.values()) <= 0):
        raise ValueError(
            f"{where}.weights needs a number > 0 for each of {', '.join(teacher.teachers)}, got {dict(teacher.weights)}."
        )
    if teacher.type == "routed" and not teacher.column:
        raise ValueError(f"{where}.column is missing: the column of the dataset that names each row's teacher.")
    if teacher.type == "routed" and (recipe.train.get("packing") or recipe.data.streaming):
        raise ValueError("Routing reads the column row by row before training: set train.packing and data.streaming to false.")
    for name, part in teacher.teachers.items():
        if part.type == "server":
            raise ValueError(f"teacher.teachers.{name} is a server, which answers for whole batches: load the model here.")
        check_teacher(part, recipe, f"teacher.teachers.{name}")


def check_answers_anything(teacher: TeacherConfig) -> None:
    """For runs whose rows the student writes.

    Raises:
        ValueError: a teacher that knows the dataset's rows only.
    """
    for part in (teacher, *teacher.teachers.values()):
        if part.type in ("cached", "routed"):
            raise ValueError(
                f"A teacher of type {part.type} knows the dataset's rows only, and here the student writes rows: use a "
                "live teacher or a served one, or prefixes: {dataset: 1} without a policy gradient."
            )


def check_train_values(values: Mapping[str, Any]) -> None:
    """Fields of `train`, of the right types, against what a run can use.

    Raises:
        ValueError: a number out of range or not finite, or a field that has its place elsewhere in the recipe.
    """
    for key, value in values.items():
        if key in _ELSEWHERE and value:
            raise ValueError(f"train.{key} has no effect: set {_ELSEWHERE[key]} instead.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"train.{key} must be finite, got {value}.")
        if key in _AT_LEAST and value is not None and value < _AT_LEAST[key]:
            raise ValueError(f"train.{key} must be >= {_AT_LEAST[key]}, got {value}.")
    if values.get("max_steps", -1) <= 0 and values.get("num_train_epochs", 3.0) <= 0:
        raise ValueError(f"train.num_train_epochs must be > 0 without train.max_steps, got {values['num_train_epochs']}.")
