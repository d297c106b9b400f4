"""The grid: an experiment expanded to the checked recipes of its runs."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpd.config.load import load_recipe
from hpd.config.schema import Recipe
from hpd.experiments.axes import SEED_PATH, axis_label, axis_values, is_recipe_path
from hpd.experiments.bases import base_tree, fill
from hpd.experiments.experiment import Experiment, change

__all__ = ["Cell", "expand", "group_key", "make_cell", "product", "require_distinct", "short", "tuned_axes"]


class Cell(NamedTuple):
    """One run of the grid."""

    name: str
    """The run folder's name."""
    axes: dict[str, str]
    """Axis -> label."""
    recipe: Recipe


def expand(
    experiment: Experiment, folder: Path, tuned: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Cell]:
    """The cells of the grid, each with its checked recipe: all variants of the first repetition, then those
    of the next, so that a grid that is stopped early has every variant as often.

    Args:
        folder: the experiment's folder; runs lie in `folder/runs`.
        tuned: group of the `tune.per` axes (see `group_key`) -> recipe path -> the value chosen for it.

    Raises:
        ValueError: a recipe that is not valid, said with the cell's name; or two cells of one name.
    """
    base = base_tree(experiment, folder)
    per = tuned_axes(experiment)
    cells = []
    for labels, changes in product(experiment, folder):
        if tuned is not None and experiment.tune is not None:
            changes = {**changes, **tuned[group_key(labels, per)]}
        cells.append(make_cell(base, labels, changes, folder / "runs"))
    require_distinct(cells)
    places = {axis: list(axis_values(experiment.axes[axis])) for axis in experiment.repeats}
    return sorted(cells, key=lambda cell: [order.index(cell.axes[axis]) for axis, order in places.items()])


def tuned_axes(experiment: Experiment) -> tuple[str, ...]:
    """The axes whose every combination gets a tuned value of its own."""
    names = ["variant"] * bool(experiment.variants) + list(experiment.axes)
    if experiment.tune is not None and experiment.tune.per is not None:
        return tuple(axis for axis in names if axis in experiment.tune.per)
    return tuple(axis for axis in names if axis not in experiment.repeats)


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


def product(experiment: Experiment, folder: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(labels, changed recipe paths) of every cell that is not excluded."""
    axes: dict[str, dict[str, Any]] = {"variant": dict(experiment.variants)} if experiment.variants else {}
    axes |= {axis: axis_values(values) for axis, values in experiment.axes.items()}
    for labels in itertools.product(*axes.values()):
        named = dict(zip(axes, labels, strict=True))
        if any(_matches(named, rule) for rule in experiment.exclude):
            continue
        changes: dict[str, Any] = {}
        for axis, label in named.items():
            value = fill(axes[axis][label], folder)
            if isinstance(value, Mapping) and (axis == "variant" or not is_recipe_path(axis)):
                changes |= value
            elif not is_recipe_path(axis):
                continue  # a label alone: it stands in other values
            else:
                changes[SEED_PATH if axis == "seed" else axis] = value
        yield named, changes


def make_cell(
    base: Mapping[str, Any],
    labels: dict[str, str],
    changes: Mapping[str, Any],
    folder: Path,
    placed: Mapping[str, str] | None = None,
) -> Cell:
    """The run of `labels` under `folder`: the base with its changes, checked.

    Args:
        placed: the labels that stand for `$NAME`, where they are more than those of the run's name.
    """
    tree = copy.deepcopy(dict(base))
    # A method's parameters belong to it: another method does not inherit the base's.
    if ("method" in changes or "terms" in changes) and "method_kwargs" not in changes:
        tree.pop("method_kwargs", None)
    if "terms" in changes:
        tree.pop("method", None)
    for path in sorted(changes, key=lambda p: p.count(".")):
        change(tree, path, copy.deepcopy(changes[path]))
    name = (
        "__".join(re.sub(r"[^\w.+-]+", "-", f"{_prefix(axis)}{label}") for axis, label in labels.items())
        or "run"
    )
    tree = _with_labels(tree, placed or labels)
    try:
        recipe = load_recipe({**tree, "output_dir": str(folder / name)})
    except ValueError as error:
        raise ValueError(f"The cell {name} is not a valid recipe. {error}") from None
    return Cell(name, labels, recipe)


def require_distinct(cells: Sequence[Cell]) -> None:
    """Raise ValueError where there is no cell, or where two have one name."""
    names = [cell.name for cell in cells]
    if not cells:
        raise ValueError("The grid is empty: exclude leaves no cell.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"Two cells of the grid are called {twice!r}: give their axis labels, as in {{label: value}}."
        )


def _with_labels(tree: dict[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """The recipe with a run's labels in place of `$NAME`, for the axes that are no recipe paths."""
    text = json.dumps(tree)
    for axis in sorted(labels, key=len, reverse=True):  # $rows_of before $rows
        if not is_recipe_path(axis):
            text = text.replace(f"${axis}", json.dumps(labels[axis])[1:-1])
    return json.loads(text)


def _matches(labels: Mapping[str, str], rule: Mapping[str, Any]) -> bool:
    lists = {axis: wanted if isinstance(wanted, list) else [wanted] for axis, wanted in rule.items()}
    return all(labels[axis] in [axis_label(value) for value in wanted] for axis, wanted in lists.items())


def _prefix(axis: str) -> str:
    return "" if axis in ("variant", "method") else f"{short(axis)}-"
