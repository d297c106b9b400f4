"""A setting that is chosen per variant on validation rows, and frozen before the grid runs with it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpd.experiments.axes import SEED_PATH
from hpd.experiments.bases import base_tree, fill, validation_of
from hpd.experiments.experiment import Evaluation, Experiment, Tune, is_of_validation, validation_metrics
from hpd.experiments.grid import Cell, group_key, make_cell, product, require_distinct, tuned_axes
from hpd.experiments.manifest import RECORD
from hpd.files import write_json
from hpd.methods.fields import nearest

__all__ = [
    "Choice",
    "all_tuning",
    "choose",
    "chosen_values",
    "expand_tuning",
    "read_choices",
    "tuning_evaluation",
    "write_choices",
]

TUNED = "tuned.json"


class Choice(NamedTuple):
    """The values that were tried for one group of runs, and the one that was taken."""

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
    def ties(self) -> list[float]:
        """Other values that did exactly as well; the smallest was taken."""
        best = self.means[self.chosen]
        return [value for value, mean in self.means.items() if mean == best and value != self.chosen]

    @property
    def at_edge(self) -> bool:
        """True if the best value is the smallest or largest tried: a better one may lie beyond."""
        return self.chosen in (min(self.means), max(self.means))

    @property
    def spread(self) -> float:
        """Robustness: the worst mean minus the best, in the metric's unit; NaN where some value diverged."""
        values = list(self.means.values())
        return float(max(values) - min(values)) if not any(map(math.isnan, values)) else math.nan


def expand_tuning(
    experiment: Experiment, folder: Path, path: str, tuned: Mapping[str, Mapping[str, Any]]
) -> list[Cell]:
    """The runs that choose a path of `tune`: per group, value and tuning seed.

    Args:
        tuned: group -> the paths that are chosen already; the others stand at their first value.
    """
    tune = experiment.tune
    assert tune is not None
    base = base_tree(experiment, folder)
    base["eval"] = None  # `tuning_evaluation` asks for what the choice needs, on validation rows
    per = tuned_axes(experiment)
    replaced = fill(dict(tune.set), folder)
    seen: set[str] = set()
    cells = []
    for labels, changes in product(experiment, folder):
        group = {axis: label for axis, label in labels.items() if axis in per}
        if (key := group_key(labels, per)) in seen:
            continue
        seen.add(key)
        settings = {name: values[0] for name, values in tune.paths.items()} | dict(tuned.get(key, {}))
        for value, seed in itertools.product(tune.paths[path], tune.seeds):
            settings[path] = value
            named = {name: f"{chosen:g}" for name, chosen in settings.items()}
            tried = {**changes, **replaced, **settings, SEED_PATH: seed}
            name = {**group, **named, "seed": str(seed)}
            cells.append(make_cell(base, name, tried, folder / "tune", placed=labels))
    require_distinct(cells)
    return cells


def all_tuning(experiment: Experiment, folder: Path) -> list[Cell]:
    """The tuning runs of all paths; where a path is not chosen yet, its first value stands for the choice."""
    paths = experiment.tune.paths if experiment.tune is not None else ()
    # A folder without a manifest is somebody else's, and is refused by name later.
    found = read_choices(folder) if (folder / "manifest.json").is_file() else None
    tuned = chosen_values(found or ())
    cells = [cell for path in paths for cell in expand_tuning(experiment, folder, path, tuned)]
    return list({cell.name: cell for cell in cells}.values())


def tuning_evaluation(experiment: Experiment, folder: Path) -> Evaluation | None:
    """The evaluation whose result is tuned on; None where a figure of the loss decides.

    Raises:
        ValueError: as `validation_of`; or a set of validation rows that is not there.
    """
    tune = experiment.tune
    if tune is None:
        return None
    if is_of_validation(tune.metric):
        measured = validation_metrics(base_tree(experiment, folder).get("data", {}).get("validation"))
        if tune.metric not in measured:
            raise ValueError(
                f"tune.metric {tune.metric!r} is not measured on data.validation. "
                f"{nearest(tune.metric, measured)}"
            )
        return None
    return validation_of(experiment, folder, tune.metric)


def chosen_values(choices: Sequence[Choice]) -> dict[str, dict[str, float]]:
    """Group -> recipe path -> the value that was taken."""
    found: dict[str, dict[str, float]] = {}
    for choice in choices:
        found.setdefault(choice.group, {})[choice.path] = choice.chosen
    return found


def choose(experiment: Experiment, path: str, cells: Sequence[Cell]) -> list[Choice]:
    """The best value of a path for each group, by its mean over the tuning seeds; the smallest of equals.

    Raises:
        ValueError: every value of a group diverged, or a run lacks the metric.
    """
    tune = experiment.tune
    assert tune is not None
    axes = tuned_axes(experiment)
    groups: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        found = _measured(cell, tune)
        groups.setdefault(group_key(cell.axes, axes), {}).setdefault(cell.axes[path], []).append(found)
    return [_best(group, path, tune, tried) for group, tried in groups.items()]


def write_choices(folder: Path, choices: Sequence[Choice]) -> None:
    """Freeze the choices."""
    write_json(folder / TUNED, [choice._asdict() for choice in choices])


def read_choices(folder: Path) -> list[Choice] | None:
    """The frozen choices; None before tuning is done."""
    path = folder / TUNED
    if not path.is_file():
        return None
    entries: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [Choice(**entry) for entry in entries]


def _best(group: str, path: str, tune: Tune, tried: dict[str, list[float]]) -> Choice:
    sign = 1.0 if tune.mode == "min" else -1.0
    finite = {
        value: sign * float(np.mean(found)) for value, found in tried.items() if np.isfinite(found).all()
    }
    if not finite:
        raise ValueError(f"Every {path} of {group} diverged on some seed: give smaller values.")
    return Choice(
        group,
        path,
        tune.metric,
        tune.mode,
        float(min(finite, key=lambda v: (finite[v], float(v)))),
        tried,
    )


def _measured(cell: Cell, tune: Tune) -> float:
    folder = Path(cell.recipe.output_dir)
    if is_of_validation(tune.metric):
        name = f"{tune.metric} after"
        figures = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    else:
        name = tune.metric
        figures = json.loads((folder / RECORD).read_text(encoding="utf-8"))["figures"]
    if name not in figures:
        raise ValueError(f"The tuning run {cell.name} has no {name!r}: tuning needs data.validation.")
    value = float(figures[name])
    return value if math.isfinite(value) else math.nan
