"""The student writes: token ids in, token ids out, by transformers' `generate` or by vLLM.

Axes: B prompts of a batch, T time, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl.models import unwrap_model_for_generation

from hpd.methods.prefixes import RolloutConfig
from hpd.methods.sampling import inverse_cdf

__all__ = ["Rollout", "RolloutEngine", "TransformersEngine", "VLLMEngine", "end_tokens", "make_engine"]


class Rollout(NamedTuple):
    """What the student wrote after a prompt."""

    tokens: list[int]
    """The end token included, where it ended by itself."""
    ended: bool
    """False: cut at its limit, so the last token is no end and must not be learnt as one."""
    logprobs: list[float]
    """Of each token under the student's own distribution (temperature 1, nothing cut off), in nats."""


class RolloutEngine(Protocol):
    """Anything that continues prompts with the student's weights as they are now."""

    def generate(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], uniforms: Tensor, step: int
    ) -> list[Rollout]:
        """Continue every prompt.

        Args:
            prompts: token ids, at least one each.
            limits: longest continuation of each, in tokens, >= 1.
            uniforms: `[B, max(limits)]` numbers in [0, 1), float64: the randomness of each prompt's draws.
            step: the optimiser step; weights are those after `step` updates.

        Every process must call it at the same time, with no prompts if it has none.
        """
        ...


class TransformersEngine:
    """The student's own `generate`: KV cache, left padding, prompts sorted by length.

    A draw is the inverse CDF of one uniform number, so a rollout does not depend on the other prompts of its
    batch, on their order or on the batch size (up to the rounding of the model's forward pass). Works inside
    DDP and ZeRO-3 (unwrapped, gathered) and FSDP2 (whose hooks gather layer by layer), under LoRA, with
    gradient checkpointing switched off meanwhile.

    Args:
        student: returns the model as it is wrapped at the moment.
        accelerator: what wrapped it.
        config: lengths, temperature and cuts.
        end_ids: tokens that end a completion.
        pad_id: fills prompts on the left.
        teacher: for `teacher_share`, the model that is mixed in.
    """

    def __init__(
        self,
        student: Callable[[], nn.Module],
        accelerator: Accelerator,
        config: RolloutConfig,
        end_ids: Sequence[int],
        pad_id: int,
        teacher: nn.Module | None = None,
    ):
        self._student, self._accelerator, self._config = student, accelerator, config
        self._end_ids, self._pad_id, self._teacher = list(end_ids), pad_id, teacher

    def generate(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], uniforms: Tensor, step: int
    ) -> list[Rollout]:
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), -limits[i]))
        size = self._config.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        # Counted before the first batch: afterwards one process would ask while another still gathers
        # weights.
        missing = self._missing_batches(len(batches))
        out: dict[int, Rollout] = {}
        with self._ready() as model:
            for indices in batches:
                chosen = [prompts[i] for i in indices]
                rows = self._batch(model, chosen, [limits[i] for i in indices], uniforms[indices])
                out.update(zip(indices, rows, strict=True))
            for _ in range(missing):
                self._batch(model, [[self._pad_id]], [1], torch.zeros(1, 1, dtype=torch.float64))
        return [out[i] for i in range(len(prompts))]

    def _missing_batches(self, mine: int) -> int:
        """Sharded models gather their weights together, so every process must generate equally often."""
        if self._accelerator.num_processes == 1:
            return 0
        return max(gather_object([mine])) - mine

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The unwrapped model in evaluation mode, with a generation config that brings no penalties of its
        own."""
        with unwrap_model_for_generation(self._student(), self._accelerator) as model, torch.no_grad():  # type: ignore[arg-type]
            modes = {module: module.training for module in model.modules()}
            base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
            own, base.generation_config = base.generation_config, GenerationConfig()
            model.eval()
            try:
                yield model
            finally:
                base.generation_config = own
                for module, training in modes.items():
                    module.training = training

    def _batch(
        self, model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], uniforms: Tensor
    ) -> list[Rollout]:
        length, device = max(map(len, prompts)), self._accelerator.device
        ids = torch.tensor([[self._pad_id] * (length - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
        mixture = (
            _TeacherMixture(self._teacher, mask, self._config.teacher_share)
            if self._config.teacher_share
            else None
        )
        draw = _Draw(uniforms.to(device), length, _warpers(self._config), mixture)
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=False,
            use_cache=True,
            eos_token_id=self._end_ids or None,
            pad_token_id=self._pad_id,
        )
        written = model.generate(
            inputs=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            synced_gpus=_is_sharded(model) or None,
        )[:, length:].tolist()
        logprobs = torch.cat(draw.logprobs, dim=1).tolist()
        return [self._cut(*row) for row in zip(written, logprobs, limits, strict=True)]

    def _cut(self, tokens: list[int], logprobs: list[float], limit: int) -> Rollout:
        end = next((i + 1 for i, token in enumerate(tokens[:limit]) if token in self._end_ids), None)
        size = limit if end is None else end
        return Rollout(tokens[:size], end is not None, logprobs[:size])


def _is_sharded(model: nn.Module) -> bool:
    """FSDP2 gathers layer by layer, so all processes must take equally many steps; `generate` itself knows
    FSDP1 and ZeRO-3."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


class _Draw(LogitsProcessor):
    """Draws each row's next token by inverse CDF and masks all others, so that argmax returns the draw."""

    def __init__(
        self,
        uniforms: Tensor,
        prompt_length: int,
        warpers: LogitsProcessorList,
        mixture: _TeacherMixture | None,
    ) -> None:
        self.logprobs: list[Tensor] = []
        self._uniforms, self._prompt_length, self._warpers, self._mixture = (
            uniforms,
            prompt_length,
            warpers,
            mixture,
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_length
        log_q = torch.log_softmax(scores.float(), -1)  # [B, V]
        probs = torch.softmax(self._warpers(input_ids, scores.float()), -1)  # type: ignore[arg-type]
        if self._mixture is not None:
            probs = self._mixture(input_ids, probs)
        token = inverse_cdf(probs, self._uniforms[:, step, None])
        self.logprobs.append(log_q.gather(1, token))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _TeacherMixture:
    """(1 - a) student + a teacher, token by token, with a KV cache of the teacher's own."""

    def __init__(self, teacher: Any, mask: Tensor, share: float) -> None:
        self._teacher, self._mask, self._share, self._cache = teacher, mask, share, None

    def __call__(self, input_ids: Tensor, student: Tensor) -> Tensor:
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


def _warpers(config: RolloutConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k > 0:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p > 0.0:
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers


class VLLMEngine:
    """vLLM through TRL's `VLLMGeneration`, colocated on the training GPUs or on a server; weights are sent
    after each update.

    vLLM draws by itself: its rollouts are not a function of `uniforms`.

    Args:
        generation: a `trl.generation.vllm_generation.VLLMGeneration`, or anything with its `generate` and
            `sync_weights`.
        end_ids: tokens that end a completion.
    """

    def __init__(self, generation: Any, accelerator: Accelerator, end_ids: Sequence[int]):
        self._generation, self._accelerator, self._end_ids = generation, accelerator, set(end_ids)
        self._synced: int | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], uniforms: Tensor, step: int
    ) -> list[Rollout]:
        # A server hands each process a slice as long as its own list: all must be of one length.
        count = max(gather_object([len(prompts)])) if self._accelerator.num_processes > 1 else len(prompts)
        if count == 0:
            return []
        if step != self._synced:
            self._generation.sync_weights()
            self._synced = step
        filled = [list(p) for p in prompts] + [[0]] * (count - len(prompts))
        _, tokens, logprobs, _ = self._generation.generate(prompts=filled, images=None, num_generations=1)
        rows = zip(tokens[: len(prompts)], logprobs[: len(prompts)], limits, strict=True)
        return [self._cut(list(ids), [float(lp[0]) for lp in lps], limit) for ids, lps, limit in rows]

    def _cut(self, tokens: list[int], logprobs: list[float], limit: int) -> Rollout:
        ended = len(tokens) <= limit and bool(tokens) and tokens[-1] in self._end_ids
        return Rollout(tokens[:limit], ended, logprobs[:limit])


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: the checkpoint's, and the tokenizer's, which fine-tuned checkpoints often
    lack."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys(token for token in [*own, tokenizer.eos_token_id] if token is not None))


def make_engine(
    config: RolloutConfig,
    student: Callable[[], nn.Module],
    base: nn.Module,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    teacher: nn.Module | None,
) -> RolloutEngine:
    """The engine that `config` names.

    Raises:
        ValueError: vLLM is not installed, or teacher_share without a teacher that runs beside the student.
    """
    end_ids = end_tokens(base, tokenizer)
    if config.engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "rollouts.engine: vllm needs vLLM: pip install 'hpd[vllm]', or use engine: transformers."
            )
        from trl.generation.vllm_generation import VLLMGeneration

        generation = VLLMGeneration(
            base,
            accelerator,
            tokenizer,  # type: ignore[arg-type]
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            max_completion_length=config.max_new_tokens,
            **config.vllm,
        )
        return VLLMEngine(generation, accelerator, end_ids)
    if config.teacher_share and teacher is None:
        raise ValueError(
            "rollouts.teacher_share needs a teacher that runs beside the student: teacher type model."
        )
    pad_id: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    return TransformersEngine(student, accelerator, config, end_ids, pad_id, teacher)
