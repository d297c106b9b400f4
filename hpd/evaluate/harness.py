"""Tasks of EleutherAI's lm-evaluation-harness, run and graded by it on our checkpoints."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from hpd.config.models import ModelConfig
from hpd.evaluate.command import load_on_device
from hpd.evaluate.run import write_entry
from hpd.locks import holding
from hpd.models.adapters import find_adapter
from hpd.models.load import load_config

__all__ = ["HARNESSES", "HarnessCommand", "run_harness"]

HARNESSES = ("lm-eval",)

Results = dict[str, dict[str, float]]
"""Task -> "metric,filter" -> value, standard errors included."""


@dataclass(frozen=True, kw_only=True)
class HarnessCommand:
    """Models that a harness evaluates (`hpd eval --harness`)."""

    models: tuple[str, ...]
    """Folders or Hub ids, loaded by the harness itself; adapters are merged into their bases for it."""
    harness: str = "lm-eval"
    """A name of `HARNESSES`."""
    tasks: tuple[str, ...]
    """Names that the harness knows, or that `include` defines."""
    include: Path | None = None
    """Folder of YAML tasks of your own."""
    limit: int | None = None
    """First n problems of each task."""
    few_shot: int = 0
    """Worked examples; 0: as each task says."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `GenerationSettings`; None: not given."""
    dtype: str = "auto"
    """Of the weights."""
    output: Path | None = None
    """Folder of evals.json; None writes nothing."""

    def __post_init__(self) -> None:
        if self.harness not in HARNESSES:
            raise ValueError(f"Unknown harness {self.harness!r}; known: {', '.join(HARNESSES)}.")
        unused = [key for key in ("num_samples", "top_k") if self.generation.get(key) is not None]
        unused += ["seed"] if self.generation.get("seed") else []
        if unused:
            raise ValueError(f"{unused[0]} is not passed on to lm-eval; leave it out.")

    def sampling(self) -> dict[str, Any]:
        """The harness's gen_kwargs."""
        names = {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "max_gen_toks"}
        given = {names[key]: value for key, value in self.generation.items() if key in names}
        chosen = {key: value for key, value in given.items() if value is not None}
        return {**chosen, "do_sample": True} if chosen.get("temperature") else chosen

    def identity(self, model: str) -> dict[str, Any]:
        """An evaluation in evals.json is replaced by a later one of equal values."""
        return {
            "model": model,
            "harness": self.harness,
            "tasks": list(self.tasks),
            "limit": self.limit,
            "few_shot": self.few_shot,
            "settings": dict(self.generation),
        }


def run_harness(command: HarnessCommand) -> Iterator[tuple[str, Results]]:
    """Each model and what lm-eval finds.

    Raises:
        ValueError: lm_eval is not installed, or does not know a task; another process writes to the folder of
            results.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--harness lm-eval needs lm-evaluation-harness: "
            "pip install 'hybrid-policy-distillation[lm-eval]'."
        )
    from lm_eval.tasks import TaskManager  # type: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(command.include) if command.include is not None else None)
    unknown = [task for task in command.tasks if task not in manager.all_tasks]
    if unknown:
        where = "; --data names a folder of YAML tasks of your own"
        if command.include is not None:
            where = f" or in {command.include}"
        raise ValueError(f"lm-eval has no task {unknown[0]!r}{where}.")
    for model in command.models:
        load_config(ModelConfig(model=model), "model")
    with contextlib.nullcontext() if command.output is None else holding(command.output):
        for model in command.models:
            results = _evaluate(command, model, manager)
            if command.output is not None:
                write_entry(command.output, command.identity(model), {"results": results})
            yield model, results


def _is_of_interest(record: logging.LogRecord) -> bool:
    return "`pretrained` model kwarg" not in record.getMessage()


def _evaluate(command: HarnessCommand, model: str, manager: Any) -> Results:
    from lm_eval.evaluator import simple_evaluate  # type: ignore[reportMissingImports]

    given: dict[str, Any] = {"pretrained": model, "dtype": command.dtype}
    if find_adapter(ModelConfig(model=model), "model") is not None:
        # It would put the adapter on the base as a layer; merged is how every other command reads one.
        merged, tokenizer = load_on_device(model, command.dtype)
        given = {"pretrained": merged, "tokenizer": tokenizer}
        # It warns that it reads no other argument of a loaded model; it is given none.
        logging.getLogger("lm_eval.models.huggingface").addFilter(_is_of_interest)
    found: Any = cast("Any", simple_evaluate)(
        model="hf",
        model_args=given,
        tasks=list(command.tasks),
        num_fewshot=command.few_shot or None,
        batch_size=command.generation.get("batch_size", 32),
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=command.limit,
        apply_chat_template=command.generation.get("chat_template") == "always",
        system_instruction=command.generation.get("system_prompt"),
        gen_kwargs=command.sampling() or None,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {
        task: {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
