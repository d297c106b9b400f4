"""Answers and rollouts by vLLM.

vLLM's own choice of a dtype ("auto") halves float32 weights, and other weights write other text: here it is
always told the dtype.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hpd.generation.engine import Request, end_token_ids, longest_first
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Answer, Rollout
from hpd.methods.fields import check_fields
from hpd.methods.prefixes import RolloutConfig
from hpd.models.dtypes import dtype_name

__all__ = ["VllmEngine", "VllmOptions", "VllmRollouts", "make_vllm_rollouts", "require_vllm", "rollout_dtype"]

# vLLM fills its own batches; this many at once keep it busy, and are what an interruption loses.
_BATCHES_PER_CALL = 16


def require_vllm(option: str) -> None:
    """Raise ValueError where vLLM is not installed; `option` is what asked for it."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"{option} vllm needs vLLM: pip install 'hybrid-policy-distillation[vllm]' (Linux, a GPU), or "
            f"use {option} transformers."
        )


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Settings of the engine of `hpd eval` beside the model's; None: vLLM's own choice."""

    tensor_parallel: int = 1
    """GPUs that share a model."""
    memory_share: float | None = None
    """Share of a GPU's memory for weights and cache, in (0, 1]."""
    max_length: int | None = None
    """Most tokens of prompt and answer together; None: the model's context."""
    eager: bool = False
    """No CUDA graphs: a faster start and less memory, slower tokens."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "vllm",
            tensor_parallel=(self.tensor_parallel >= 1, ">= 1"),
            memory_share=(self.memory_share is None or 0 < self.memory_share <= 1, "in (0, 1]"),
            max_length=(self.max_length is None or self.max_length >= 2, ">= 2"),
        )

    def arguments(self) -> dict[str, Any]:
        """As `vllm.LLM` takes them."""
        given = {
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.memory_share,
            "max_model_len": self.max_length,
            "enforce_eager": self.eager or None,
        }
        return {name: value for name, value in given.items() if value is not None}


class VllmEngine:
    """`vllm.LLM` on all GPUs of this machine: the interface of `TransformersEngine`.

    Args:
        model: folder or Hub id.
        tokenizer: the model's, as hpd loads it: prompts are encoded here, vLLM gets token ids.
        dtype: of the weights, such as "float32"; vLLM's "auto" is none.
        revision: branch, tag or commit on the Hub.
        options: of the engine.

    Raises:
        ValueError: vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        revision: str | None = None,
        options: VllmOptions = VllmOptions(),
    ):
        require_vllm("--engine")
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]

        self.tokenizer = tokenizer
        self.dtype = dtype
        self._prompt = TokensPrompt
        self._sampling = SamplingParams
        # generation_config="vllm": what the checkpoint says about decoding is ignored, as everywhere here.
        self._model = LLM(
            model=model,
            tokenizer=tokenizer.name_or_path,
            dtype=dtype,
            revision=revision,
            generation_config="vllm",
            **options.arguments(),
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
    of the distribution that it draws from, which are the student's own only where nothing reshapes that:
    elsewhere rollouts have none, and regimes that read them refuse such settings.

    Args:
        generation: a `trl.generation.vllm_generation.VLLMGeneration`, or anything with its `generate` and
            `sync_weights`.
        accelerator: of the training.
        end_ids: tokens that end a completion.
        draws_exactly: tokens come from the student's own distribution.
    """

    def __init__(
        self, generation: Any, accelerator: Accelerator, end_ids: Sequence[int], draws_exactly: bool = True
    ):
        self._generation = generation
        self._accelerator = accelerator
        self._end_ids = set(end_ids)
        self._draws_exactly = draws_exactly
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
            Rollout.cut(list(ids), self._own(logprobs), limit, self._end_ids) for ids, logprobs, limit in rows
        ]

    def _own(self, logprobs: Sequence[Sequence[float | None]]) -> list[float]:
        """Log-probabilities of tokens under the student itself; NaN where vLLM has none."""
        if not self._draws_exactly:
            return []
        return [float("nan") if first is None else first for first, *_ in logprobs]


def rollout_dtype(config: RolloutConfig, student: nn.Module) -> str:
    """The dtype of colocated vLLM: `rollouts.vllm.dtype`, else that of the student's weights."""
    own = next(p.dtype for p in student.parameters() if p.is_floating_point())
    return str(config.vllm.get("dtype", dtype_name(own)))


def make_vllm_rollouts(
    config: RolloutConfig, student: nn.Module, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
) -> VllmRollouts:
    """vLLM as `rollouts` describes it.

    Raises:
        ValueError: vLLM is not installed.
    """
    require_vllm("rollouts.engine:")
    from trl.generation import vllm_generation

    given = {name: value for name, value in config.vllm.items() if name not in ("dtype", "enforce_eager")}
    engine: dict[str, Any] = {"dtype": rollout_dtype(config, student)}
    if config.vllm.get("enforce_eager"):
        engine["enforce_eager"] = True
    with _starting_engines_with(vllm_generation, **engine):
        generation = vllm_generation.VLLMGeneration(
            student,  # type: ignore[arg-type]
            accelerator,
            tokenizer,  # type: ignore[arg-type]
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            max_completion_length=config.max_new_tokens,
            **given,
        )
    end_ids = end_token_ids(student, tokenizer)
    return VllmRollouts(generation, accelerator, end_ids, config.draws_student_exactly)


@contextmanager
def _starting_engines_with(module: Any, **arguments: Any) -> Iterator[None]:
    """Add arguments to every engine that TRL's `module` starts: it takes no dtype, and vLLM's own choice is
    not the student's."""
    original = module.LLM
    module.LLM = functools.partial(original, **arguments)
    try:
        yield
    finally:
        module.LLM = original
