"""Evaluation of a model on a task, and its trace in a run folder: evals.json and records-<task>.jsonl."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from hpd.evaluate.generate import Generated, PartialAnswers, answer_examples
from hpd.evaluate.statistics import (
    Floats,
    majority,
    mean_interval,
    mean_over_problems,
    pass_at_k,
    sampling_interval,
)
from hpd.evaluate.task import CannotGrade, Comparable, Example, Summary, Task, Verdict
from hpd.files import JsonLines, digest_json, write_json
from hpd.generation.engine import Engine, TransformersEngine
from hpd.generation.settings import GREEDY, GenerationSettings
from hpd.generation.texts import Answer, FinishReason, Prompt
from hpd.locks import holding
from hpd.progress import Advance

__all__ = [
    "EvalResult",
    "Record",
    "eval_id",
    "evaluate",
    "evaluate_engine",
    "grade_answers",
    "identify",
    "write_entry",
    "write_result",
]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer and how it was graded."""

    id: str
    """The example's."""
    sample: int
    """Number of the answer to it, from 0."""
    prompt: Prompt
    answer: str
    """The reference."""
    text: str
    """The model's answer; of a conversation: the last reply."""
    turns: tuple[str, ...]
    """Every reply of a conversation, else empty."""
    extracted: str | None
    correct: bool | None
    score: float | None
    """The number that is averaged; None: ungraded."""
    detail: str
    num_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """A model's result on a task."""

    task: str
    metric: str
    """Name of `value`: accuracy, rouge_l, ..."""
    value: float
    """Mean over problems of the mean over their graded samples."""
    interval: tuple[float, float]
    """95 % interval of `value`: the error from having drawn these problems and no others
    (`mean_interval`). NaN, in evals.json null: one problem, and scores that are not in [0, 1]."""
    num_examples: int
    num_samples: int
    """Answers per problem."""
    num_ungraded: int
    """Answers without a verdict; they count nowhere else."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """pass@k, maj@n, the spread over samples, and what the task itself sums up."""
    mean_tokens: float
    """Mean length of an answer, in tokens."""
    truncated: float
    """Share of answers cut at the length limit, 0 to 1: where it is large, the metric measures the limit."""
    tokens_per_second: float
    """Tokens written per second of generation, all rows of a batch together."""
    dtype: str | None = None
    """Of the weights that answered; None: not known."""
    records: tuple[Record, ...]

    def scores(self) -> Floats:
        """`Record.score` as [problems, samples], NaN where ungraded."""
        values = [np.nan if record.score is None else record.score for record in self.records]
        return np.array(values, dtype=np.float64).reshape(self.num_examples, self.num_samples)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: GenerationSettings = GREEDY,
    output_dir: str | Path | None = None,
    name: str | None = None,
    progress: Advance | None = None,
) -> EvalResult:
    """Let a model answer a task's examples, grade the answers and, with `output_dir`, write both down.

    `evals.json` is a list with one entry per (model, task, options, settings, engine): a repeated evaluation
    replaces its own entry, all others survive. `records-<task>.jsonl` holds the records of the same
    evaluations; its lines name their entry's id. Both are replaced atomically.

    Args:
        model, tokenizer, settings, progress: as for `generate_answers`. `settings` are taken as they are: the
            task's own defaults are merged in by `settings_for`.
        task: examples and grader.
        output_dir: a run folder, made if missing; None writes nothing.
        name: the model's name in evals.json; None takes the path that it was loaded from.

    Raises:
        ValueError: the task has no examples, evals.json is not a list of evaluations, or another process is
            writing there; see also `generate_answers`.
    """
    path = str(getattr(model, "name_or_path", ""))
    engine = TransformersEngine(model, tokenizer)
    return evaluate_engine(
        engine, task, settings, output_dir, name=name or path or type(model).__name__, progress=progress
    )


def evaluate_engine(
    engine: Engine,
    task: Task,
    settings: GenerationSettings,
    output_dir: str | Path | None = None,
    *,
    name: str,
    progress: Advance | None = None,
    fingerprint: str | None = None,
    partials: list[PartialAnswers] | None = None,
) -> EvalResult:
    """`evaluate` with an engine of your choice.

    Args:
        fingerprint: what tells the model's weights from others of the same name. With it, finished batches
            are kept in `partial-<id>.jsonl` under `output_dir` until the evaluation is complete, and an
            interrupted one goes on.
        partials: gets that file of a complete evaluation, which the caller removes when all that it does is
            complete; None: it is removed at once.
    """
    examples = task.examples()
    if not examples:
        raise ValueError(f"the task {task.name!r} has no examples; give data with at least one.")
    folder = None if output_dir is None else Path(output_dir)
    identity = identify(name, task, settings, engine.name)
    with contextlib.nullcontext() if folder is None else holding(folder):
        partial = _partial(folder, identity, examples, fingerprint)
        generated = answer_examples(engine, examples, settings, progress, partial)
        result = grade_answers(task, examples, generated, settings.num_samples, engine.dtype)
        if folder is not None:
            write_result(folder, identity, result)
        if partial is not None:
            partial.remove() if partials is None else partials.append(partial)
        return result


def _partial(
    folder: Path | None, identity: dict[str, Any], examples: Sequence[Example], fingerprint: str | None
) -> PartialAnswers | None:
    if folder is None:
        return None
    _read_evals(folder)  # an unreadable file should stop the run before its hours of generation
    if fingerprint is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    prompts = digest_json([(example.prompt, example.follow_ups) for example in examples])[:12]
    return PartialAnswers(
        folder, eval_id(identity), {**identity, "fingerprint": fingerprint, "prompts": prompts}
    )


def identify(name: str, task: Task, settings: GenerationSettings, engine: str) -> dict[str, Any]:
    """Describe an evaluation by JSON values; it is the same as another of equal values."""
    return {
        "model": name,
        "task": task.name,
        "options": dict(task.options),
        "settings": asdict(settings),
        "engine": engine,
    }


def grade_answers(
    task: Task,
    examples: Sequence[Example],
    generated: Generated,
    num_samples: int,
    dtype: str | None = None,
) -> EvalResult:
    """The result that the answers of a model in `dtype` amount to."""
    answers = generated.answers
    repeated = [example for example in examples for _ in range(num_samples)]
    verdicts = _graded(task, repeated, answers)
    assert len(verdicts) == len(answers), (
        f"{task.name} gave {len(verdicts)} verdicts on {len(answers)} answers"
    )
    values = np.array([np.nan if v.value is None else v.value for v in verdicts], dtype=np.float64)
    values = values.reshape(len(examples), num_samples)
    if np.isnan(values).all():
        raise ValueError(
            f"no answer of {task.name!r} could be graded; the first: "
            f"{verdicts[0].detail or 'no reason given'}"
        )
    num_tokens = sum(answer.num_tokens for answer in answers)
    figures = _figures(task, verdicts, values)
    if isinstance(task, Summary):
        figures |= task.summary(repeated, answers, verdicts)
    return EvalResult(
        task=task.name,
        metric=task.metric,
        value=float(mean_over_problems(values).mean()),
        interval=mean_interval(values),
        num_examples=len(examples),
        num_samples=num_samples,
        num_ungraded=int(np.isnan(values).sum()),
        figures=figures,
        mean_tokens=num_tokens / len(answers),
        truncated=sum(answer.finish_reason == "length" for answer in answers) / len(answers),
        tokens_per_second=num_tokens / generated.seconds if generated.seconds else 0.0,
        dtype=dtype,
        records=tuple(
            _record(index % num_samples, *parts)
            for index, parts in enumerate(zip(repeated, answers, verdicts, strict=True))
        ),
    )


def _graded(task: Task, examples: Sequence[Example], answers: Sequence[Answer]) -> Sequence[Verdict]:
    """Verdicts of all answers; where the grader crashes on one of them, that one is wrong and says why.

    What is wrong with the whole task or the machine, and a crash on all of several answers, stops it.
    """
    try:
        return task.grade(examples, answers)
    except (CannotGrade, OSError):
        raise
    except Exception:
        verdicts, crashes = _graded_singly(task, examples, answers)
        if crashes == len(answers) > 1:
            raise
        return verdicts


def _graded_singly(
    task: Task, examples: Sequence[Example], answers: Sequence[Answer]
) -> tuple[list[Verdict], int]:
    """Verdicts of a grader that is asked for one answer at a time, and how often it crashed."""
    verdicts: list[Verdict] = []
    crashes = 0
    for example, answer in zip(examples, answers, strict=True):
        try:
            verdicts += task.grade([example], [answer])
        except (CannotGrade, OSError):
            raise
        except Exception as error:
            crashes += 1
            detail = f"the grader failed: {type(error).__name__}: {error}"[:500]
            verdicts.append(Verdict(correct=False, detail=detail))
    return verdicts, crashes


def _figures(task: Task, verdicts: Sequence[Verdict], values: Floats) -> dict[str, Any]:
    """Figures of several samples per problem beyond their mean."""
    num_problems, num_samples = values.shape
    if num_samples == 1:
        return {}
    figures: dict[str, Any] = {f"avg@{num_samples}": float(mean_over_problems(values).mean())}
    if not np.isnan(values).any():
        per_sample = values.mean(axis=0)  # each is the result of one run
        figures |= {
            "sampling_interval": sampling_interval(values),
            "std_over_samples": float(per_sample.std(ddof=1)),
        }
    correct = [verdict.correct for verdict in verdicts]
    if any(verdict is None for verdict in correct):
        return figures
    counts = np.array(correct, dtype=bool).reshape(num_problems, num_samples).sum(axis=1)
    for k in [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples] + [
        num_samples
    ]:
        figures[f"pass@{k}"] = float(np.mean([pass_at_k(num_samples, int(count), k) for count in counts]))
    if isinstance(task, Comparable):
        rows = [slice(start, start + num_samples) for start in range(0, len(verdicts), num_samples)]
        votes = [majority([v.extracted for v in verdicts[row]], correct[row], task.same) for row in rows]
        figures[f"maj@{num_samples}"] = float(np.mean(votes))
    return figures


def _record(sample: int, example: Example, answer: Answer, verdict: Verdict) -> Record:
    return Record(
        id=example.id,
        sample=sample,
        prompt=example.prompt,
        answer=example.answer,
        text=answer.text,
        turns=answer.turns,
        extracted=verdict.extracted,
        correct=verdict.correct,
        score=verdict.value,
        detail=verdict.detail,
        num_tokens=answer.num_tokens,
        finish_reason=answer.finish_reason,
    )


def eval_id(identity: Mapping[str, Any]) -> str:
    """The id of an evaluation in evals.json, from what `identify` says of it."""
    return digest_json(identity)[:12]


def write_result(folder: Path, identity: dict[str, Any], result: EvalResult) -> None:
    """Put a result into evals.json, and its records beside it, in place of an earlier one of the same
    identity."""
    own_id = eval_id(identity)
    figures = {key: value for key, value in vars(result).items() if key not in ("task", "value", "records")}
    figures["interval"] = None if math.isnan(result.interval[0]) else result.interval
    folder.mkdir(parents=True, exist_ok=True)

    records = JsonLines(folder / f"records-{result.task}.jsonl")
    earlier = (record for record in records.read() if isinstance(record, dict))
    others = [record for record in earlier if record.get("eval") != own_id]
    records.write([*others, *({"eval": own_id, **asdict(record)} for record in result.records)])

    write_entry(folder, identity, {result.metric: result.value, **figures, "records": records.path.name})


def write_entry(folder: Path, identity: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Put an evaluation into evals.json, in place of an earlier one of the same identity."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"id": eval_id(identity), **identity, **figures}
    others = [other for other in _read_evals(folder) if other.get("id") != entry["id"]]
    write_json(folder / "evals.json", [*others, entry])


def _read_evals(folder: Path) -> list[dict[str, Any]]:
    path = folder / "evals.json"
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); repair it, or move it away to start a new one."
        ) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is not a list of evaluations; move it away to start a new one.")
    return entries
