"""Evaluation of a model on a task, and its trace in a run folder: evals.json and records-<task>.jsonl."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hpd.evaluate.generate import GREEDY, FinishReason, Generation, GenerationSettings, Progress, generate_answers
from hpd.evaluate.task import Example, Prompt, Task, Verdict

_Z_95 = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Record:
    """One example, what the model wrote and how it was graded."""

    id: str
    prompt: Prompt
    answer: str
    """The reference."""
    text: str
    """What the model wrote."""
    extracted: str | None
    correct: bool
    num_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """A model's result on a task."""

    task: str
    accuracy: float
    """Share of correct answers, 0 to 1."""
    interval: tuple[float, float]
    """95 % Wilson interval of the accuracy: the error from having drawn these examples and no others."""
    num_examples: int
    mean_tokens: float
    """Mean length of an answer, in tokens."""
    truncated: float
    """Share of answers cut at the length limit, 0 to 1: where it is large, accuracy measures the limit."""
    tokens_per_second: float
    """Tokens written per second of generation, all rows of a batch together."""
    records: tuple[Record, ...]


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: GenerationSettings = GREEDY,
    output_dir: str | Path | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Let a model answer a task's examples, grade the answers and, with `output_dir`, write both down.

    `evals.json` is a list with one entry per (model, task, options, settings): a repeated evaluation replaces its own
    entry, all others survive. `records-<task>.jsonl` holds the records of the same evaluations; its lines name their
    entry's id. Both are replaced atomically; two processes must not write to one folder at the same time.

    Args:
        model, tokenizer, settings, progress: as for `generate_answers`.
        task: examples and grader.
        output_dir: a run folder, made if missing; None writes nothing.
        name: the model's name in evals.json; None takes the path that it was loaded from.

    Raises:
        ValueError: the task has no examples, or evals.json is not a list of evaluations; see also `generate_answers`.
    """
    examples = task.examples()
    if not examples:
        raise ValueError(f"the task {task.name!r} has no examples; give data with at least one.")
    if output_dir is not None:
        _read_evals(Path(output_dir))  # an unreadable file should stop the run before its hours of generation
    start = time.perf_counter()
    generations = generate_answers(model, tokenizer, [example.prompt for example in examples], settings, progress)
    seconds = time.perf_counter() - start
    records = tuple(
        _record(example, generation, task.grade(example, generation.text))
        for example, generation in zip(examples, generations, strict=True)
    )
    num_correct, num_tokens = sum(record.correct for record in records), sum(record.num_tokens for record in records)
    result = EvalResult(
        task=task.name,
        accuracy=num_correct / len(records),
        interval=wilson_interval(num_correct, len(records)),
        num_examples=len(records),
        mean_tokens=num_tokens / len(records),
        truncated=sum(record.finish_reason == "length" for record in records) / len(records),
        tokens_per_second=num_tokens / seconds,
        records=records,
    )
    if output_dir is not None:
        model_name = name or getattr(model, "name_or_path", "") or type(model).__name__
        _write(Path(output_dir), model_name, task, settings, result)
    return result


def wilson_interval(num_correct: int, num_examples: int) -> tuple[float, float]:
    r"""95 % interval of a proportion k/n; unlike the normal one it stays inside [0, 1] and is not empty at 0 or 1.

    .. math:: \frac{k + z^2/2 \pm z \sqrt{k (n - k) / n + z^2 / 4}}{n + z^2}

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    centre = num_correct + _Z_95**2 / 2
    margin = _Z_95 * math.sqrt(num_correct * (num_examples - num_correct) / num_examples + _Z_95**2 / 4)
    low, high = ((centre + side) / (num_examples + _Z_95**2) for side in (-margin, margin))
    return max(0.0, low), min(1.0, high)


def _record(example: Example, generation: Generation, verdict: Verdict) -> Record:
    return Record(
        id=example.id,
        prompt=example.prompt,
        answer=example.answer,
        text=generation.text,
        extracted=verdict.extracted,
        correct=verdict.correct,
        num_tokens=generation.num_tokens,
        finish_reason=generation.finish_reason,
    )


def _write(folder: Path, model: str, task: Task, settings: GenerationSettings, result: EvalResult) -> None:
    identity = {"model": model, "task": task.name, "options": dict(task.options), "settings": asdict(settings)}
    eval_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    figures = {key: value for key, value in vars(result).items() if key not in ("task", "records")}
    folder.mkdir(parents=True, exist_ok=True)

    records_path = folder / f"records-{task.name}.jsonl"
    lines = [json.dumps({"eval": eval_id, **asdict(record)}, ensure_ascii=False) for record in result.records]
    _replace(records_path, "".join(line + "\n" for line in [*_other_records(records_path, eval_id), *lines]))

    others = [entry for entry in _read_evals(folder) if entry.get("id") != eval_id]
    entry = {"id": eval_id, **identity, **figures, "records": records_path.name}
    _replace(folder / "evals.json", json.dumps([*others, entry], indent=2, ensure_ascii=False) + "\n")


def _read_evals(folder: Path) -> list[dict[str, Any]]:
    path = folder / "evals.json"
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); repair it, or move it away to start a new one.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is not a list of evaluations; move it away to start a new one.")
    return entries


def _other_records(path: Path, eval_id: str) -> Sequence[str]:
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [line for line in lines if line and json.loads(line).get("eval") != eval_id]


def _replace(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
