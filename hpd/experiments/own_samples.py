"""Measures on the text that a student writes itself: its entropy, and both KLs to the teacher there.

Axes: B prompts, N written tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hpd.evaluate import GenerationSettings, generate_answers
from hpd.experiments.tertiles import position_figures
from hpd.files import JsonLines
from hpd.generation.texts import Answer, Prompt

__all__ = ["OwnSampleCurve", "own_sample_metrics"]

_BATCH = 32


def own_sample_metrics(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
) -> dict[str, float]:
    """Means over the tokens that the student writes after `prompts`, in nats per token.

    Prompts in chat form are refused: their template would have to be cut at the right token.

    Returns:
        own_entropy (the student's), own_reverse_kl = KL(student || teacher) and own_forward_kl = KL(teacher
        || student).
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        raise ValueError("own_samples needs prompts of plain text; use `hpd eval` for chats.")
    answers = generate_answers(student, tokenizer, list(prompts), settings)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(prompts), _BATCH):
        pairs = list(zip(texts[start : start + _BATCH], answers[start : start + _BATCH], strict=True))
        sums += _sum_batch(student, teacher, tokenizer, pairs)
    tokens = max(float(sums[0]), 1.0)
    names = ("own_entropy", "own_forward_kl", "own_reverse_kl")
    return {name: round(float(value) / tokens, 6) for name, value in zip(names, sums[1:], strict=True)}


class OwnSampleCurve(TrainerCallback):
    """Measures the student's own text before the first step and after every n-th; training sees nothing of
    it.

    Args:
        path: gets a line per measurement, the step and its figures; lines of steps that a resumed run does
            again are dropped.
        every: optimizer steps between two measurements.
        measure: takes the student, in evaluation mode, and returns its figures.
    """

    def __init__(self, path: Path, every: int, measure: Callable[[nn.Module], dict[str, float]]):
        self._lines = JsonLines(path)
        self._every = every
        self._measure = measure

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        self._lines.write(line for line in self._lines.read() if step and line["step"] <= step)
        if not step:
            self._add(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._add(state.global_step, model)

    def _add(self, step: int, model: Any) -> None:
        was_training = model.training
        model.eval()
        figures = self._measure(model)
        model.train(was_training)
        self._lines.append({"step": step, **figures})


@torch.no_grad()
def _sum_batch(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, Answer]],
) -> Float[Tensor, "4"]:
    """Number of written tokens; sums of entropy, KL(teacher || student), KL(student || teacher) over them."""
    device = next(student.parameters()).device
    prefixes = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    written = [
        tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id] * (answer.finish_reason == "stop")
        for _, answer in pairs
    ]
    rows = [prefix + tokens for prefix, tokens in zip(prefixes, written, strict=True)]
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    position = torch.arange(longest, device=device)
    # Position t predicts token t + 1: the written tokens are predicted from the prompt's last one on.
    first = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)[:, None]
    last = torch.tensor([len(row) - 1 for row in rows], device=device)[:, None]
    chosen = (position >= first) & (position < last)  # [B, T]
    # Padding stands on the right, where causal attention never looks at it.
    logits = [model(input_ids=ids).logits[chosen] for model in (teacher, student)]  # [N, V]
    # The teacher's entropy, the first figure, is not asked for.
    return torch.cat([chosen.sum()[None].double(), position_figures(*logits).sum(0)[1:]]).cpu()
