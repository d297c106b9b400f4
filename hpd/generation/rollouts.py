"""The student writes: token ids in, token ids out, with its weights as they are now.

Axes: B prompts of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from hpd.generation.drawing import Sampling, warpers
from hpd.generation.engine import TransformersEngine, longest_first
from hpd.generation.texts import Rollout
from hpd.generation.vllm_engine import make_vllm_rollouts
from hpd.methods.prefixes import RolloutConfig
from hpd.models.quantized import is_quantized

__all__ = ["Rollout", "RolloutEngine", "StudentRollouts", "make_engine"]


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
            step: the optimizer step; weights are those after `step` updates.

        Every process must call it at the same time, with no prompts if it has none.
        """
        ...


class StudentRollouts:
    """A `TransformersEngine` around the student in training.

    Works inside DDP and ZeRO-3 (unwrapped, gathered) and FSDP2 (whose hooks gather layer by layer), under
    LoRA, with gradient checkpointing switched off meanwhile.

    Args:
        student: returns the model as it is wrapped at the moment.
        accelerator: what wrapped it.
        tokenizer: the student's.
        config: batch size, temperature and cuts.
        teacher: for `teacher_share`, the model that is mixed in.
    """

    def __init__(
        self,
        student: Callable[[], nn.Module],
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        teacher: nn.Module | None = None,
    ):
        self._student = student
        self._accelerator = accelerator
        self._tokenizer = tokenizer
        self._config = config
        self._teacher = teacher
        self._warpers = warpers(
            config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], uniforms: Tensor, step: int
    ) -> list[Rollout]:
        sizes = [(len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
        batches = longest_first(sizes, self._config.batch_size)
        # Counted before the first batch: afterwards one process would ask while another still gathers
        # weights.
        missing = self._missing_batches(len(batches))
        out: dict[int, Rollout] = {}
        student: Any = self._student()
        with unwrap_model_for_generation(student, self._accelerator) as model:
            engine = TransformersEngine(model, self._tokenizer, self._accelerator.device)
            for indices in batches:
                sampling = self._sampling(uniforms[indices])
                rows = engine.write([prompts[i] for i in indices], [limits[i] for i in indices], sampling)
                out.update(zip(indices, rows, strict=True))
            for _ in range(missing):
                engine.write([[0]], [1], self._sampling(torch.zeros(1, 1, dtype=torch.float64)))
        return [out[i] for i in range(len(prompts))]

    def _sampling(self, uniforms: Float[Tensor, "B steps"]) -> Sampling:
        return Sampling(uniforms, self._warpers, self._teacher, self._config.teacher_share)

    def _missing_batches(self, count: int) -> int:
        """Sharded models gather their weights together, so every process must generate equally often."""
        if self._accelerator.num_processes == 1:
            return 0
        return max(gather_object([count])) - count


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
        ValueError: vLLM is not installed or the student quantized, or teacher_share without a teacher that
            runs beside the student.
    """
    if config.engine == "vllm":
        if is_quantized(base):
            raise ValueError(
                "rollouts.engine: vllm gets whole weights, and an adapter merged into quantized ones would "
                "be rounded away: take rollouts.engine: transformers."
            )
        return make_vllm_rollouts(config, base, accelerator, tokenizer)
    if config.teacher_share and teacher is None:
        raise ValueError(
            "rollouts.teacher_share needs a teacher that runs next to the student: teacher type model."
        )
    return StudentRollouts(student, accelerator, tokenizer, config, teacher)
