"""`hpd eval`: models on tasks, one after the other."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hpd.config.models import ModelConfig
from hpd.config.schema import EvalConfig
from hpd.evaluate.generate import PartialAnswers
from hpd.evaluate.run import EvalResult, evaluate_engine
from hpd.evaluate.task import Notice, Task
from hpd.evaluate.tasks import share_options
from hpd.generation.engine import Engine, TransformersEngine
from hpd.generation.settings import GenerationSettings
from hpd.generation.vllm_engine import VllmEngine, VllmOptions
from hpd.locks import holding
from hpd.methods.terms import nearest
from hpd.models.adapters import require_whole
from hpd.models.dtypes import dtype_name, loaded_dtype
from hpd.models.load import load_config, load_model, load_tokenizer
from hpd.progress import Progress
from hpd.teachers.fingerprints import quick_fingerprint

__all__ = [
    "ENGINES",
    "EvalCommand",
    "check_dtype",
    "eval_sections",
    "evaluate_models",
    "load_engine",
    "load_on_device",
    "names_of",
]

ENGINES = ("transformers", "vllm")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Models that answer tasks (`hpd eval`)."""

    models: tuple[str, ...]
    """Folders or Hub ids; the first is the one that the others are compared with."""
    tasks: Sequence[tuple[Task, GenerationSettings]]
    """As `task_and_settings` gives them."""
    engine: str = "transformers"
    """A name of `ENGINES`."""
    vllm: VllmOptions = VllmOptions()
    """Of the engine vllm only."""
    dtype: str = "auto"
    """Of the weights."""
    output: Path | None = None
    """Folder of evals.json, records and unfinished answers; None: each model's own where it is a run folder,
    else none."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"Unknown engine {self.engine!r}. {nearest(self.engine, list(ENGINES))}")
        check_dtype(self.dtype)
        if self.vllm != VllmOptions() and self.engine != "vllm":
            given = [
                field.name for field in fields(VllmOptions) if getattr(self.vllm, field.name) != field.default
            ]
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{names}: vLLM's, and the engine is {self.engine}. It needs --engine vllm.")
        if len(set(self.models)) < len(self.models):
            raise ValueError("a model is named twice.")

    def folder(self, model: str) -> Path | None:
        """Folder of a model's results; None: they are not written."""
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
        FileNotFoundError, ValueError: before any weight is loaded, where it can be known; another process
            writes to a folder of results.
    """
    with contextlib.ExitStack() as stack:
        folders = [folder for model in command.models if (folder := command.folder(model)) is not None]
        for folder in dict.fromkeys(folders):
            stack.enter_context(holding(folder))
        return _evaluate_models(command, progress or Progress(), done)


def _evaluate_models(
    command: EvalCommand, progress: Progress, done: Callable[[str, EvalResult], None] | None
) -> dict[str, dict[str, EvalResult]]:
    for model in command.models:
        load_config(ModelConfig(model=model), "model")
        if command.engine == "vllm":
            require_whole(model, "the engine vllm")
    names = names_of(command.models)
    said = set()
    for task, settings in command.tasks:
        if isinstance(task, Notice):
            notice = task.notice(settings.num_samples * len(command.models))
            head, _, details = notice.partition("\n")
            progress.say(head if not details or details in said else f"{head}\n{details}")
            said.add(details)
    results: dict[str, dict[str, EvalResult]] = {task.name: {} for task, _ in command.tasks}
    # Answers of a finished evaluation are kept until all are finished: the same command asks for all again.
    partials: list[PartialAnswers] = []
    for model in command.models:
        engine = load_engine(command, model)
        progress.say(f"{names[model]}: {engine.name} in {engine.dtype}")
        for task, settings in command.tasks:
            result = evaluate_engine(
                engine,
                task,
                settings,
                command.folder(model),
                name=model,
                progress=progress.bar(f"{task.name} answers of {names[model]}"),
                fingerprint=quick_fingerprint(model, command.dtype),
                partials=partials,
            )
            results[task.name][model] = result
            if done is not None:
                done(model, result)
        del engine  # one model's weights at a time
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for partial in partials:
        partial.remove()
    return results


def load_engine(command: EvalCommand, model: str) -> Engine:
    """The model, ready to answer."""
    if command.engine == "vllm":
        source = ModelConfig(model=model, dtype=command.dtype)  # type: ignore[arg-type]
        dtype = dtype_name(loaded_dtype(source, "model"))
        return VllmEngine(model, load_tokenizer(source, "model"), dtype=dtype, options=command.vllm)
    return TransformersEngine(*load_on_device(model, command.dtype))


def load_on_device(
    model: str, dtype: str, role: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on the accelerator, where there is one, and its tokenizer; `role` names it in messages."""
    source = ModelConfig(model=model, dtype=dtype)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(source, role)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(source, role).to(device), tokenizer


def check_dtype(dtype: str) -> None:
    """Raise ValueError for a type that weights cannot be loaded in."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {', '.join(_DTYPES)}, got {dtype!r}.")


def eval_sections(
    spec: str, data: Path | None, options: Sequence[str] = (), **shared: Any
) -> list[EvalConfig]:
    """The `eval` sections of a comma-separated list of ``name`` and ``name=file``.

    Args:
        spec: such as "gsm8k,math500=mine.jsonl".
        data: folder or file of those without one of their own; None: the Hub.
        options: as for `share_options`.
        shared: further fields of every section.

    Raises:
        ValueError: no task, one that is named twice, or an option that none has.
    """
    entries = [part.strip().partition("=") for part in spec.split(",") if part.strip()]
    if not entries:
        raise ValueError("no tasks: give names with commas between them, such as gsm8k,math500.")
    names = [name for name, _, _ in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"a task is named twice in {spec!r}.")
    shares = share_options(names, options)
    return [
        EvalConfig(task=name, data=path or str(data or ""), options=shares[name], **shared)
        for name, _, path in entries
    ]


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Short names of models: the last part of each path, or the whole where that is not unique."""
    short = [Path(model).name for model in models]
    return {
        model: name if short.count(name) == 1 else model for model, name in zip(models, short, strict=True)
    }
