"""Answers by vLLM: the same interface as `TransformersEngine`, for GPUs."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hpd.generation.engine import Request, longest_first
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Answer

__all__ = ["VllmEngine"]


# vLLM fills its own batches; this many at once keep it busy, and are what an interruption loses.
_BATCHES_PER_CALL = 16


class VllmEngine:
    """`vllm.LLM` on all GPUs of this machine.

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
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "--engine vllm needs vLLM: pip install 'hpd[vllm]' (Linux, a GPU), or use --engine "
                "transformers."
            )
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]

        self.tokenizer = tokenizer
        self._prompt, self._sampling = TokensPrompt, SamplingParams
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
