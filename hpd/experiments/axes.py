"""The axes of a grid: seeds, places of the recipe, and names of your own that stand for several places."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hpd.config.schema import Recipe
from hpd.methods.terms import nearest

__all__ = [
    "SEED_AXES",
    "SEED_PATH",
    "axis_label",
    "axis_values",
    "check_axes",
    "is_recipe_path",
    "paths_by_axis",
    "places",
    "seeds_of",
]

SEED_PATH = "train.seed"
SEED_AXES = ("seed", SEED_PATH)


def axis_values(values: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Label -> value of an axis."""
    return dict(values) if isinstance(values, Mapping) else {axis_label(value): value for value in values}


def axis_label(value: Any) -> str:
    """The name of a value in run names and tables."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_recipe_path(axis: str) -> bool:
    """True for the name of an axis whose values stand at one place of the recipe."""
    return axis in SEED_AXES or axis.partition(".")[0] in {f.name for f in dataclasses.fields(Recipe)}


def paths_by_axis(axes: Mapping[str, Any]) -> dict[str, list[str]]:
    """Axis -> the recipe paths that it sets; none for an axis of labels alone."""
    return {
        axis: list(dict.fromkeys(path for change in _changes(axis, values) for path in places(change)))
        for axis, values in axes.items()
    }


def places(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe path -> value of everything that `changes` set, inside mappings too.

    >>> places({"train": {"seed": 5}})
    {'train': {'seed': 5}, 'train.seed': 5}
    """
    found: dict[str, Any] = {}
    for path, value in changes.items():
        found[path] = value
        if isinstance(value, Mapping):
            found |= {f"{path}.{inner}": given for inner, given in places(value).items()}
    return found


def seeds_of(axes: Mapping[str, Any]) -> list[int]:
    """All seeds of a grid, those that an axis of recipe paths sets included."""
    given = [places(change) for axis, values in axes.items() for change in _changes(axis, values)]
    return [change[SEED_PATH] for change in given if SEED_PATH in change]


def _changes(axis: str, values: Sequence[Any] | Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each value of an axis replaces in the recipe: nothing, if it is a label alone."""
    found = list(axis_values(values).values())
    if is_recipe_path(axis):
        return [{SEED_PATH if axis in SEED_AXES else axis: value} for value in found]
    return [value for value in found if isinstance(value, Mapping)]


def check_axes(axes: Mapping[str, Any], read: str) -> None:
    """Refuse an axis that does nothing, and two that set the same place.

    Args:
        read: the text of everything that may hold `$NAME`.
    """
    known = ["seed", *(f.name for f in dataclasses.fields(Recipe))]
    for axis, values in axes.items():
        if len(axis_values(values)) != len(values) or not values:
            raise ValueError(f"The axis {axis!r} needs one or more different values, got {values!r}.")
        if is_recipe_path(axis):
            continue
        if isinstance(values, Mapping):
            right = all(isinstance(value, Mapping) for value in values.values())
        else:
            right = f"${axis}" in read
        if not right:
            raise ValueError(
                f"The axis {axis!r} is not a recipe path. {nearest(axis, known)} An axis of your own "
                "name gives each label the paths that it replaces, as in {a: {student.model: ...}, b: ...}, "
                f"or has labels alone, which then stand where other values say ${axis}."
            )
    owner: dict[str, str] = {}
    for axis, paths in paths_by_axis(axes).items():
        for path in paths:
            if path in owner:
                raise ValueError(
                    f"The axes {owner[path]!r} and {axis!r} both set {path}: take it out of one."
                )
            owner[path] = axis
