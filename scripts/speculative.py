"""Speculative decoding with a distilled student: what its acceptance predicts, and what transformers does.

    python scripts/speculative.py STUDENT TEACHER --data rows.jsonl [--drafted 4 --rows 8 --new-tokens 64]

The teacher samples answers to the first prompts (temperature 1, nothing cut off) with the student as
`assistant_model`, which drafts `--drafted` tokens a call. Then both models read the texts that were written:
alpha is the mean over their answers of sum_v min(p_v, q_v). No answer ends before its limit: both write, and
alpha is taken, without the tokens that end one. Of every call with g drafts the teacher keeps

    E = (1 - alpha^(g + 1)) / (1 - alpha)

tokens, the one that it writes itself included (Leviathan, Kalman and Matias, 2023, arXiv 2211.17192, eq. 1;
it takes the acceptance of one token as independent of the next), and writes E / (g c + 1) times as fast as
alone where a step of the student costs c steps of the teacher.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["Written", "acceptance_of", "expected_tokens", "speed_up", "write"]


def expected_tokens(alpha: float, drafted: int) -> float:
    """Tokens that a call of the teacher yields where it keeps each of `drafted` tokens with chance `alpha`.

    >>> expected_tokens(0.5, 2)
    1.75
    >>> expected_tokens(1.0, 4)
    5.0
    """
    return sum(alpha**kept for kept in range(drafted + 1))


def speed_up(alpha: float, drafted: int, cost: float) -> float:
    """How many times as fast the teacher writes; `cost` is that of a student's step in steps of the teacher.

    >>> round(speed_up(0.8, 4, 0.25), 2)
    1.68
    """
    return expected_tokens(alpha, drafted) / (drafted * cost + 1.0)


class Written(NamedTuple):
    """Answers that were written with drafts."""

    texts: list[torch.Tensor]
    """Token ids of prompt and answer."""
    prompts: list[int]
    """Tokens of each prompt."""
    calls: int
    """Forward passes of the teacher."""

    @property
    def tokens_per_call(self) -> float:
        """Tokens of the answers for each pass of the teacher."""
        return sum(len(t) - p for t, p in zip(self.texts, self.prompts, strict=True)) / self.calls


def write(
    teacher: Any, student: Any, prompts: Sequence[torch.Tensor], drafted: int, new_tokens: int
) -> Written:
    """Let `teacher` answer with `student` as its assistant, `new_tokens` a prompt.

    The limit cuts the last call of an answer, whose drafts are fewer: one call in many.
    """
    settings = student.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = drafted, "constant"
    settings.assistant_confidence_threshold = 0.0
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = teacher.register_forward_pre_hook(count)
    texts = []
    try:
        for prompt in prompts:
            out = teacher.generate(
                prompt[None], attention_mask=torch.ones_like(prompt[None]), assistant_model=student,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
            texts.append(out[0])
    finally:
        hook.remove()
    return Written(texts, [len(prompt) for prompt in prompts], calls)


@torch.no_grad()
def acceptance_of(teacher: Any, student: Any, written: Written) -> float:
    """Mean over the answers' tokens of the mass that both distributions share, without the ends that `write`
    forbids: transformers takes the teacher's for both."""
    ends = teacher.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    total, count = 0.0, 0
    for text, prompt in zip(written.texts, written.prompts, strict=True):
        p, q = (
            _without(model(text[None, :-1]).logits[0, prompt - 1 :].double(), ends).softmax(-1)
            for model in (teacher, student)
        )
        total += float(torch.minimum(p, q).sum())
        count += len(p)
    return total / count


def _without(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    logits[:, list(tokens)] = -torch.inf
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with question or prompt")
    parser.add_argument("--drafted", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.teacher)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (given.teacher, given.student)
    )
    with given.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, given.rows)]
    chats = [[{"role": "user", "content": row.get("question") or row["prompt"]}] for row in rows]
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats
    ]
    prompts = [
        tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0] for text in texts
    ]
    for drafted in given.drafted:
        torch.manual_seed(0)
        written = write(teacher, student, prompts, drafted, given.new_tokens)
        alpha = acceptance_of(teacher, student, written)
        predicted = expected_tokens(alpha, drafted)
        print(
            f"{drafted} drafts a call: acceptance {alpha:.3f}, predicted {predicted:.2f} tokens a call, "
            f"measured {written.tokens_per_call:.2f} ({written.calls} calls)",
            flush=True,
        )


if __name__ == "__main__":
    main()
