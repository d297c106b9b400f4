"""Curves over training: a loss on its own axis, KLs on validation rows, entropies next to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hpd.experiments.figures import Look, Panel, looks_of
from hpd.experiments.lines import Level, Line, line_panel, multiples_panel
from hpd.experiments.metrics import over
from hpd.experiments.plots import compared_panel, level_of
from hpd.experiments.results import Results, Run

__all__ = ["NO_VALIDATION", "curve_panels", "validation_is_missing"]

OWN_METRICS = ("own_entropy", "own_forward_kl", "own_reverse_kl")
KL_METRICS = ("forward_kl", "reverse_kl")
BRANCHES = {
    "k1_positive": "student underestimates the label",
    "reinforced": "label reinforced",
    "label_penalized": "label penalized",
    "sample_penalized": "sample penalized",
}
NO_VALIDATION = (
    "KL over training is drawn on validation rows, and these runs measured it once at most: batches "
    "of different methods are different text. Give the recipe train.eval_strategy: steps and "
    "train.eval_steps."
)
Logs = Sequence[Sequence[Mapping[str, Any]]]
"""The log lines of every seed of a method."""


def curve_panels(results: Results, looks: Mapping[str, Look]) -> list[Panel]:
    """Means over seeds of what was logged, a band from the lowest to the highest seed."""
    logs: dict[str, Logs] = {}
    for run in results.runs:
        if run.logs:
            logs[run.group] = [*logs.get(run.group, []), run.logs]
    panels = _losses(results, logs, looks)
    for one in _sets(results):
        for metric in (*KL_METRICS, "student_entropy"):
            panels += _validation_panels(results, one, metric, logs, looks)
    norms = _lines(logs, _on_batches("grad_norm"))
    panels += _panel(results, "grad_norm", "gradient norm over training", norms, looks, logs)
    for metric in OWN_METRICS:
        level = _teacher_entropy(results, "validation rows") if metric == "own_entropy" else None
        lines = _lines(logs, lambda log, name=metric: log.get(name))
        panels += _panel(results, metric, over(metric, "training"), lines, looks, logs, level)
    return panels + _branches(logs)


def _sets(results: Results) -> list[str]:
    """What stands before the metrics of each set of validation rows; "" where there is one."""
    found = [run.recipe.get("data", {}).get("validation") for run in results.runs]
    named = dict.fromkeys(f"{name}_" for sets in found if isinstance(sets, Mapping) for name in sets)
    return [*named] if named and all(isinstance(sets, Mapping) for sets in found) else ["", *named]


def _validation_panels(
    results: Results, one: str, metric: str, logs: Mapping[str, Logs], looks: Mapping[str, Look]
) -> list[Panel]:
    """A figure over training on a set of validation rows; the entropy on training batches, if only there."""
    name, where = f"{one}{metric}", "validation rows"
    lines = _lines(logs, _on_validation(name))
    if not lines and name == "student_entropy":
        lines, where = _lines(logs, _on_batches(metric)), "training batches"
    level = _teacher_entropy(results, where, one) if metric == "student_entropy" else None
    return _panel(results, name, over(name, f"training ({where})"), lines, looks, logs, level)


def validation_is_missing(results: Results) -> bool:
    """True if runs logged their training and KLs on validation rows at one step at most."""
    trained = any("forward_kl" in log for run in results.runs for log in run.logs)
    readers = [_on_validation(f"{one}forward_kl") for one in _sets(results)]
    steps = (sum(read(log) is not None for log in run.logs) for run in results.runs for read in readers)
    return trained and max(steps, default=0) < 2


def _on_validation(metric: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda log: log.get(f"eval_{metric}", log.get(f"validation_{metric}"))


def _on_batches(metric: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda log: log.get(metric) if "loss" in log else None


def _panel(
    results: Results,
    metric: str,
    title: str,
    lines: Mapping[str, Line],
    looks: Mapping[str, Look],
    logs: Mapping[str, Logs],
    level: Level | None = None,
) -> list[Panel]:
    # One point, such as that of an evaluation at the end, is no curve.
    if all(len(line) < 2 for line in lines.values()):
        return []
    note = _note(logs, lines)
    if level is not None and metric in OWN_METRICS:
        note += " The teacher's entropy is that on the validation rows."
    is_log = metric != "grad_norm"
    key = f"curve-{metric}"
    return [compared_panel(results, key, title, lines, looks, log=is_log, level=level, note=note)]


def _note(logs: Mapping[str, Logs], names: Iterable[str]) -> str:
    counts = [len(logs[name]) for name in names]
    fewest, most = min(counts), max(counts)
    seeds = f"{most} seed{'s' * (most != 1)}" if fewest == most else f"{fewest} to {most} seeds"
    return f"Mean of {seeds}; band: lowest to highest seed."


def _lines(logs: Mapping[str, Logs], read: Callable[[Mapping[str, Any]], float | None]) -> dict[str, Line]:
    return {group: line for group, runs in logs.items() if (line := _mean_line(runs, read))}


def _mean_line(logs: Logs, read: Callable[[Mapping[str, Any]], float | None]) -> Line:
    """(step, mean, low, high) at the steps that every seed logged."""
    series = [{log["step"]: float(value) for log in run if (value := read(log)) is not None} for run in logs]
    series = [points for points in series if points]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    found = [(step, [points[step] for points in series]) for step in steps]
    return [(step, float(np.mean(v)), min(v), max(v)) for step, v in found if all(map(math.isfinite, v))]


def _teacher_entropy(results: Results, where: str, one: str = "") -> Level | None:
    """Mean, lowest and highest over the runs: they may differ in teacher or rows."""
    read = _on_batches if where == "training batches" else _on_validation
    means = []
    for run in results.runs:
        found = [value for log in run.logs if (value := read(f"{one}teacher_entropy")(log)) is not None]
        if found:
            means.append(float(np.mean(found)))
    if means:
        return float(np.mean(means)), min(means), max(means)
    return level_of(results, f"{one}teacher_entropy")


def _losses(results: Results, logs: Mapping[str, Logs], looks: Mapping[str, Look]) -> list[Panel]:
    """A plot per objective, since losses of different objectives have no common scale."""
    lines = _lines(logs, _on_batches("loss"))
    objectives: dict[str, list[str]] = {}
    first = {run.group: run for run in reversed(results.runs)}
    for group in lines:
        objectives.setdefault(_objective(first[group]), []).append(group)
    plots: dict[str, dict[str, Line]] = {}
    for groups in objectives.values():
        name = results.method_and_setting(groups[0])[0]
        parts = {group: results.method_and_setting(group) for group in groups}
        same = len({method for method, setting in parts.values() if setting}) == 1
        names = {group: setting if same else group for group, (_, setting) in parts.items()}
        looks = {**looks_of(list(names.values())), **looks}
        plots[name if name not in plots else groups[0]] = {names[group]: lines[group] for group in groups}
    if not plots:
        return []
    if len(plots) == 1:
        note = _note(logs, lines)
        return [line_panel("curve-loss", "loss over training", lines, looks=looks, note=note)]
    note = f"{_note(logs, lines)} Each objective has its own axis: their losses cannot be compared."
    return [multiples_panel("curve-loss", "loss over training", plots, looks=looks, note=note)]


def _objective(run: Run) -> str:
    keys = ("method", "method_kwargs", "terms")
    named = {key: run.recipe.get(key) for key in keys if run.recipe.get(key)}
    return str(named) if named else run.group


def _branches(logs: Mapping[str, Logs]) -> list[Panel]:
    plots: dict[str, dict[str, Line]] = {}
    for group, runs in logs.items():
        lines = {
            text: line for name, text in BRANCHES.items() if (line := _mean_line(runs, _on_batches(name)))
        }
        if lines:
            plots[group] = lines
    if not plots:
        return []
    title = "share of label tokens per branch of the rule, over training"
    return [multiples_panel("branches", title, plots, share_y=True, note=_note(logs, plots))]
