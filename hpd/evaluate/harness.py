"""Tasks of EleutherAI's lm-evaluation-harness, run and graded by it on our checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

__all__ = ["HARNESSES", "run_harness"]

HARNESSES = ("lm-eval",)


def run_harness(
    model: str,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_few_shot: int | None = None,
    batch_size: int = 32,
    dtype: str = "auto",
    chat_template: bool = False,
    system_prompt: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """What `lm_eval` finds: task -> "metric,filter" -> value, standard errors included.

    Args:
        model: folder or Hub id, loaded by the harness itself.
        tasks: names that the harness knows, or that `include` defines.
        include: folder of YAML tasks of your own.
        limit: first n problems of each task.
        num_few_shot: worked examples; None: as each task says.
        chat_template: wrap prompts in the tokenizer's chat template.
        system_prompt: system turn, or text before the prompt.
        generation: the harness's gen_kwargs, such as {"max_gen_toks": 256}.

    Raises:
        ValueError: lm_eval is not installed, or does not know a task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--harness lm-eval needs lm-evaluation-harness: pip install 'hpd[lm-eval]'.")
    import torch
    from lm_eval.evaluator import simple_evaluate  # type: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # type: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(include) if include is not None else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = (
            f" or in {include}"
            if include is not None
            else "; --data names a folder of YAML tasks of your own"
        )
        raise ValueError(f"lm-eval has no task {unknown[0]!r}{where}.")
    found: Any = cast("Any", simple_evaluate)(
        model="hf",
        model_args={"pretrained": model, "dtype": dtype},
        tasks=list(tasks),
        num_fewshot=num_few_shot,
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=limit,
        apply_chat_template=chat_template,
        system_instruction=system_prompt,
        gen_kwargs=dict(generation) if generation else None,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {
        task: {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
