"""Prompts, answers and rollouts. Nothing here imports torch: grading reads these in processes of its own."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["Answer", "Completion", "FinishReason", "Message", "Prompt", "Rollout"]

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer as text."""

    text: str
    """Without special tokens, and without the stop string. Of a conversation: the last reply."""
    turns: tuple[str, ...] = ()
    """Every reply of a conversation, the last is `text`; empty where there are no follow-ups."""
    num_tokens: int = 0
    """Tokens written, the end token included; of a conversation: of all replies."""
    finish_reason: FinishReason = "stop"
    """"stop": the model ended its answer, or wrote a stop string; "length": it was cut (in any turn)."""


class Rollout(NamedTuple):
    """A model's continuation of a prompt, token by token."""

    tokens: list[int]
    """The end token included, where it ended by itself."""
    ended: bool
    """False: cut at its limit, so the last token is no end and must not be learned as one."""
    logprobs: list[float]
    """Of each token under the model's unmodified distribution (temperature 1, nothing cut off), in nats; none
    where tokens are not drawn (greedy)."""

    @classmethod
    def cut(cls, tokens: list[int], logprobs: list[float], limit: int, end_ids: Collection[int]) -> "Rollout":
        """Cut after the first end token, or at the limit."""
        end = next((i + 1 for i, token in enumerate(tokens[:limit]) if token in end_ids), None)
        size = limit if end is None else end
        return cls(tokens[:size], end is not None, logprobs[:size])


class Completion(NamedTuple):
    """One text that a model wrote."""

    text: str
    num_tokens: int | None
    """Tokens written, the end token included; None where a server does not say."""
    finish_reason: str
    """stop, or length where it was cut."""
    prompt_ids: list[int] | None = None
    """Tokens of the prompt, where the completion's own are kept too."""
    ids: list[int] | None = None
    """Its tokens, the end token included."""
    logprobs: list[float] | None = None
    """Of each of them, under the writer's own distribution, in nats."""
