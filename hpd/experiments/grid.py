"""The grid: an experiment expanded to the checked recipes of its runs."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from hpd.config.check import resolve
from hpd.config.load import load_recipe
from hpd.config.schema import Recipe
from hpd.experiments.experiment import (
    SEED_PATH,
    VALIDATION_METRICS,
    Evaluation,
    Experiment,
    Tune,
    axis_label,
    axis_values,
    put,
)
from hpd.files import write_json

__all__ = [
    "BASE_FOLDER",
    "Cell",
    "Choice",
    "base_tree",
    "choose",
    "evaluations",
    "expand",
    "expand_tuning",
    "group_key",
    "read_choices",
    "short",
    "tuned_axes",
    "tuning_evaluation",
    "write_choices",
]


BASE_FOLDER = "$BASE"
"""Stands in values for the folder that a `base` function wrote its files to."""


_SHORT_BASES = {
    "demo": "hpd.demo.run:demo_recipe",
    "chains": "hpd.experiments.tasks:chains",
    "gym_chains": "hpd.experiments.tasks:gym_chains",
    "short_answers": "hpd.experiments.tasks:short_answers",
}


class Cell(NamedTuple):
    """One run of the grid."""

    name: str
    """The run folder's name."""
    axes: dict[str, str]
    """Axis -> label."""
    recipe: Recipe


def expand(experiment: Experiment, folder: Path, tuned: Mapping[str, Any] | None = None) -> list[Cell]:
    """The cells of the grid, each with its checked recipe.

    Args:
        folder: the experiment's folder; runs lie in `folder/runs`.
        tuned: group of the `tune.per` axes (see `group_key`) -> the value chosen for it.

    Raises:
        ValueError: a recipe that is not valid, said with the cell's name; or two cells of one name.
    """
    base = base_tree(experiment, folder)
    per = tuned_axes(experiment)
    cells = []
    for labels, changes in _product(experiment, folder):
        if tuned is not None and experiment.tune is not None:
            changes = {**changes, experiment.tune.path: tuned[group_key(labels, per)]}
        cells.append(_cell(base, labels, changes, folder / "runs"))
    _require_distinct(cells)
    return cells


def expand_tuning(experiment: Experiment, folder: Path) -> list[Cell]:
    """The runs that choose `tune.path`: per group, value and tuning seed."""
    tune = experiment.tune
    if tune is None:
        return []
    base = base_tree(experiment, folder)
    for path, value in tune.set.items():
        put(base, path, value)
    base["eval"] = None  # `tuning_evaluation` asks for what the choice needs, on validation rows
    per, seen, cells = tuned_axes(experiment), set(), []
    for labels, changes in _product(experiment, folder):
        group = {axis: label for axis, label in labels.items() if axis in per}
        if (key := group_key(labels, per)) in seen:
            continue
        seen.add(key)
        for value, seed in itertools.product(tune.values, tune.seeds):
            tried = {**changes, tune.path: value, SEED_PATH: seed}
            cells.append(
                _cell(base, {**group, tune.path: f"{value:g}", "seed": str(seed)}, tried, folder / "tune")
            )
    _require_distinct(cells)
    return cells


def tuning_evaluation(experiment: Experiment, folder: Path) -> Evaluation | None:
    """The evaluation whose result is tuned on, moved to the validation file; None where a figure of the loss
    decides.

    Raises:
        ValueError: data.validation is no file, or neither evals nor the recipe's eval says how to grade.
    """
    tune = experiment.tune
    if tune is None or tune.metric in VALIDATION_METRICS:
        return None
    base = base_tree(experiment, folder)
    validation = base.get("data", {}).get("validation")
    if not isinstance(validation, str) or not Path(validation).is_file():
        raise ValueError(
            f"tune.metric {tune.metric} needs data.validation to be a file with prompts and answers; or tune "
            "on loss."
        )
    own = {
        key: value
        for key, value in (_source_tree(experiment, folder).get("eval") or {}).items()
        if value is not None
    }
    if (
        given := next((e for e in evaluations(experiment, folder) if e.name == tune.metric), None)
    ) is not None:
        own |= {key: value for key, value in dataclasses.asdict(given).items() if value is not None}
    elif not own:
        raise ValueError(
            "tune.metric accuracy needs the recipe's eval, or an entry of evals of that name; or tune on "
            "loss."
        )
    return TypeAdapter(Evaluation).validate_python(
        {**own, "name": tune.metric, "data": validation, "limit": None}
    )


def tuned_axes(experiment: Experiment) -> tuple[str, ...]:
    """The axes whose every combination gets a tuned value of its own."""
    names = ["variant"] * bool(experiment.variants) + [
        axis for axis in experiment.axes if axis not in ("seed", SEED_PATH)
    ]
    chosen = experiment.tune.per if experiment.tune is not None and experiment.tune.per is not None else names
    return tuple(axis for axis in names if axis in chosen)


def group_key(labels: Mapping[str, str], axes: Sequence[str]) -> str:
    """The name of a group of runs: its labels on `axes`, or "all"."""
    return (
        ", ".join(
            f"{short(axis)}={labels[axis]}" if axis not in ("variant", "method") else labels[axis]
            for axis in axes
        )
        or "all"
    )


def short(axis: str) -> str:
    """The last part of a recipe path: `method_kwargs.forward` -> `forward`."""
    return axis.rsplit(".", 1)[-1]


def base_tree(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The base recipe with `set` and the budget in it; a base function writes its files to `folder/base`."""
    tree = _source_tree(experiment, folder)
    for path, value in experiment.set.items():
        put(tree, path, _fill(value, folder))
    if experiment.budget is not None and experiment.budget.type == "steps":
        put(tree, "train.max_steps", int(experiment.budget.value))
    return tree


def evaluations(experiment: Experiment, folder: Path) -> tuple[Evaluation, ...]:
    """`evals`, what they leave open taken from the base's eval (even where `set` removes that from the
    runs)."""
    own = {
        key: value
        for key, value in (_source_tree(experiment, folder).get("eval") or {}).items()
        if value is not None
    }
    filled = []
    for evaluation in experiment.evals:
        given = {key: value for key, value in dataclasses.asdict(evaluation).items() if value is not None}
        filled.append(TypeAdapter(Evaluation).validate_python(_fill({**own, **given}, folder)))
    return tuple(filled)


def _source_tree(experiment: Experiment, folder: Path) -> dict[str, Any]:
    source = experiment.base
    if isinstance(source, str):
        source = _SHORT_BASES.get(source, source)
        if ":" in source and not source.endswith((".yaml", ".yml")):
            tree = _call_base(source, folder / "base")
        else:
            tree = resolve(load_recipe(Path(source)))
    else:
        tree = copy.deepcopy(dict(source))
    tree.pop("output_dir", None)
    return tree


def _call_base(source: str, folder: Path) -> dict[str, Any]:
    module, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"base {source!r} cannot be had: {error}. Give demo, a recipe's path, or package.module:name."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    return dict(function(folder))


def _fill(value: Any, folder: Path) -> Any:
    return json.loads(json.dumps(value).replace(BASE_FOLDER, str(folder / "base")))


def _product(experiment: Experiment, folder: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(labels, changed recipe paths) of every cell that is not excluded."""
    axes: dict[str, dict[str, Any]] = {"variant": dict(experiment.variants)} if experiment.variants else {}
    axes |= {axis: axis_values(values) for axis, values in experiment.axes.items()}
    for labels in itertools.product(*axes.values()):
        named = dict(zip(axes, labels, strict=True))
        if any(_matches(named, rule) for rule in experiment.exclude):
            continue
        changes: dict[str, Any] = {}
        for axis, label in named.items():
            value = _fill(axes[axis][label], folder)
            changes |= value if axis == "variant" else {SEED_PATH if axis == "seed" else axis: value}
        yield named, changes


def _matches(labels: Mapping[str, str], rule: Mapping[str, Any]) -> bool:
    lists = {axis: wanted if isinstance(wanted, list) else [wanted] for axis, wanted in rule.items()}
    return all(labels[axis] in [axis_label(value) for value in wanted] for axis, wanted in lists.items())


def _cell(base: dict[str, Any], labels: dict[str, str], changes: Mapping[str, Any], folder: Path) -> Cell:
    tree = copy.deepcopy(base)
    # A method's parameters belong to it: another method does not inherit the base's.
    if ("method" in changes or "terms" in changes) and "method_kwargs" not in changes:
        tree.pop("method_kwargs", None)
    if "terms" in changes:
        tree.pop("method", None)
    for path in sorted(changes, key=lambda p: p.count(".")):
        put(tree, path, copy.deepcopy(changes[path]))
    name = (
        "__".join(re.sub(r"[^\w.+-]+", "-", f"{_prefix(axis)}{label}") for axis, label in labels.items())
        or "run"
    )
    try:
        recipe = load_recipe({**tree, "output_dir": str(folder / name)})
    except ValueError as error:
        raise ValueError(f"The cell {name} is no valid recipe. {error}") from None
    return Cell(name, labels, recipe)


def _prefix(axis: str) -> str:
    return "" if axis in ("variant", "method") else f"{short(axis)}-"


def _require_distinct(cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    if not cells:
        raise ValueError("The grid is empty: exclude leaves no cell.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"Two cells of the grid are called {twice!r}: give their axis labels, as in {{label: value}}."
        )


FILE = "tuned.json"


class Choice(NamedTuple):
    """What was tried for one group of runs, and what was taken."""

    group: str
    path: str
    metric: str
    mode: str
    chosen: float
    tried: dict[str, list[float]]
    """Value -> the metric, one number per tuning seed; NaN for a run that diverged."""

    @property
    def means(self) -> dict[float, float]:
        """Value -> mean over seeds, in rising order; NaN where a seed diverged."""
        return {
            float(value): float(np.mean(found))
            for value, found in sorted(self.tried.items(), key=lambda item: float(item[0]))
        }

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the smallest or largest tried: a better one may lie beyond."""
        return self.chosen in (min(self.means), max(self.means))

    @property
    def spread(self) -> float:
        """Robustness: the worst mean minus the best, in the metric's unit; NaN where some value diverged."""
        values = list(self.means.values())
        return float(max(values) - min(values)) if not any(map(math.isnan, values)) else math.nan


def choose(experiment: Experiment, cells: Sequence[Cell]) -> list[Choice]:
    """The best value of each group by its mean over the tuning seeds.

    Raises:
        ValueError: every value of a group diverged, or a run lacks the metric.
    """
    tune = experiment.tune
    assert tune is not None
    axes = tuned_axes(experiment)
    groups: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        found = _measured(cell, tune)
        groups.setdefault(group_key(cell.axes, axes), {}).setdefault(cell.axes[tune.path], []).append(found)
    return [_best(group, tune, tried) for group, tried in groups.items()]


def _best(group: str, tune: Tune, tried: dict[str, list[float]]) -> Choice:
    sign = 1.0 if tune.mode == "min" else -1.0
    finite = {
        value: sign * float(np.mean(found)) for value, found in tried.items() if np.isfinite(found).all()
    }
    if not finite:
        raise ValueError(f"Every {tune.path} of {group} diverged on some seed: give smaller values.")
    return Choice(
        group,
        tune.path,
        tune.metric,
        tune.mode,
        float(min(finite, key=lambda v: (finite[v], float(v)))),
        tried,
    )


def _measured(cell: Cell, tune: Tune) -> float:
    folder = Path(cell.recipe.output_dir)
    if tune.metric in VALIDATION_METRICS:
        figures, name = (
            json.loads((folder / "summary.json").read_text(encoding="utf-8")),
            f"{tune.metric} after",
        )
    else:
        figures, name = (
            json.loads((folder / "experiment.json").read_text(encoding="utf-8"))["figures"],
            tune.metric,
        )
    if name not in figures:
        raise ValueError(f"The tuning run {cell.name} has no {name!r}: tuning needs data.validation.")
    value = float(figures[name])
    return value if math.isfinite(value) else math.nan


def write_choices(folder: Path, choices: Sequence[Choice]) -> None:
    """Freeze the choices."""
    write_json(folder / FILE, [choice._asdict() for choice in choices])


def read_choices(folder: Path) -> list[Choice] | None:
    """The frozen choices; None before tuning is done."""
    path = folder / FILE
    if not path.is_file():
        return None
    entries: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [Choice(**entry) for entry in entries]
