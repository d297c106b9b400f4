"""Answers and rollouts by vLLM, for GPUs."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hpd.generation.engine import Request, longest_first
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Answer, Rollout

__all__ = ["VllmEngine", "VllmRollouts", "require_vllm"]

# vLLM fills its own batches; this many at once keep it busy, and are what an interruption loses.
_BATCHES_PER_CALL = 16


def require_vllm(option: str) -> None:
    """Raise ValueError where vLLM is not installed; `option` is what asked for it."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"{option} vllm needs vLLM: pip install 'hybrid-policy-distillation[vllm]' (Linux, a GPU), or "
            f"use {option} transformers."
        )


class VllmEngine:
    """`vllm.LLM` on all GPUs of this machine: the interface of `TransformersEngine`.

    Args:
        model: folder or Hub id.
        tokenizer: the model's, as hpd loads it: prompts are encoded here, vLLM gets token ids.
        dtype: of the weights.
        revision: branch, tag or commit on the Hub.
        tensor_parallel_size: GPUs that share the model.

    Raises:
        ValueError: vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        tensor_parallel_size: int = 1,
    ):
        require_vllm("--engine")
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]

        self.tokenizer = tokenizer
        self._prompt = TokensPrompt
        self._sampling = SamplingParams
        # generation_config="vllm": what the checkpoint says about decoding is ignored, as everywhere here.
        self._model = LLM(
            model=model,
            tokenizer=tokenizer.name_or_path,
            dtype=dtype,
            revision=revision,
            tensor_parallel_size=tensor_parallel_size,
            generation_config="vllm",
        )

    @property
    def context(self) -> int | None:
        return int(self._model.llm_engine.model_config.max_model_len)

    def batches(self, lengths: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
        return longest_first(lengths, settings.batch_size * _BATCHES_PER_CALL)

    def generate(self, requests: Sequence[Request], settings: GenerationSettings, limit: int) -> list[Answer]:
        prompts = [self._prompt(prompt_token_ids=request.token_ids) for request in requests]
        parameters = [self._parameters(request, settings, limit) for request in requests]
        outputs = self._model.generate(prompts, parameters, use_tqdm=False)
        return [_answer(output.outputs[0]) for output in outputs]

    def _parameters(self, request: Request, settings: GenerationSettings, limit: int) -> Any:
        sampling: dict[str, Any] = {}
        if settings.temperature > 0:
            seed = int(np.random.SeedSequence(request.entropy).generate_state(1)[0])
            sampling = {"top_p": settings.top_p, "top_k": settings.top_k or -1, "seed": seed}
        return self._sampling(
            temperature=settings.temperature, max_tokens=limit, stop=list(settings.stop) or None, **sampling
        )


def _answer(completion: Any) -> Answer:
    return Answer(
        text=completion.text,
        num_tokens=len(completion.token_ids),
        finish_reason="length" if completion.finish_reason == "length" else "stop",
    )


class VllmRollouts:
    """vLLM through TRL's `VLLMGeneration`, colocated on the training GPUs or on a server; weights are sent
    after each update.

    vLLM draws by itself: its rollouts are not a function of `uniforms`. TRL has it return log-probabilities
    of the distribution that it draws from, which are the student's own only where nothing reshapes that; so
    regimes that read them refuse other settings.

    Args:
        generation: a `trl.generation.vllm_generation.VLLMGeneration`, or anything with its `generate` and
            `sync_weights`.
        accelerator: of the training.
        end_ids: tokens that end a completion.
    """

    def __init__(self, generation: Any, accelerator: Accelerator, end_ids: Sequence[int]):
        self._generation = generation
        self._accelerator = accelerator
        self._end_ids = set(end_ids)
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
        return [
            Rollout.cut(list(ids), [float(lp[0]) for lp in lps], limit, self._end_ids)
            for ids, lps, limit in rows
        ]
