"""The recipe's models: the student, and the source of the teacher's distribution."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from hpd.http import check_url
from hpd.methods.fields import STRICT, check_fields

__all__ = ["ModelConfig", "TeacherConfig", "model_shorthand", "teacher_shorthand"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

# Types of teacher that read a field; the fields that are not named here are for all.
_ANY_BUT_SERVER = ("model", "self", "cached", "mixture", "routed")
_ANY_BUT_OBJECT = (*_ANY_BUT_SERVER, "server")
_READ_BY = {
    "model": _ANY_BUT_OBJECT,
    "dtype": _ANY_BUT_OBJECT,
    "tokenizer": _ANY_BUT_OBJECT,
    "revision": _ANY_BUT_OBJECT,
    "object": ("object",),
    "kwargs": ("object",),
    "quantization": ("model", "cached"),
    "attn_implementation": _ANY_BUT_SERVER,
    "trust_remote_code": _ANY_BUT_SERVER,
    "allow_pickle": _ANY_BUT_SERVER,
    "path": ("cached",),
    "ema": ("self",),
    "teachers": ("mixture", "routed"),
    "weights": ("mixture",),
    "column": ("routed",),
    "url": ("server",),
    "protocol": ("server",),
    "api_key_env": ("server",),
    "top_k": ("server",),
    "tail": ("server",),
    "concurrency": ("server",),
    "timeout_seconds": ("server",),
    "wait_seconds": ("server",),
}


def model_shorthand(value: Any) -> Any:
    """A student as a mapping; text is its model."""
    return {"model": value} if isinstance(value, str) else value


def teacher_shorthand(value: Any) -> Any:
    """A teacher as a mapping; text is its model, "self", or the "module:name" of one of your own."""
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        return {"type": "object", "object": value}
    return {"type": "self"} if value == "self" else {"type": "model", "model": value}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model and how to load it."""

    __pydantic_config__ = STRICT

    model: str
    """Hub id or local folder, anything that `AutoModelForCausalLM.from_pretrained` takes; or an adapter that
    peft saved, as a run with lora does: trained further where `lora` has its shape, else merged."""
    dtype: DType = "float32"
    """Dtype of the weights. The student's master weights belong in float32; mixed precision is `train: {bf16:
    true}`."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: only the configuration is read, the weights start from the run's seed."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the weights quantized by bitsandbytes (extra `quantization`), frozen: training needs `lora`, whose
    adapter is trained in float32 on them (QLoRA). `dtype` is then that of embeddings, norms and head."""
    tokenizer: str | None = None
    """Tokenizer's Hub id or folder; null: the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    attn_implementation: str | None = None
    """sdpa, flash_attention_2, ...; null: what transformers chooses."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings. Off unless you have read it."""
    allow_pickle: bool = False
    """Take weights from a pickle (pytorch_model.bin) where there are no safetensors. Off unless you trust who
    wrote it."""

    def __post_init__(self) -> None:
        check_fields(self, "student")
        if self.quantization is not None and self.init == "random":
            raise ValueError(
                "student.quantization freezes the weights, and init: random has none worth keeping: remove "
                "one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The source of the teacher's distribution."""

    __pydantic_config__ = STRICT

    type: Literal["model", "self", "cached", "server", "mixture", "routed", "object"] = "model"
    """model: a frozen model next to the student. self: the student as it was before training (adapter off, or
    a copy). cached: what `hpd cache` wrote. server: a model that answers over HTTP. mixture: a weighted
    mixture of teachers. routed: each row has one of several teachers. object: a `Teacher` of your own."""
    model: str | None = None
    """Hub id or local folder, also of an adapter; required by type model. Type cached: may stay, the cache
    must then be of this model. Type server: the name that the server knows the model by."""
    object: str | None = None
    """Type object: "module:name" of a class or function that returns an `hpd.teachers.Teacher`; a module is
    looked for as that of an objective. It speaks the student's vocabulary."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Type object: arguments of the class or function."""
    path: str | None = None
    """Folder of a cache (type cached); null: cache.path."""
    teachers: Mapping[str, Annotated[TeacherConfig, BeforeValidator(teacher_shorthand)]] = field(
        default_factory=dict
    )
    """Teachers by name (types mixture and routed); a string is a model's path."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of each teacher in a mixture, > 0; divided by their sum."""
    column: str | None = None
    """Column of the dataset that names each row's teacher (type routed)."""
    ema: float | None = None
    """Type self: the teacher is the student's moving average instead, (1 - ema) x itself + ema x the student
    after each step, in (0, 1]; null: the student as it was before training."""
    prompt: str | None = None
    """The prompt that the teacher reads instead of the student's, such as "{prompt}\n\nReference:
    {solution}": {prompt} and {completion} are the row's, other names its columns; with {{ }} or {% %} a
    Jinja template. null: the student's."""
    system_prompt: str | None = None
    """The system text that the teacher reads, written like `prompt`; null: the student's."""
    dtype: DType = "auto"
    """auto: as saved. The teacher is never trained, so bfloat16 is enough on a GPU. Protocol hpd: of hidden
    states and head."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the teacher's weights quantized by bitsandbytes (extra `quantization`)."""
    tokenizer: str | None = None
    """Tokenizer to compare the student's with; null: the teacher's own."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    attn_implementation: str | None = None
    """sdpa, flash_attention_2, ...; null: what transformers chooses."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings. Off unless you have read it."""
    allow_pickle: bool = False
    """Take weights from a pickle (pytorch_model.bin) where there are no safetensors. Off unless you trust who
    wrote it."""
    url: str | None = None
    """Type server: its base address, such as http://127.0.0.1:8765."""
    protocol: Literal["openai", "echo", "sglang", "hpd"] | None = None
    """Type server; null: openai. openai: /v1/completions with prompt_logprobs (vLLM). echo: the same with
    echo and return_tokens_as_token_ids. sglang: /generate. hpd: a server that `hpd serve-teacher` runs, exact
    for every method."""
    api_key_env: str | None = None
    """Type server: name of the environment variable that holds the key. Never the key: recipes are written to
    run folders."""
    top_k: int | None = None
    """Protocols openai, echo, sglang: likeliest tokens asked for, >= 1; null: 20."""
    tail: Literal["exact", "uniform"] = "exact"
    """Protocols openai, echo, sglang. exact: a method that reads other tokens than label and top_k is an
    error. uniform: those tokens share the rest of the teacher's mass evenly, an approximation."""
    concurrency: int = 4
    """Type server: requests at once, >= 1."""
    timeout_seconds: float = 120.0
    """Type server: longest time of one attempt, from looking up its name to the last byte, > 0."""
    wait_seconds: float = 600.0
    """Type server: how long a failed request is tried again before training saves a checkpoint and stops, >=
    0. A request takes at most timeout_seconds + wait_seconds."""

    def __post_init__(self) -> None:
        check_fields(self, "teacher")
        for name, types in _READ_BY.items():
            if self.type not in types and getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(
                    f"teacher.{name} is for type {' or '.join(types)}, and the type is {self.type}: remove "
                    "it, or change the type."
                )
        if self.type == "model" and not self.model:
            raise ValueError(
                "teacher.model is missing: give a Hub id or folder, or teacher: self for self-distillation."
            )
        if self.type == "object" and not self.object:
            raise ValueError(
                "teacher.object is missing: module:name of a class that is an hpd.teachers.Teacher."
            )
        if self.type == "self" and self.model:
            raise ValueError("teacher: self is the student itself: remove teacher.model.")
        check_fields(self, "teacher", ema=(self.ema is None or 0 < self.ema <= 1, "in (0, 1], or null"))
        for name in ("prompt", "system_prompt"):
            if (text := getattr(self, name)) is not None and not text.strip():
                raise ValueError(f"teacher.{name} is empty: remove it, and the teacher reads the student's.")
        if self.type in ("mixture", "routed"):
            self._check_teachers()
        if self.type == "server":
            self._check_server()

    def _check_teachers(self) -> None:
        nested = [name for name, part in self.teachers.items() if part.type in ("mixture", "routed")]
        if nested or len(self.teachers) < 2 or self.model:
            raise ValueError(
                f"teacher of type {self.type} needs teachers: {{name: path, other: path}}, two or more, not "
                "nested."
            )
        if served := [name for name, part in self.teachers.items() if part.type == "server"]:
            raise ValueError(
                f"teacher.teachers.{served[0]} is a server, which answers for whole batches: load the model "
                "here."
            )
        if made := [name for name, part in self.teachers.items() if part.type == "object"]:
            raise ValueError(
                f"teacher.teachers.{made[0]} is an object of your own, and a {self.type} takes models and "
                "caches: let the object ask the others itself."
            )
        if own := [name for name, part in self.teachers.items() if part.reads_own_rows]:
            raise ValueError(
                f"teacher.teachers.{own[0]} has a prompt of its own, and the teachers of a {self.type} "
                "read one row together: set teacher.prompt and teacher.system_prompt, which all of them read."
            )
        if self.type == "mixture" and (
            set(self.weights) != set(self.teachers) or min(self.weights.values()) <= 0
        ):
            raise ValueError(
                f"teacher.weights needs a number > 0 for each of {', '.join(self.teachers)}, got "
                f"{dict(self.weights)}."
            )
        if self.type == "routed" and not self.column:
            raise ValueError(
                "teacher.column is missing: the column of the dataset that names each row's teacher."
            )

    def _check_server(self) -> None:
        check_url(self.url, "teacher.url", "teacher.api_key_env")
        # A key in the place of its variable's name is not shown: the message may end up in a log.
        if self.api_key_env is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "teacher.api_key_env must name an environment variable in capitals, such as TEACHER_API_KEY, "
                "not be a key."
            )
        if self.protocol in (None, "openai", "echo") and not self.model:
            raise ValueError("teacher.model is missing: the name that the server knows the model by.")
        if self.protocol == "hpd" and (self.top_k is not None or self.tail != "exact"):
            raise ValueError(
                "teacher.top_k and tail have no effect with protocol hpd, which is exact: remove them."
            )
        if self.protocol != "hpd" and self.dtype != "auto":
            raise ValueError(
                "teacher.dtype has an effect on types model and server with protocol hpd only: remove it."
            )
        check_fields(
            self,
            "teacher",
            top_k=(self.top_k is None or self.top_k >= 1, ">= 1, or null"),
            concurrency=(self.concurrency >= 1, ">= 1"),
            timeout_seconds=(0 < self.timeout_seconds < math.inf, "> 0"),
            wait_seconds=(0 <= self.wait_seconds < math.inf, ">= 0"),
        )

    @property
    def reads_own_rows(self) -> bool:
        """True if the teacher's prompt is not the student's."""
        return self.prompt is not None or self.system_prompt is not None

    @property
    def title(self) -> str:
        """The teacher as a person would call it."""
        if self.type == "self":
            return "itself (self-distillation)" if self.ema is None else "its own moving average"
        if self.type == "object":
            return f"the object {self.object}"
        if self.type == "cached":
            return f"the cache {self.path}"
        if self.teachers:
            return f"a {'mixture' if self.type == 'mixture' else 'choice'} of {', '.join(self.teachers)}"
        return str(self.model) if self.url is None else f"{self.model or 'a model'} at {self.url}"


_DEFAULTS = {
    f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    for f in dataclasses.fields(TeacherConfig)
}
