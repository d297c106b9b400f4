"""Run folders as they are read for a report: through their files only, finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hpd.experiments.experiment import SEED_PATH, Experiment, axis_values, read_experiment
from hpd.experiments.grid import group_key, short
from hpd.experiments.manifest import (
    EXPERIMENT,
    MANIFEST,
    OWN_LOGS,
    RECORD,
    TEACHER_FIGURES,
    differing_paths,
    flatten,
    require_equal_environments,
)
from hpd.experiments.metrics import Scale, scale_of
from hpd.experiments.run_files import RunFiles
from hpd.experiments.tuning import Choice, read_choices

__all__ = ["Results", "Run", "read_results"]

_AFTER = " after"
_TEACHER_NAMES = ("teacher",)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of one run folder."""

    folder: Path
    axes: dict[str, str]
    """Axis -> label, the seed left out."""
    group: str
    """The variant's name: its labels."""
    seed: int
    recipe: dict[str, Any]
    figures: dict[str, float]
    """Metric -> value of the trained student; empty while the run goes on."""
    logs: list[dict[str, Any]]
    records: dict[str, dict[str, float]]
    """Metric -> example -> grade."""
    answers: dict[str, dict[str, dict[str, Any]]]
    """Metric -> example -> its record."""
    environment: dict[str, Any]
    cost: dict[str, float]
    teacher: dict[str, float]
    """Metric -> the teacher's value."""

    @property
    def finished(self) -> bool:
        return bool(self.figures)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a report is made of."""

    title: str
    runs: list[Run]
    axes: tuple[str, ...]
    question: str = ""
    experiment: Experiment | None = None
    choices: list[Choice] = field(default_factory=list)
    teacher: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    damages: tuple[str, ...] = ()
    """A sentence for each part of a file that could not be read and was left out."""

    @property
    def groups(self) -> dict[str, list[Run]]:
        """Variant -> its finished runs, in the order of the grid."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.finished:
                found.setdefault(run.group, []).append(run)
        return found

    def values(self, group: str, metric: str) -> dict[int, float]:
        """Seed -> value."""
        return {run.seed: run.figures[metric] for run in self.groups.get(group, []) if metric in run.figures}

    def records(self, group: str, metric: str) -> dict[int, dict[str, float]]:
        """Seed -> example -> grade."""
        return {run.seed: run.records[metric] for run in self.groups.get(group, []) if metric in run.records}

    def method_and_setting(self, group: str) -> tuple[str, str]:
        """A group's method, and its labels on all other axes; without a method axis the group is both in
        one."""
        axes = next((run.axes for run in self.runs if run.group == group), {})
        named = [axis for axis in axes if axis in ("variant", "method")]
        if not named:
            return group, ""
        return group_key(axes, named), ", ".join(
            f"{short(axis)}={value}" for axis, value in axes.items() if axis not in named
        )

    def scale(self, metric: str) -> Scale:
        """How the metric is written; means of grades from 0 to 1 are in percent, whatever their name."""
        return scale_of(metric, metric in self._graded)

    @cached_property
    def _graded(self) -> set[str]:
        inside: dict[str, bool] = {}
        for run in self.runs:
            for metric, grades in run.records.items():
                fits = all(0 <= value <= 1 for value in (*grades.values(), run.figures[metric]))
                inside[metric] = inside.get(metric, True) and fits
        return {metric for metric, fits in inside.items() if fits}


def read_results(paths: Sequence[Path], allow: Sequence[str] = ()) -> Results:
    """Read one experiment folder, or any number of run folders.

    Raises:
        FileNotFoundError: a folder that is neither.
        ValueError: experiments mixed with other folders, runs made by different software (unless allowed), or
            a file that is not JSON at all; what is damaged in part is in `Results.damages`.
    """
    for path in paths:
        if not (path / MANIFEST).is_file() and not (path / "recipe.yaml").is_file():
            raise FileNotFoundError(
                f"{path} is neither a run folder (recipe.yaml) nor an experiment ({MANIFEST})."
            )
    experiments = [path for path in paths if (path / MANIFEST).is_file()]
    if experiments and len(paths) > 1:
        raise ValueError("Give one experiment, or run folders: two grids have no common axes.")
    files = RunFiles()
    results = (
        _read_experiment(experiments[0], allow, files) if experiments else _read_runs(paths, allow, files)
    )
    environments = [run.environment for run in results.runs if run.environment]
    if environments:
        require_equal_environments(environments, allow)
    return results


def _read_experiment(folder: Path, allow: Sequence[str], files: RunFiles) -> Results:
    manifest = _whole(folder / MANIFEST, json.loads)
    experiment = read_experiment((folder / EXPERIMENT).read_text(encoding="utf-8"), manifest["overrides"])
    axes = tuple(
        a
        for a in (["variant"] * bool(experiment.variants) + list(experiment.axes))
        if a not in ("seed", SEED_PATH)
    )
    order = _label_order(experiment)
    cells = manifest["cells"]
    folders = [
        path
        for path in sorted((folder / "runs").glob("*"))
        if path.name in cells and (path / "recipe.yaml").is_file()
    ]
    runs = [_read_run(path, {axis: cells[path.name][axis] for axis in axes}, axes, files) for path in folders]
    runs.sort(key=lambda run: ([order[axis].get(label, 0) for axis, label in run.axes.items()], run.seed))
    teacher = _numbers(files.object(folder / "teacher" / TEACHER_FIGURES))
    return Results(
        title=experiment.name,
        question=experiment.question,
        runs=runs,
        axes=axes,
        experiment=experiment,
        choices=read_choices(folder) or [],
        teacher={**_shared_teacher(runs), **teacher},
        manifest=manifest,
        allowed=tuple(allow),
        damages=tuple(files.damages),
    )


def _label_order(experiment: Experiment) -> dict[str, dict[str, int]]:
    """Axis -> label -> its place in the file."""
    axes = {
        "variant": dict(experiment.variants),
        **{axis: axis_values(values) for axis, values in experiment.axes.items()},
    }
    return {axis: {label: place for place, label in enumerate(values)} for axis, values in axes.items()}


def _read_runs(paths: Sequence[Path], allow: Sequence[str], files: RunFiles) -> Results:
    recipes = [_whole(path / "recipe.yaml", yaml.safe_load) for path in paths]
    axes = [path for path in differing_paths(recipes) if path != SEED_PATH]
    flat = [flatten(recipe) for recipe in recipes]
    runs = [
        _read_run(path, {axis: str(tree.get(axis, "default")) for axis in axes}, tuple(axes), files)
        for path, tree in zip(paths, flat, strict=True)
    ]
    if not axes and len({run.seed for run in runs}) < len(runs):
        raise ValueError("Two of the runs have the same recipe and seed: give each once.")
    title = paths[0].name if len(paths) == 1 else f"{len(paths)} runs"
    return Results(
        title=title,
        runs=runs,
        axes=tuple(axes),
        teacher=_shared_teacher(runs),
        allowed=tuple(allow),
        damages=tuple(files.damages),
    )


def _shared_teacher(runs: Iterable[Run]) -> dict[str, float]:
    return next((run.teacher for run in runs if run.teacher), {})


def _read_run(folder: Path, axes: dict[str, str], order: tuple[str, ...], files: RunFiles) -> Run:
    recipe = _whole(folder / "recipe.yaml", yaml.safe_load)
    record = files.object(folder / RECORD)
    summary = files.object(folder / "summary.json")
    figures = {
        key.removesuffix(_AFTER): value
        for key, value in summary.items()
        if key.endswith(_AFTER) and _is_number(value)
    }
    if _is_number(summary.get("student after accuracy")):
        figures["accuracy"] = summary["student after accuracy"]
    answers = _answers(folder, files)
    figures |= _numbers(record.get("figures"))
    if summary and not figures:
        seconds = summary.get("train seconds")
        figures["train_seconds"] = float(seconds) if isinstance(seconds, (int, float)) else math.nan
    grades = {
        name: {k: g for k, r in found.items() if (g := _grade(r)) is not None}
        for name, found in answers.items()
    }
    return Run(
        folder=folder,
        axes=axes,
        group=group_key(axes, order) if order else recipe.get("method") or folder.name,
        seed=int(recipe.get("train", {}).get("seed", 42)),
        recipe=recipe,
        figures=figures,
        logs=files.logs(folder / "metrics.jsonl") + files.logs(folder / OWN_LOGS),
        records={name: found for name, found in grades.items() if found and name in figures},
        answers=answers,
        environment=files.object(folder / "environment.json"),
        cost=_numbers(record.get("cost")) or _numbers(files.object(folder / "cost.json")),
        teacher=_numbers({"accuracy": summary.get("teacher accuracy")}),
    )


def _answers(folder: Path, files: RunFiles) -> dict[str, dict[str, dict[str, Any]]]:
    """Metric -> example -> record, of the student after training; the teacher's under "teacher"."""
    metrics = {}
    for entry in files.entries(folder / "evals.json"):
        model = str(entry.get("model", ""))
        name = "accuracy" if model == "student after" else model.removeprefix("student after: ")
        if model.startswith("student after") or model in _TEACHER_NAMES:
            metrics[entry["id"]] = (name, str(entry.get("records") or ""))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    # A name that leads out of the folder is nobody's records.
    for file in {Path(file).name for _, file in metrics.values() if file}:
        for record in files.lines(folder / file):
            if (evaluation := str(record.get("eval"))) in metrics:
                sample = record.get("sample", 0)
                identity = f"{record.get('id')}#{sample}" if sample else str(record.get("id"))
                found.setdefault(metrics[evaluation][0], {})[identity] = record
    return found


def _grade(record: Mapping[str, Any]) -> float | None:
    value = record.get("score", record.get("correct"))
    return float(value) if isinstance(value, (bool, int, float)) else None


def _whole(path: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """A file without which there is nothing to report."""
    try:
        content = read(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read: {said}. Repair it, or leave the folder out.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys and values. Repair it, or leave the folder out.")
    return content


def _numbers(values: Any) -> dict[str, float]:
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {key: value for key, value in pairs if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
