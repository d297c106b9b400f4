"""The draw of every sampled token: inverse CDF of one uniform number, whoever asks for it.

Axes: B prompts of a batch, T time, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hpd.methods.sampling import inverse_cdf

__all__ = ["Draw", "Sampling", "warpers"]


class Sampling(NamedTuple):
    """Settings of the draws of a batch."""

    uniforms: Float[Tensor, "B steps"]
    """Numbers in [0, 1), float64: the randomness of each prompt's draws."""
    warpers: LogitsProcessorList
    """Temperature and cuts, see `warpers`."""
    teacher: nn.Module | None = None
    """The model that is mixed in, where `teacher_share` is above 0."""
    teacher_share: float = 0.0
    """Share a of the distribution (1 - a) student + a teacher that is drawn from."""


def warpers(
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> LogitsProcessorList:
    """Changes of the logits before a draw; those that change nothing are left out."""
    found = LogitsProcessorList()
    if repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        found.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        found.append(MinPLogitsWarper(min_p))
    return found


class Draw(LogitsProcessor):
    """Draws each row's next token by inverse CDF and masks all others, so that argmax returns the draw.

    Args:
        sampling: how.
        prompt_mask: 1 at the prompts' tokens, 0 at the padding on their left.
    """

    def __init__(self, sampling: Sampling, prompt_mask: Int[Tensor, "B T"]) -> None:
        self._prompt_length = prompt_mask.shape[1]
        self._warpers = sampling.warpers
        dtype = torch.float32 if prompt_mask.device.type == "mps" else torch.float64  # MPS has no float64
        self._uniforms = sampling.uniforms.to(prompt_mask.device, dtype)
        self._mixture = _TeacherMixture(sampling, prompt_mask) if sampling.teacher_share else None
        self._logprobs: list[Float[Tensor, "B 1"]] = []

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        step = input_ids.shape[1] - self._prompt_length
        probs = torch.softmax(self._warpers(input_ids, scores.float()), -1)  # type: ignore[arg-type]
        if self._mixture is not None:
            probs = self._mixture(input_ids, probs)
        token = inverse_cdf(probs, self._uniforms[:, step, None])  # [B, 1]
        self._logprobs.append(torch.log_softmax(scores.float(), -1).gather(1, token))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    def logprobs(self) -> list[list[float]]:
        """The log-probability of each drawn token, row by row, in nats; see `Rollout`."""
        return torch.cat(self._logprobs, dim=1).tolist()


class _TeacherMixture:
    """(1 - a) student + a teacher, token by token, with a KV cache of the teacher's."""

    def __init__(self, sampling: Sampling, mask: Tensor) -> None:
        self._teacher: Any = sampling.teacher
        self._share = sampling.teacher_share
        self._mask = mask
        self._cache: Any = None

    def __call__(self, input_ids: Int[Tensor, "B T"], student: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        new = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.cat([self._mask, self._mask.new_ones(len(input_ids), new)], dim=1)
        fresh = slice(None) if self._cache is None else slice(-1, None)
        out = self._teacher(
            input_ids=input_ids[:, fresh],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, fresh],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        vocab = min(student.shape[1], out.logits.shape[-1])
        teacher = torch.softmax(out.logits[:, -1, :vocab].float(), -1)
        mixed = (1.0 - self._share) * student
        mixed[:, :vocab] += self._share * teacher
        return mixed
