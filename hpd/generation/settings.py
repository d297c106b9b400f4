"""Settings of the evaluation's answers: decoding, batch size, template."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["GREEDY", "GenerationSettings"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of decoding. Those of the checkpoint's own generation config are ignored."""

    max_new_tokens: int = 512
    """Longest answer, in tokens; longer ones are cut. The model's context can be a lower limit
    (`generate_answers`)."""
    temperature: float = 0.0
    """0 is greedy; above 0, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Sampling only: keep the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int = 0
    """Sampling only: keep this many most likely tokens; 0 keeps all."""
    num_samples: int = 1
    """Sampling only: answers per problem."""
    batch_size: int = 16
    """Prompts per forward pass: speed and memory only, answers do not depend on it (see
    `generate_answers`)."""
    seed: int = 0
    """Sampling only: which draws."""
    chat_template: Literal["auto", "never", "always"] = "auto"
    """Wrap prompts in the tokenizer's chat template; auto does so exactly if the tokenizer has one."""
    system_prompt: str | None = None
    """System turn before every prompt; without a chat template, a paragraph before it. None adds none."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; the answer is cut before the first of them."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "num_samples": (self.num_samples >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "chat_template": (self.chat_template in ("auto", "never", "always"), "auto, never or always"),
            "stop": (all(self.stop), "strings of at least one character"),
        }
        for name, (valid, allowed) in checks.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                f"top_p={self.top_p} and top_k={self.top_k} have no effect at temperature 0 (greedy); set a "
                "temperature above 0, or leave both at their defaults."
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"num_samples={self.num_samples} at temperature 0 (greedy) would write the same answer "
                f"{self.num_samples} times; set a temperature above 0 (--preset paper: 0.7 and top-p 0.95), "
                "or one sample."
            )


GREEDY = GenerationSettings()
