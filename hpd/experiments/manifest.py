"""The record from before the first result: experiment file, versions, fingerprints of all that is read."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hpd.config.check import resolve
from hpd.config.schema import Recipe
from hpd.experiments.axes import axis_values
from hpd.experiments.experiment import Experiment, read_experiment
from hpd.experiments.grid import Cell
from hpd.files import digest_text, digest_tree, write_atomically, write_json

__all__ = [
    "COMPARED",
    "EXPERIMENT",
    "MANIFEST",
    "OWN_LOGS",
    "RECORD",
    "TEACHER_FIGURES",
    "differing_paths",
    "fingerprints",
    "flatten",
    "is_finished",
    "open_manifest",
    "require_comparable",
    "require_equal_environments",
    "require_only_repetitions",
]

MANIFEST = "manifest.json"
EXPERIMENT = "experiment.yaml"
RECORD = "experiment.json"
"""The grid's file in a run folder: axes, cost, extra figures, fingerprints. A run that has it is finished."""
_RESULTS = ("runs", "tune", "report", "logs", "tuned.json")
TEACHER_FIGURES = "figures.json"
OWN_LOGS = "own_samples.jsonl"
"""Figures of the text that a run's student writes itself, by step."""
COMPARED = ("hpd", "git_commit", "python", "platform", "packages")
"""Fields of environment.json that must be equal; `--allow` names those that may differ."""


def open_manifest(
    experiment: Experiment,
    text: str,
    overrides: Sequence[str],
    tuning: Sequence[Cell],
    grid: Sequence[Cell],
    allow: Sequence[str],
) -> dict[str, Any]:
    """Copy the experiment file to its folder before any result, or check that it is the one there, or that
    one with more repetitions (`require_only_repetitions`).

    Raises:
        ValueError: the folder holds another experiment, or versions or data have changed since it began.
    """
    if unknown := [name for name in allow if name not in (*COMPARED, "data")]:
        raise ValueError(f"--allow {', '.join(unknown)}: it takes {', '.join(COMPARED)}, data.")
    # A report reads manifests and does without transformers, which takes seconds to import.
    from hpd.training.folder import environment

    folder = experiment.folder
    found = {
        "sha256": digest_text(text),
        "overrides": list(overrides),
        "environment": environment(),
        "fingerprints": _all_fingerprints([*tuning, *grid]),
        "cells": {cell.name: cell.axes for cell in grid},
    }
    path = folder / MANIFEST
    if not path.is_file():
        if foreign := [name for name in _RESULTS if (folder / name).exists()]:
            raise ValueError(
                f"{folder} holds {', '.join(foreign)} but no {MANIFEST}: choose another output_dir."
            )
        if (folder / EXPERIMENT).is_file() and (folder / EXPERIMENT).read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{folder} holds another {EXPERIMENT} and no {MANIFEST}: choose another output_dir."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / EXPERIMENT, text)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(path, {**found, "started": started})
        return found
    known = json.loads(path.read_text(encoding="utf-8"))
    if has_grown := (known["sha256"], known["overrides"]) != (found["sha256"], found["overrides"]):
        require_only_repetitions(experiment, known, found["cells"])
    require_equal_environments([known["environment"], found["environment"]], allow)
    begun = known["fingerprints"]
    if "data" not in allow and (
        changed := sorted(
            name
            for name, digest in found["fingerprints"].items()
            if begun.get(name) != digest and not (has_grown and name not in begun)
        )
    ):
        raise ValueError(
            f"Files have changed since the experiment began: {', '.join(changed)}. Start again in another "
            "output_dir."
        )
    return _extend(folder, text, known, found) if has_grown else known


def require_only_repetitions(
    experiment: Experiment, known: Mapping[str, Any], cells: Mapping[str, Mapping[str, str]]
) -> None:
    """The experiment must be the one that began in its folder with more repetitions, and nothing else.

    Values may be added behind those of the axes that repeat every variant (the seed and those of `paired`).
    All cells of before stay, and the new ones are of new repetitions.

    Args:
        known: the folder's manifest.
        cells: name -> axis -> label of the cells that it has now.

    Raises:
        ValueError: anything else differs.
    """
    copy = experiment.folder / EXPERIMENT
    try:
        began = read_experiment(copy.read_text(encoding="utf-8"), known["overrides"])
    except (OSError, ValueError):
        began = None
    before = known["cells"]
    begun = [_unit(experiment, axes) for axes in before.values()]
    added = [axes for name, axes in cells.items() if name not in before]
    if (
        began is None
        or not added
        or _without_repetitions(began) != _without_repetitions(experiment)
        or not all(_is_start(began.axes[axis], experiment.axes.get(axis, [])) for axis in began.repeats)
        or any(cells.get(name) != axes for name, axes in before.items())
        or any(_unit(experiment, axes) in begun for axes in added)
    ):
        raise ValueError(
            f"{experiment.folder} began with another experiment file or other overrides (the copy is "
            f"{copy}). Changing the question after results are known is what this prevents: restore the "
            "file, or set another output_dir. Only repetitions may be added: values behind those of seed and "
            "of the axes in paired."
        )


def _without_repetitions(experiment: Experiment) -> Experiment:
    axes = {axis: values for axis, values in experiment.axes.items() if axis not in experiment.repeats}
    return dataclasses.replace(experiment, axes=axes, exclude=[], output_dir=None)


def _unit(experiment: Experiment, axes: Mapping[str, str]) -> tuple[str | None, ...]:
    """The repetition that a cell belongs to."""
    return tuple(axes.get(axis) for axis in experiment.repeats)


def _is_start(values: Any, longer: Any) -> bool:
    some, all_of_them = (list(axis_values(side).items()) for side in (values, longer))
    return all_of_them[: len(some)] == some


def _extend(folder: Path, text: str, known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the new cells, and with when they came and what was known by then."""
    finished = sum((folder / "runs" / name / RECORD).is_file() for name in known["cells"])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    step = {"at": now, "sha256": known["sha256"], "runs": len(known["cells"]), "finished": finished}
    manifest = {
        **known,
        **{key: found[key] for key in ("sha256", "overrides", "cells")},
        "fingerprints": {**known["fingerprints"], **found["fingerprints"]},
        "added": [*known.get("added", []), step],
    }
    # The file first: stopped between the two, the next call adds the repetitions again.
    write_atomically(folder / EXPERIMENT, text)
    write_json(folder / MANIFEST, manifest)
    return manifest


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the local files and folders that a recipe reads, by recipe path; ids of the Hub stand for
    themselves."""
    return {name: _digest(source) for name, source in _sources(recipe).items()}


def is_finished(recipe: Recipe) -> bool:
    """True if the run folder holds everything that a grid writes."""
    return (Path(recipe.output_dir) / RECORD).is_file()


def require_comparable(cells: Sequence[Cell], manifest: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Finished runs must be runs of this grid: recipe, versions and data as they are now.

    Raises:
        ValueError: with the run and what differs.
    """
    for cell in cells:
        folder = Path(cell.recipe.output_dir)
        if not is_finished(cell.recipe):
            continue
        ran = flatten(yaml.safe_load((folder / "recipe.yaml").read_text("utf-8")))
        wanted = flatten(resolve(cell.recipe))
        if changed := sorted(
            p for p in ran.keys() | wanted.keys() if ran.get(p) != wanted.get(p) and p != "output_dir"
        ):
            shown = ", ".join(f"{p} ({ran.get(p)!r}, not {wanted.get(p)!r})" for p in changed)
            raise ValueError(
                f"{folder} is finished with another recipe: {shown}. Runs may differ in the axes only; "
                "delete it to redo it."
            )
        try:
            environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
            require_equal_environments([manifest["environment"], environment], allow)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        known = set(manifest["fingerprints"].values())
        if "data" not in allow and (
            foreign := [n for n, digest in record["fingerprints"].items() if digest not in known]
        ):
            raise ValueError(
                f"{folder} read other files than this experiment does: {', '.join(foreign)}. Delete it to "
                "redo it."
            )


def require_equal_environments(environments: Sequence[Mapping[str, Any]], allow: Sequence[str]) -> None:
    """Raise ValueError where versions or platform differ, unless the field is in `allow`."""
    first = environments[0]
    for other in environments[1:]:
        differing = [
            field for field in COMPARED if field not in allow and first.get(field) != other.get(field)
        ]
        if differing:
            shown = "; ".join(f"{field}: {first.get(field)} and {other.get(field)}" for field in differing)
            raise ValueError(
                f"Runs were made by different software, so they differ in more than the axes: {shown}. Redo "
                f"them together, or accept it with --allow {','.join(differing)} (the report says so)."
            )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b.c` -> value; empty mappings and lists are values."""
    if not isinstance(tree, Mapping) or (prefix and not tree):
        return {prefix: tree}
    return {
        path: value
        for key, child in tree.items()
        for path, value in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def differing_paths(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Recipe paths in which runs differ, output_dir left out."""
    flat = [flatten(recipe) for recipe in recipes]
    paths = dict.fromkeys(path for recipe in flat for path in recipe)
    return [
        p for p in paths if p != "output_dir" and any(recipe.get(p) != flat[0].get(p) for recipe in flat[1:])
    ]


def _sources(recipe: Recipe) -> dict[str, str]:
    """Everything that a recipe reads, by recipe path. A student of random weights is its configuration."""
    validation = recipe.data.validation
    sets = validation if isinstance(validation, Mapping) else {}
    named = {
        "teacher": recipe.teacher.model,
        "student": recipe.student.model,
        "data.path": recipe.data.path,
        "data.validation": validation if isinstance(validation, str) else None,
        **{f"data.validation.{name}": place for name, place in sets.items()},
        **{f"eval.{number}.data": entry.data for number, entry in enumerate(recipe.eval)},
    }
    return {name: source for name, source in named.items() if source}


def _all_fingerprints(cells: Sequence[Cell]) -> dict[str, str]:
    """Digest of each source of the cells, by recipe path and source; each is read once."""
    read = {(name, source) for cell in cells for name, source in _sources(cell.recipe).items()}
    return {f"{name}: {source}": _digest(source) for name, source in sorted(read)}


def _digest(source: str) -> str:
    return digest_tree(Path(source))[:16] if Path(source).exists() else source
