"""The record from before the first result: experiment file, versions, fingerprints of all that is read."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hpd.config.check import resolve
from hpd.config.schema import Recipe
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
    folder: Path,
    text: str,
    overrides: Sequence[str],
    tuning: Sequence[Cell],
    grid: Sequence[Cell],
    allow: Sequence[str],
) -> dict[str, Any]:
    """Copy the experiment file to its folder before any result, or check that it is the one there.

    Raises:
        ValueError: the folder holds another experiment, or versions or data have changed since it began.
    """
    if unknown := [name for name in allow if name not in (*COMPARED, "data")]:
        raise ValueError(f"--allow {', '.join(unknown)}: it takes {', '.join(COMPARED)}, data.")
    # A report reads manifests and does without transformers, which takes seconds to import.
    from hpd.training.folder import environment

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
    if (known["sha256"], known["overrides"]) != (found["sha256"], found["overrides"]):
        raise ValueError(
            f"{folder} began with another experiment file or other overrides (the copy is "
            f"{folder / EXPERIMENT}). Changing the question after results are known is what this prevents: "
            "restore the file, or set another output_dir."
        )
    require_equal_environments([known["environment"], found["environment"]], allow)
    if "data" not in allow and known["fingerprints"] != found["fingerprints"]:
        changed = sorted(
            name
            for name, digest in found["fingerprints"].items()
            if known["fingerprints"].get(name) != digest
        )
        raise ValueError(
            f"Files have changed since the experiment began: {', '.join(changed)}. Start again in another "
            "output_dir."
        )
    return known


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
