"""Runs and comparisons made by hand: only for what a grid of two methods does not show."""

from __future__ import annotations

from pathlib import Path

from hpd.experiments.results import Results, Run
from hpd.experiments.statistics import VariantComparison, compare_variants

__all__ = ["comparison", "make_results", "make_run"]


def make_run(axes, seed=0, **changes):
    """A finished run with these axes; `changes` replace the fields of `Run`."""
    plain = {
        "folder": Path("."),
        "axes": axes,
        "group": ", ".join(axes.values()),
        "seed": seed,
        "recipe": {"method": axes.get("method")},
        "figures": {"accuracy": 0.5},
        "logs": [],
        "records": {},
        "answers": {},
        "environment": {},
        "cost": {},
        "teacher": {},
    }
    return Run(**{**plain, **changes})


def make_results(axes, value, seeds=(0, 1), metric="accuracy"):
    """Runs whose metric is a function of axes and seed."""
    runs = [
        make_run(labels, seed, figures={metric: value(labels, seed)}) for labels in axes for seed in seeds
    ]
    return Results(title="t", runs=runs, axes=tuple(axes[0]))


def comparison(differences, variant="hpd", metric="accuracy", **changes) -> VariantComparison:
    """The uncorrected test of these paired differences to 0.5."""
    method = {seed: 0.5 + d for seed, d in enumerate(differences)}
    found = compare_variants(
        method, dict.fromkeys(range(len(differences)), 0.5), names=(variant, "forward_kl", metric)
    )
    return found._replace(**changes)
