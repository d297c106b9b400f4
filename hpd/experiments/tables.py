"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpd.experiments.axes import SEED_PATH
from hpd.experiments.grid import short
from hpd.experiments.manifest import COMPARED, flatten
from hpd.experiments.metrics import SPREAD_NOTE, Scale, higher_is_better, label, words
from hpd.experiments.results import Results, Run
from hpd.experiments.statistics import stability, steps_to
from hpd.experiments.table import Table, TableCell, number
from hpd.experiments.tuning import Choice

__all__ = [
    "ablation_table",
    "compared_metrics",
    "cost_table",
    "environment_table",
    "recipe_table",
    "result_table",
    "run_table",
    "stability_table",
    "tuning_tables",
]

CLIPPED = "clipped_share"
"""The share of steps whose gradient was clipped: it differs between methods at equal settings."""


def compared_metrics(results: Results) -> list[str]:
    """Metrics in the order of the tables: the experiment's, then all others that the runs measured."""
    found = dict.fromkeys(metric for run in results.runs for metric in run.figures)
    first = results.experiment.metrics if results.experiment else ["accuracy", "forward_kl"]
    return [m for m in first if m in found] + [m for m in found if m not in first]


def result_table(results: Results) -> Table:
    """Mean and spread over seeds, per method and metric."""
    metrics = compared_metrics(results)
    best = {metric: _best(results, metric) for metric in metrics}
    scales = {metric: results.scale(metric) for metric in metrics}
    rows = []
    for group, runs in results.groups.items():
        cells: list[Any] = [*(runs[0].axes[axis] for axis in results.axes)] or [group]
        for metric in metrics:
            values = list(results.values(group, metric).values())
            cells.append(_mean_cell(values, scales[metric], best[metric] == group))
        rows.append((*cells, len(runs)))
    if results.teacher:
        width = max(len(results.axes), 1)
        figures = [results.teacher.get(metric, math.nan) for metric in metrics]
        cells = [TableCell(scales[m].value(v), v) for m, v in zip(metrics, figures, strict=True)]
        rows.append(("teacher", *[""] * (width - 1), *cells, ""))
    note = f"Mean, and {SPREAD_NOTE}. Bold: the best mean, which is not yet a finding."
    columns = tuple(map(_axis_name, results.axes)) or ("method",)
    return Table("results", "Results", note, (*columns, *map(words, metrics), "seeds"), rows)


def run_table(results: Results) -> Table:
    """Every run's own figures, from which all others are made."""
    metrics = compared_metrics(results)
    columns = tuple(map(_axis_name, results.axes)) or ("method",)
    rows = [
        (
            *([run.axes[axis] for axis in results.axes] or [run.group]),
            run.unit if run.paired else run.seed,
            *(run.figures.get(metric, "") for metric in metrics),
        )
        for runs in results.groups.values()
        for run in runs
    ]
    return Table("runs", "Runs", "", (*columns, "seed", *map(words, metrics)), rows)


def _axis_name(axis: str) -> str:
    return "method" if axis == "variant" else short(axis)


def _best(results: Results, metric: str) -> str | None:
    better = (
        None if metric == "loss" else higher_is_better(metric)
    )  # losses of different methods are no one scale
    means = {g: float(np.mean(list(v.values()))) for g in results.groups if (v := results.values(g, metric))}
    if better is None or len(set(means.values())) < 2:
        return None
    return max(means, key=lambda group: means[group] if better else -means[group])


def _mean_cell(values: Sequence[float], scale: Scale, best: bool) -> TableCell:
    spread = scale.spread(values)
    if not spread.num_values:
        return TableCell("", math.nan)
    bounds = (spread.low, spread.high) if spread.num_values > 1 else None
    tone = "best" if best else ""
    return TableCell(scale.value(spread.mean), spread.mean, tone, scale.about(spread), bounds)


def tuning_tables(results: Results) -> list[Table]:
    """Per tuned setting: the values that were tried for each method, the one that was taken, and how much the
    choice matters."""
    paths = dict.fromkeys(choice.path for choice in results.choices)
    return [
        _tuning_table(results, f"tuning-{short(path)}" if i else "tuning", found)
        for i, path in enumerate(paths)
        for found in [[choice for choice in results.choices if choice.path == path]]
    ]


def _tuning_table(results: Results, key: str, choices: Sequence[Choice]) -> Table:
    first = choices[0]
    scale = results.scale(first.metric)
    values = sorted({float(value) for choice in choices for value in choice.tried})
    rows = []
    for choice in choices:
        means = choice.means
        tried = [
            TableCell(scale.value(mean), mean, "best" if value == choice.chosen else "")
            for value in values
            for mean in [means.get(value, math.nan)]
        ]
        tried = [
            TableCell("diverged", math.inf) if value in means and math.isnan(means[value]) else c
            for value, c in zip(values, tried, strict=True)
        ]
        rows.append(
            (
                choice.group,
                number(choice.chosen),
                *tried,
                TableCell(scale.difference(choice.spread).removeprefix("+"), choice.spread),
                "yes" if choice.at_edge else "",
            )
        )
    seeds = results.experiment.tune.seeds if results.experiment and results.experiment.tune else []
    note = (
        f"{label(first.metric)} of validation rows, mean over seeds {', '.join(map(str, seeds))}, which the "
        "results do not use. Bold: taken. Spread: worst mean minus best; small is robust. At edge: the best "
        "value is the smallest or largest tried, so a better one may lie beyond."
    )
    columns = ("method", "taken", *(f"{value:g}" for value in values), "spread", "at edge")
    return Table(key, f"Robustness to {words(short(first.path))}", note, columns, rows)


def stability_table(results: Results) -> Table:
    """The smoothness of the methods' training, as means over their seeds."""
    reach = dict(results.experiment.reach) if results.experiment else {}
    clipped = [CLIPPED] if any(CLIPPED in run.figures for run in results.runs) else []
    rows = []
    for group, runs in results.groups.items():
        found = np.array([stability(run.logs) for run in runs], dtype=float)
        means = [number(float(column.mean())) for column in found.T]
        for metric in clipped:
            means.append(
                _mean_cell(list(results.values(group, metric).values()), results.scale(metric), False)
            )
        reached = []
        for metric, level in reach.items():
            mode = "max" if higher_is_better(metric) else "min"
            steps = [steps_to(run.logs, metric, level, mode) for run in runs]
            known = [step for step in steps if step is not None]
            text = (
                "never"
                if not known
                else f"{np.mean(known):.0f}"
                + (f" ({len(known)} of {len(steps)} seeds)" if None in steps else "")
            )
            reached.append(TableCell(text, float(np.mean(known)) if known else math.inf))
        rows.append((group, *means, *reached))
    note = (
        "Means over seeds. Loss deviation (around its own trend; comparable between seeds, not between "
        "methods) and gradient norm are of the second half of training; a spike is a gradient norm more than "
        "6 scaled median deviations above the running median. "
        "Entropy is the student's on teacher text, in nats."
    )
    columns = (
        "method",
        "loss deviation",
        "grad norm",
        "its deviation",
        "spikes",
        "entropy first",
        "entropy lowest",
        "entropy last",
        *("clipped steps" for _ in clipped),
        *(f"steps to {words(metric)} {level:g}" for metric, level in reach.items()),
    )
    return Table("stability", "Stability of training", note, columns, rows)


def ablation_table(results: Results, metrics: Sequence[str]) -> Table | None:
    """The effect of every two-valued axis: second label minus first, all other axes and the seed held."""
    rows = []
    for axis in results.axes:
        labels = list(dict.fromkeys(run.axes[axis] for run in results.runs if run.finished))
        if len(labels) != 2 or axis in ("variant", "method") or len(results.groups) < 3:
            continue
        on, off = ("on", "off") if set(labels) == {"on", "off"} else (labels[1], labels[0])
        for metric in metrics:
            per_seed = _switch_effect(results, axis, on, off, metric)
            if per_seed:
                scale = results.scale(metric).change
                spread = scale.spread([float(np.mean(v)) for v in per_seed.values()])
                pairs = sum(map(len, per_seed.values()))
                rows.append(
                    (
                        short(axis),
                        f"{off} → {on}",
                        words(metric),
                        TableCell(
                            scale.difference(spread.mean),
                            spread.mean,
                            detail=scale.about(spread),
                            bounds=(spread.low, spread.high),
                        ),
                        pairs,
                    )
                )
    if not rows:
        return None
    note = (
        f"Mean change when one switch is turned and all other axes stay, and {SPREAD_NOTE}. Uncorrected. A "
        "run counts where its counterpart exists."
    )
    return Table(
        "ablation",
        "What each switch does",
        note,
        ("switch", "change", "metric", "effect", "pairs"),
        rows,
    )


def _switch_effect(results: Results, axis: str, on: str, off: str, metric: str) -> dict[str, list[float]]:
    """Unit -> differences, one per combination of the other axes."""
    others = [other for other in results.axes if other != axis]
    cells = {
        (tuple(r.axes[o] for o in others), r.axes[axis], r.unit): r.figures[metric]
        for r in results.runs
        if metric in r.figures
    }
    per_seed: dict[str, list[float]] = {}
    for (rest, switch, seed), value in cells.items():
        if switch == on and (rest, off, seed) in cells:
            per_seed.setdefault(seed, []).append(value - cells[rest, off, seed])
    return per_seed


def recipe_table(results: Results) -> Table:
    """Recipe paths in which the methods differ; what all share is in each run folder's recipe.yaml."""
    groups = {group: flatten(runs[0].recipe) for group, runs in _all_groups(results).items()}
    paths = dict.fromkeys(path for flat in groups.values() for path in flat)
    varying = [
        p
        for p in paths
        if p not in ("output_dir", SEED_PATH) and len({str(flat.get(p)) for flat in groups.values()}) > 1
    ]
    rows = [
        (group, *("" if flat.get(p) is None else str(flat.get(p)) for p in varying))
        for group, flat in groups.items()
    ]
    note = "Every recipe key in which the methods differ, next to the seed. All other keys are equal."
    return Table("recipes", "How the recipes differ", note, ("method", *varying), rows)


def _all_groups(results: Results) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in results.runs:
        found.setdefault(run.group, []).append(run)
    return found


def environment_table(results: Results) -> Table:
    """Versions and machine, and what the runs cost."""
    environments = [run.environment for run in results.runs if run.environment]
    rows: list[tuple[Any, ...]] = []
    for field in (*COMPARED, "cpu_count"):
        values = dict.fromkeys(_one_line(env.get(field)) for env in environments)
        rows.append((field.replace("_", " "), " | ".join(values)))
    if results.allowed:
        rows.append(("allowed to differ", ", ".join(results.allowed)))
    if results.manifest:
        rows.append(
            (
                "experiment file",
                f"copied before the first run, {results.manifest['started']}, sha256 "
                f"{results.manifest['sha256'][:16]}",
            )
        )
    rows += [
        ("repetitions added", f"{step['at']}, {step['finished']} of {step['runs']} runs finished")
        for step in results.manifest.get("added", [])
    ]
    rows += [
        ("data and models", f"{name} ({digest})")
        for name, digest in results.manifest.get("fingerprints", {}).items()
    ]
    return Table(
        "environment",
        "Environment",
        "Versions, machine, and fingerprints of everything that was read.",
        ("", "value"),
        rows,
    )


def cost_table(results: Results) -> Table | None:
    """Mean spending per method."""
    rows: list[tuple[Any, ...]] = []
    for group, runs in results.groups.items():
        costs = [run.cost for run in runs if run.cost]
        if costs:
            names = ("label_tokens", "trained_tokens", "rollout_tokens", "flops", "seconds")
            rows.append(
                (
                    group,
                    *(number(float(np.mean([cost.get(name, math.nan) for cost in costs]))) for name in names),
                )
            )
    if not rows:
        return None
    note = (
        "Of one run's training, mean over seeds. FLOPs are counted: 6 per weight and trained token for the "
        "student, 2 for the teacher (none for sft), heads at label positions only, 2 per token generated."
    )
    return Table(
        "cost",
        "What training cost",
        note,
        ("method", "label tokens", "trained tokens", "rollout tokens", "FLOPs", "seconds"),
        rows,
    )


def _one_line(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
