"""The source of contexts: shares of the dataset's text and of the student's own, and its way of writing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpd.methods.fields import STRICT, check_fields, nearest
from hpd.methods.schedules import Schedule, as_schedule, value_at
from hpd.methods.terms import Scalar

__all__ = ["Prefixes", "ReplayConfig", "RolloutConfig"]


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """From offline to on-policy: which share of the rows the student continues by itself.

    >>> Prefixes(dataset=0.75).student_share(0.0)
    0.25
    """

    __pydantic_config__ = STRICT

    dataset: Scalar | None = None
    """Share of rows whose text is the dataset's, in [0, 1]; null: what student leaves."""
    student: Scalar | None = None
    """Share of rows that the student writes; null: what dataset leaves, or none. Either may be a schedule
    over training; an adaptive one rises when the validation loss does (DistiLLM)."""
    stored: bool = False
    """Nothing is written in training: the rows are the student's, written earlier (hpd generate with
    generate.logprobs), and a policy gradient takes ratios to whoever wrote them. Needs student: 1."""
    mix: Literal["row", "batch"] = "row"
    """row: every row tosses its own coin. batch: one coin for the whole global batch of a step (GKD's
    lambda)."""
    continue_tokens: int | None = None
    """The student continues a dataset completion for n tokens from a random cut; null: it writes whole
    completions."""
    adaptive_step: float = 0.1
    """Step by which an adaptive share rises."""
    adaptive_margin: float = 0.1
    """By how much the validation loss must exceed its last reference, in the loss's unit, for an adaptive
    share to rise."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "prefixes",
            continue_tokens=(
                self.continue_tokens is None or self.continue_tokens >= 1,
                ">= 1, or null for whole completions",
            ),
        )
        given = {name: value for name in ("dataset", "student") if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            ends = _ends(value)
            if any(not 0.0 <= share <= 1.0 for share in ends):
                raise ValueError(
                    f"prefixes.{name} is a share of rows in [0, 1], got "
                    f"{' to '.join(f'{x:g}' for x in ends)}."
                )
        if len(given) == 2:
            if any(as_schedule(value) for value in given.values()):
                raise ValueError(
                    "prefixes: where one share is a schedule, the other is what it leaves: give only one of "
                    "them."
                )
            if abs(sum(given.values()) - 1.0) > 1e-9:
                total = sum(given.values())
                raise ValueError(
                    f"prefixes.dataset and prefixes.student are shares of one whole: they sum to {total:g}, "
                    "not 1."
                )
        adaptive = as_schedule(self.dataset)
        if adaptive is not None and adaptive.schedule == "adaptive":
            raise ValueError(
                "prefixes: an adaptive share is the student's: write student: {schedule: adaptive, ...}."
            )
        if self.stored and (self.student != 1 or self.continue_tokens is not None or self.mix != "row"):
            raise ValueError(
                "prefixes.stored takes every row as one that the student wrote earlier: write prefixes: "
                "{student: 1, stored: true}, and nothing about its writing now."
            )
        if self.continue_tokens is not None and not self.on_policy:
            raise ValueError(
                "prefixes.continue_tokens has no effect without rows of the student: set prefixes.student."
            )

    @property
    def on_policy(self) -> bool:
        """True if the student ever writes in training."""
        if self.stored:
            return False
        if self.student is not None:
            return any(_ends(self.student))
        return self.dataset is not None and any(share < 1.0 for share in _ends(self.dataset))

    @property
    def adaptive(self) -> Schedule | None:
        """The student's share, where it follows the validation loss."""
        schedule = as_schedule(self.student)
        return schedule if schedule is not None and schedule.schedule == "adaptive" else None

    def student_share(self, progress: float) -> float:
        """The student's share at a point of training (an adaptive one: its start)."""
        if self.student is not None:
            schedule = self.adaptive
            return float(value_at(self.student, progress)) if schedule is None else schedule.start
        return 0.0 if self.dataset is None else 1.0 - float(value_at(self.dataset, progress))


def _ends(value: Any) -> tuple[float, ...]:
    schedule = as_schedule(value)
    if schedule is None:
        return (float(value),)
    return (schedule.start, schedule.start if schedule.end is None else schedule.end)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Old rollouts that are used again: generation is paid once, and an older student wrote the prefixes.

    Reference:
        Ko et al., DistiLLM, 2024, arXiv 2402.03898, section 3.2 (off-policy use of student-generated text).
    """

    __pydantic_config__ = STRICT

    capacity: int = 1000
    """Rollouts kept on each process; the oldest leave first."""
    max_age_steps: int | None = None
    """Rollouts older than this many optimizer steps are dropped; null: none is."""
    fresh: Scalar = Schedule(schedule="linear", start=1.0, end=0.0)
    """Share of the student's rows that are newly written, the others are drawn from the buffer. Until the
    buffer is full, all are new. DistiLLM's schedule falls from 1 to 0."""
    importance: bool = False
    """Correct for the age: the policy ratio is taken against the student that wrote the text. Needs strategy
    policy_gradient, whose clipping bounds the ratio."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "rollouts.replay",
            capacity=(self.capacity >= 1, ">= 1"),
            max_age_steps=(self.max_age_steps is None or self.max_age_steps >= 1, ">= 1, or null"),
        )
        if any(not 0.0 <= share <= 1.0 for share in _ends(self.fresh)):
            raise ValueError(f"rollouts.replay.fresh is a share in [0, 1], got {self.fresh}.")
        schedule = as_schedule(self.fresh)
        if schedule is not None and schedule.schedule == "adaptive":
            raise ValueError("rollouts.replay.fresh cannot be adaptive: use linear, cosine or step.")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The student's own writing: engine, sampling and limits."""

    __pydantic_config__ = STRICT

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers: the student's own generate, on any device. vllm: vLLM through TRL (extra `vllm`, needs a
    GPU)."""
    max_new_tokens: int = 256
    """Longest completion; train.max_length can cut it shorter. One that does not end by itself gets no
    end-token label."""
    max_prompt_tokens: int | None = None
    """Longer prompts keep their end, in generation and in training alike; null: no prompt is cut."""
    temperature: float = 1.0
    """Of the draw, > 0. At 1, with top_p 1, top_k 0 and min_p 0, tokens are drawn from the student's own
    distribution, which is what a `rollout` support assumes."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were written already become less likely."""
    num_rollouts: int = 1
    """Completions per prompt, side by side in a batch: a batch of b rows then holds b / n prompts."""
    batch_size: int = 32
    """Completions written at once; speed and memory only."""
    truncated: Literal["keep", "mask"] = "keep"
    """Completions cut at the length limit: keep their tokens as labels (never an end token), or mask all of
    them."""
    teacher_share: float = 0.0
    """Draw from (1 - a) student + a teacher (MiniLLM: 0.2); the policy gradient corrects for it."""
    replay: ReplayConfig | None = None
    """Use rollouts again; null: every rollout is trained on once."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of TRL's VLLMGeneration: mode (colocate or server), server_base_url,
    gpu_memory_utilization, max_model_length, tensor_parallel_size, ...; and of a colocated engine: dtype
    (that of the student's weights without it) and enforce_eager."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "rollouts",
            max_new_tokens=(self.max_new_tokens >= 1, ">= 1"),
            max_prompt_tokens=(
                self.max_prompt_tokens is None or self.max_prompt_tokens >= 1,
                ">= 1, or null",
            ),
            temperature=(self.temperature > 0, "> 0"),
            top_p=(0 < self.top_p <= 1, "in (0, 1]"),
            top_k=(self.top_k >= 0, ">= 0"),
            min_p=(0 <= self.min_p < 1, "in [0, 1)"),
            repetition_penalty=(self.repetition_penalty > 0, "> 0"),
            num_rollouts=(self.num_rollouts >= 1, ">= 1"),
            batch_size=(self.batch_size >= 1, ">= 1"),
            teacher_share=(0 <= self.teacher_share < 1, "in [0, 1)"),
        )
        if self.engine == "vllm" and self.teacher_share:
            raise ValueError(
                "rollouts.teacher_share mixes two models token by token, which vLLM cannot: use engine: "
                "transformers."
            )
        if self.engine != "vllm" and self.vllm:
            raise ValueError(
                "rollouts.vllm has no effect with engine: transformers: remove it, or set engine: vllm."
            )
        if self.engine == "vllm":
            _check_vllm(self.vllm)

    @property
    def draws_student_exactly(self) -> bool:
        """True if tokens come from the student's own distribution, unchanged."""
        return (
            self.temperature == self.top_p == self.repetition_penalty == 1.0
            and self.top_k == 0
            and self.min_p == self.teacher_share == 0.0
            and not self.vllm.keys() & _RESHAPING
        )


_COLOCATED = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "max_model_length",
    "max_num_seqs",
    "enable_sleep_mode",
    "model_impl",
    "trust_remote_code",
    "dtype",
    "enforce_eager",
)
_SERVED = ("server_base_url", "server_host", "server_port", "server_timeout", "group_port")
_RESHAPING = {"structured_outputs_regex", "generation_kwargs"}
# Of vLLM's sampling, what the fields of `rollouts` say, and what is read of every answer.
_TAKEN = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_tokens",
    "n",
    "logprobs",
    "prompt_logprobs",
}


def _check_vllm(options: Mapping[str, Any]) -> None:
    """Refuse arguments that TRL's VLLMGeneration does not take, gets from elsewhere, or would ignore."""
    mode = options.get("mode", "colocate")
    if mode not in ("colocate", "server"):
        raise ValueError(f"rollouts.vllm.mode is {mode!r}. Allowed: colocate, server.")
    allowed = ("mode", *sorted(_RESHAPING), *_COLOCATED, *_SERVED)
    for name in options:
        if name not in allowed:
            raise ValueError(f"rollouts.vllm has no {name!r}. {nearest(str(name), allowed)}")
        if name in (_SERVED if mode == "colocate" else _COLOCATED):
            other = "server" if mode == "colocate" else "colocate"
            raise ValueError(
                f"rollouts.vllm.{name} has no effect with mode: {mode}: remove it, or set mode: {other}"
                f"{' (a server takes it where it is started)' if mode == 'server' else ''}."
            )
    if "server_base_url" in options and options.keys() & {"server_host", "server_port"}:
        raise ValueError(
            "rollouts.vllm.server_host and server_port have no effect with server_base_url: give one."
        )
    if taken := sorted(_TAKEN & (options.get("generation_kwargs") or {}).keys()):
        raise ValueError(
            f"rollouts.vllm.generation_kwargs sets {', '.join(taken)}: set rollouts.temperature, top_p, "
            "top_k, min_p, repetition_penalty and max_new_tokens instead; the others are not to be set."
        )
