"""`hpd eval`: models on tasks, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hpd.config.models import ModelConfig
from hpd.evaluate.run import EvalResult, evaluate_engine
from hpd.evaluate.task import Notice, Task
from hpd.evaluate.tasks import settings_for
from hpd.generation.engine import Engine, TransformersEngine
from hpd.generation.settings import GenerationSettings
from hpd.methods.terms import nearest
from hpd.models.load import load_config, load_model, load_tokenizer
from hpd.progress import Progress
from hpd.teachers.fingerprints import quick_fingerprint

__all__ = ["ENGINES", "EvalCommand", "evaluate_models", "load_engine", "names_of"]

ENGINES = ("transformers", "vllm")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """What `hpd eval` is asked for."""

    models: tuple[str, ...]
    """Folders or Hub ids; the first is the one that the others are compared with."""
    tasks: Sequence[Task]
    preset: str | None = None
    """A name of `PRESETS`."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `GenerationSettings` that go before preset and task."""
    engine: str = "transformers"
    """A name of `ENGINES`."""
    tensor_parallel: int = 1
    """vLLM only: GPUs that share a model."""
    dtype: str = "auto"
    """Of the weights."""
    output: Path | None = None
    """Folder of evals.json, records and unfinished answers; None: each model's own where it is a run folder,
    else none."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"Unknown engine {self.engine!r}. {nearest(self.engine, list(ENGINES))}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be {', '.join(_DTYPES)}, got {self.dtype!r}.")
        if self.tensor_parallel != 1 and self.engine != "vllm":
            raise ValueError("tensor_parallel is vLLM's: it needs --engine vllm.")
        if len(set(self.models)) < len(self.models):
            raise ValueError("a model is named twice.")

    def settings(self, task: Task) -> GenerationSettings:
        return settings_for(task, self.preset, **self.generation)

    def folder(self, model: str) -> Path | None:
        """Where a model's results go."""
        if self.output is not None:
            return self.output
        return Path(model) if (Path(model) / "recipe.yaml").is_file() else None


def evaluate_models(
    command: EvalCommand,
    progress: Progress | None = None,
    done: Callable[[str, EvalResult], None] | None = None,
) -> dict[str, dict[str, EvalResult]]:
    """Results by task and model, in the order in which they are named.

    Args:
        progress: what is shown on the way.
        done: called with each result as soon as it is there.

    Raises:
        FileNotFoundError, ValueError: before any weight is loaded, where it can be known.
    """
    progress = progress or Progress()
    settings = {task.name: command.settings(task) for task in command.tasks}
    for model in command.models:
        load_config(ModelConfig(model=model), "model")
    names = names_of(command.models)
    said = set()
    for task in command.tasks:
        if isinstance(task, Notice):
            head, _, details = task.notice(settings[task.name].num_samples * len(command.models)).partition(
                "\n"
            )
            progress.say(head if not details or details in said else f"{head}\n{details}")
            said.add(details)
    results: dict[str, dict[str, EvalResult]] = {task.name: {} for task in command.tasks}
    for model in command.models:
        engine = load_engine(command, model)
        for task in command.tasks:
            result = evaluate_engine(
                engine,
                task,
                settings[task.name],
                command.folder(model),
                name=model,
                progress=progress.bar(f"{task.name} answers of {names[model]}"),
                fingerprint=quick_fingerprint(model, command.dtype),
            )
            results[task.name][model] = result
            if done is not None:
                done(model, result)
        del engine  # one model's weights at a time
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def load_engine(command: EvalCommand, model: str) -> Engine:
    """The model, ready to answer."""
    source = ModelConfig(model=model, dtype=command.dtype)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(source, "model")
    if command.engine == "vllm":
        from hpd.generation.vllm_engine import VllmEngine

        return VllmEngine(model, tokenizer, dtype=command.dtype, tensor_parallel_size=command.tensor_parallel)
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersEngine(load_model(source, "model").to(device), tokenizer)  # type: ignore[arg-type]


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Short names of models: the last part of each path, or the whole where that is not unique."""
    short = [Path(model).name for model in models]
    return {
        model: name if short.count(name) == 1 else model for model, name in zip(models, short, strict=True)
    }
