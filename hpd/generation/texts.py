"""What a model is asked and what it wrote. Nothing here imports torch: grading reads these in processes of
its own."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Answer", "FinishReason", "Message", "Prompt"]


Message: TypeAlias = dict[str, str]


Prompt: TypeAlias = str | list[Message]


FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote."""

    text: str
    """Without special tokens, and without the stop string. Of a conversation: the last reply."""
    turns: tuple[str, ...] = ()
    """Every reply of a conversation, the last is `text`; empty where there are no follow-ups."""
    num_tokens: int = 0
    """Tokens written, the end token included; of a conversation: of all replies."""
    finish_reason: FinishReason = "stop"
    """"stop": the model ended its answer, or wrote a stop string; "length": it was cut (in any turn)."""
