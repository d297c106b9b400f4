"""Tasks as a command line or a recipe names them: data, options, few-shot examples, subset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hpd.evaluate.few_shot import FewShot
from hpd.evaluate.subset import Subset
from hpd.evaluate.task import Task
from hpd.evaluate.tasks import check_options, find_data, load_factory, make_task, task_options

__all__ = ["JudgeProgress", "build_task", "build_tasks", "share_options"]

JudgeProgress = Callable[[str], Callable[[int, int], None]]
"""Gives, for the name of a task, what is called with (verdicts so far, verdicts)."""

_JUDGE = "judge."


def build_task(
    name: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    limit_seed: int | None = None,
    few_shot: int = 0,
    few_shot_data: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    judge_progress: JudgeProgress | None = None,
) -> Task:
    """A task with everything that can be put around it.

    Args:
        name, data, limit: as for `make_task`.
        limit_seed: draw the `limit` problems with this seed; None takes the first.
        few_shot: worked examples per prompt; 0 is none.
        few_shot_data: their file or folder; None: the training file of the benchmark, in the folder `data` or on the Hub.
        options: of the task; `judge.NAME` is a field of `JudgeSettings`.
        judge_progress: shows a judge's progress.

    Raises:
        FileNotFoundError, ValueError: as `make_task`; options without effect.
    """
    if limit_seed is not None and limit is None:
        raise ValueError("limit_seed has no effect without limit: give the number of problems to draw.")
    if few_shot_data is not None and few_shot < 1:
        raise ValueError("few_shot_data has no effect without few_shot: give the number of worked examples.")
    given = dict(options or {})
    judge = {key.removeprefix(_JUDGE): given.pop(key) for key in list(given) if key.startswith(_JUDGE)}
    check_options(name, given)
    if "judge" in task_options(name):
        given["judge"] = _judge(name, judge, judge_progress)
    elif judge:
        raise ValueError(f"the task {name!r} has no judge: leave out {', '.join(_JUDGE + key for key in judge)}.")
    task = make_task(name, data, limit=limit if limit_seed is None else None, **given)
    if limit is not None and limit_seed is not None:
        task = Subset(task, limit, limit_seed)
    if few_shot < 0:
        raise ValueError(f"few_shot must be 0 (none) or more, got {few_shot}.")
    if few_shot:
        folder = data if data is None or Path(data).is_dir() else None
        source = find_data(name, few_shot_data if few_shot_data is not None else folder, shots=True)
        task = FewShot(task, load_factory(name)(source), few_shot)
    return task


def _judge(name: str, fields: Mapping[str, Any], progress: JudgeProgress | None) -> Any:
    from hpd.evaluate.judge_client import Judge, JudgeSettings

    known = inspect.signature(JudgeSettings).parameters
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise ValueError(f"a judge has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    if not {"url", "model"} <= fields.keys():
        raise ValueError(f"the task {name!r} needs a judge: give its address and name (--judge-url, --judge-model).")
    cache = fields.get("cache")
    return Judge(JudgeSettings(**{**fields, "cache": Path(cache) if cache is not None else None}), progress)


def build_tasks(spec: str, data: Path | None, options: Sequence[str] = (), **shared: Any) -> list[Task]:
    """The tasks of a comma-separated list of ``name`` and ``name=file``.

    Args:
        spec: such as "gsm8k,math500=mine.jsonl".
        data: folder or file of those without one of their own.
        options: ``name=value`` for every task that has this option, or ``task.name=value`` for one.
        shared: as for `build_task`.
    """
    entries = [part.strip().partition("=") for part in spec.split(",") if part.strip()]
    if not entries:
        raise ValueError("no tasks: give names with commas between them, such as gsm8k,math500.")
    names = [name for name, _, _ in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"a task is named twice in {spec!r}.")
    shares = share_options(names, options)
    return [build_task(name, path or data, options=shares[name], **shared) for name, _, path in entries]


def share_options(names: Sequence[str], options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each task's options; one that no task has is an error."""
    shares: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in options:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ValueError(f"an option is written name=value or task.name=value, got {text!r}.")
        owner = next((name for name in names if key.startswith(f"{name}.")), None)
        option = key.removeprefix(f"{owner}.") if owner else key
        wanted = "judge" if option.startswith(_JUDGE) else option
        takers = [owner] if owner else [name for name in names if wanted in task_options(name)]
        if not takers:
            known = "; ".join(f"{name}: {', '.join(task_options(name)) or 'none'}" for name in names)
            raise ValueError(f"no task has an option {option!r}. They have: {known}.")
        for name in takers:
            shares[name][option] = yaml.safe_load(value)
    return shares
