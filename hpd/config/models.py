"""The recipe's models: the student, and where the teacher's distribution comes from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict

__all__ = ["ModelConfig", "TeacherConfig", "check_served"]


_SERVER_FIELDS = (
    "url",
    "protocol",
    "api_key_env",
    "top_k",
    "tail",
    "concurrency",
    "timeout_seconds",
    "wait_seconds",
)


_LOADING_FIELDS = ("quantization", "attn_implementation", "trust_remote_code", "allow_pickle")


def check_served(teacher: TeacherConfig) -> None:
    """The fields of `teacher: {type: server}`, which no other type may set.

    Raises:
        ValueError: a field without effect, a missing one, or one that would put a secret into the run folder.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(teacher)}
    served = teacher.type == "server"
    idle = [
        name
        for name in (_LOADING_FIELDS if served else _SERVER_FIELDS)
        if getattr(teacher, name) != defaults[name]
    ]
    if idle:
        raise ValueError(
            f"teacher.{idle[0]} has no effect on teacher type {teacher.type}: remove it, or change the type."
        )
    if not served:
        return
    try:
        parts = urlsplit(teacher.url or "")
        parts.port  # noqa: B018 (reading it checks it)
    except ValueError as error:
        raise ValueError(f"teacher.url is no address: {error}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(
            "teacher.url must be the server's base address, such as http://127.0.0.1:8765, without a query."
        )
    if parts.username or parts.password:
        raise ValueError(
            "teacher.url holds a password, which run folders would keep: name an environment variable in "
            "api_key_env."
        )
    # A key in the place of its variable's name is not shown: the message may end up in a log.
    if teacher.api_key_env is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", teacher.api_key_env):
        raise ValueError(
            "teacher.api_key_env must name an environment variable in capitals, such as TEACHER_API_KEY, not "
            "be a key."
        )
    if teacher.protocol in (None, "openai", "echo") and not teacher.model:
        raise ValueError("teacher.model is missing: the name that the server knows the model by.")
    if teacher.protocol == "hpd" and (teacher.top_k is not None or teacher.tail != "exact"):
        raise ValueError(
            "teacher.top_k and tail have no effect with protocol hpd, which is exact: remove them."
        )
    if teacher.protocol != "hpd" and teacher.dtype != "auto":
        raise ValueError(
            "teacher.dtype has an effect on types model and server with protocol hpd only: remove it."
        )
    too_few = teacher.top_k is not None and teacher.top_k < 1
    if too_few or teacher.concurrency < 1 or teacher.timeout_seconds <= 0 or teacher.wait_seconds < 0:
        raise ValueError(
            "teacher needs top_k >= 1, concurrency >= 1, timeout_seconds > 0 and wait_seconds >= 0."
        )


_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


DType = Literal["auto", "float32", "bfloat16", "float16"]


def _model_shorthand(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _teacher_shorthand(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": "self"} if value == "self" else {"type": "model", "model": value}
    return value


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model and how to load it."""

    __pydantic_config__ = _STRICT

    model: str
    """Hub id or local folder, anything that `AutoModelForCausalLM.from_pretrained` takes."""
    dtype: DType = "float32"
    """Dtype of the weights. The student's master weights belong in float32; mixed precision is `train: {bf16:
    true}`."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: only the configuration is read, the weights start from the run's seed."""
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


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where the teacher's distribution comes from."""

    __pydantic_config__ = _STRICT

    type: Literal["model", "self", "cached", "server", "mixture", "routed"] = "model"
    """model: a frozen model beside the student. self: the student as it was before training (adapter off, or
    a copy). cached: what `hpd cache` wrote. server: a model that answers over HTTP. mixture: a weighted
    mixture of teachers. routed: each row has one of several teachers."""
    model: str | None = None
    """Hub id or local folder; required by type model. Type cached: may stay, the cache must then be of this
    model. Type server: the name that the server knows the model by."""
    path: str | None = None
    """Folder of a cache (type cached); null: cache.path."""
    teachers: Mapping[str, Annotated[TeacherConfig, BeforeValidator(_teacher_shorthand)]] = field(
        default_factory=dict
    )
    """Teachers by name (types mixture and routed); a string is a model's path."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of each teacher in a mixture, > 0; divided by their sum."""
    column: str | None = None
    """Column of the dataset that names each row's teacher (type routed)."""
    dtype: DType = "auto"
    """auto: as saved. The teacher is never trained, so bfloat16 is enough on a GPU. Protocol hpd: of hidden
    states and head."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the teacher's weights quantised by bitsandbytes (extra `quantization`)."""
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
    """Type server: longest wait for one answer, > 0."""
    wait_seconds: float = 600.0
    """Type server: how long a failed request is tried again before training saves a checkpoint and stops, >=
    0."""

    @property
    def title(self) -> str:
        """What a person would call it."""
        if self.type == "self":
            return "itself (self-distillation)"
        if self.type == "cached":
            return f"the cache {self.path}"
        if self.teachers:
            return f"a {'mixture' if self.type == 'mixture' else 'choice'} of {', '.join(self.teachers)}"
        return str(self.model) if self.url is None else f"{self.model or 'a model'} at {self.url}"
