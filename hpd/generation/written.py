"""A line of what `hpd generate` writes: what training reads, and columns that say where it comes from."""

from __future__ import annotations

from typing import Any

from hpd.batch import BEHAVIOR_LOGPROBS, IGNORE_INDEX
from hpd.config.schema import GenerateConfig
from hpd.generation.texts import Completion, Prompt

__all__ = ["written_row"]


def written_row(
    row: int, sample: int, prompt: Prompt, completion: Completion, config: GenerateConfig, name: str
) -> dict[str, Any]:
    """The line of one completion: texts, or with `generate.logprobs` token ids.

    Args:
        row, sample: the prompt's row in the dataset, and which of its completions this is.
        name: the writer's.
    """
    read: dict[str, Any] = {"prompt": prompt, "completion": completion.text}
    if not isinstance(prompt, str):
        read["completion"] = [{"role": "assistant", "content": completion.text}]
    if completion.ids is not None and completion.prompt_ids is not None and completion.logprobs is not None:
        before = len(completion.prompt_ids)
        read = {
            "input_ids": completion.prompt_ids + completion.ids,
            "labels": [IGNORE_INDEX] * before + completion.ids,
            BEHAVIOR_LOGPROBS: [None] * before + completion.logprobs,
            "written": completion.text,
        }
    return {
        **read,
        "source_row": row,
        "sample": sample,
        "model": name,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "num_tokens": completion.num_tokens,
        "finish_reason": completion.finish_reason,
    }
