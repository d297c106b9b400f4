"""The base of an experiment: the recipe that all runs start from, and what `evals` take from it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpd.config.check import resolve
from hpd.config.load import load_recipe
from hpd.experiments.experiment import Evaluation, Experiment, change, check_evaluation, put
from hpd.files import import_named

__all__ = ["BASE_FOLDER", "base_tree", "evaluations", "fill", "validation_of"]

BASE_FOLDER = "$BASE"
"""Stands in values for the folder that a `base` function wrote its files to."""
_SHORT_BASES = {
    "demo": "hpd.demo.recipe:demo_recipe",
    "chains": "hpd.experiments.tasks:chains",
    "chain_inits": "hpd.experiments.tasks:chain_inits",
    "foreign_chains": "hpd.experiments.tasks:foreign_chains",
    "gym_chains": "hpd.experiments.tasks:gym_chains",
    "short_answers": "hpd.experiments.tasks:short_answers",
}
_OF_ANY_TASK = ("data", "limit", "limit_seed", "max_new_tokens", "batch_size")
"""Fields of the base's eval that an evaluation of another task takes too."""


def base_tree(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The base recipe with `set` and the budget in it; a base function writes its files to `folder/base`."""
    tree = _source_tree(experiment, folder)
    for path, value in experiment.set.items():
        change(tree, path, fill(value, folder))
    if experiment.budget is not None and experiment.budget.type == "steps":
        put(tree, "train.max_steps", int(experiment.budget.value))
    return tree


def evaluations(experiment: Experiment, folder: Path) -> tuple[Evaluation, ...]:
    """`evals`, each with what it leaves open taken from the base's eval of its task.

    The base's eval is the one that the runs have, or the one that `set: {eval: null}` took from them. An
    entry of another task than any of the base's takes the data, limits and batch size of the first.

    Raises:
        ValueError: as `check_evaluation`.
    """
    entries = _entries(base_tree(experiment, folder)) or _entries(_source_tree(experiment, folder))
    return tuple(check_evaluation(fill(_inherit(entries, given), folder)) for given in experiment.evals)


def validation_of(experiment: Experiment, folder: Path, metric: str) -> Evaluation:
    """The evaluation that measures `metric` on the file data.validation.

    Raises:
        ValueError: data.validation is not a file, or neither evals nor the base's eval says how to grade.
    """
    tree = base_tree(experiment, folder)
    validation = tree.get("data", {}).get("validation")
    if not isinstance(validation, str) or not Path(validation).is_file():
        raise ValueError(
            f"tune.metric {metric} needs data.validation to be a file with prompts and answers; or tune on "
            "loss."
        )
    found = {evaluation.name: evaluation for evaluation in evaluations(experiment, folder)}
    entries = _entries(tree) or _entries(_source_tree(experiment, folder))
    if metric not in found and not entries:
        raise ValueError(
            "tune.metric accuracy needs the recipe's eval, or an entry of evals of that name; or tune on "
            "loss."
        )
    chosen = found.get(metric) or check_evaluation({**_inherit(entries, {}), "name": metric})
    return dataclasses.replace(chosen, data=validation, limit=None, limit_seed=None)


def fill(value: Any, folder: Path) -> Any:
    """A value with the base function's folder in place of `$BASE`."""
    return json.loads(json.dumps(value).replace(BASE_FOLDER, str(folder / "base")))


def _entries(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of a recipe's eval, which is one task or a list of them."""
    found = tree.get("eval") or []
    return [found] if isinstance(found, Mapping) else list(found)


def _inherit(entries: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in given.items() if value is not None}
    if not entries:
        return given
    task = given.get("task", entries[0].get("task", "exact-match"))
    same = [entry for entry in entries if entry.get("task", "exact-match") == task]
    if same:
        inherited = {key: value for key, value in same[0].items() if key != "every"}
    else:
        inherited = {key: entries[0][key] for key in _OF_ANY_TASK if key in entries[0]}
    return {**inherited, **given}


def _source_tree(experiment: Experiment, folder: Path) -> dict[str, Any]:
    source = experiment.base
    if isinstance(source, str):
        source = _SHORT_BASES.get(source, source)
        if ":" in source and not source.endswith((".yaml", ".yml")):
            tree = _call_base(source, folder / "base")
        else:
            tree = resolve(load_recipe(Path(source)))
            entries = _entries(tree)
            # One task alone is a mapping, so that `set` reaches its fields.
            tree["eval"] = entries[0] if len(entries) == 1 else entries or None
    else:
        tree = copy.deepcopy(dict(source))
    tree.pop("output_dir", None)
    return tree


def _call_base(source: str, folder: Path) -> dict[str, Any]:
    try:
        function = import_named(source)
    except ValueError as error:
        raise ValueError(
            f"base {source!r} is not available: {error} Or give demo, or a recipe's path."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    return dict(function(folder))
