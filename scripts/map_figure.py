"""The figure of docs/results.md: distance and entropy over passes, of epochs_joined's table of runs.

python scripts/map_figure.py
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from hpd.experiments.figures import INK, Panel, looks_of, new_axes, to_files
from hpd.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "docs" / "results" / "epochs_joined" / "data" / "runs.csv"
TARGET = ROOT / "docs" / "images"
ROWS_SEEN = 1200 * 16
"""Of every run of experiments/epochs.yaml and epochs_more.yaml: steps times rows of a step."""
NAMED = ("hpd", "sft", "forward_kl", "masked_sft", "hpd_no_draw")
METRICS = {"forward kl": "forward KL, nats", "student entropy": "entropy, nats"}

Points = dict[float, list[float]]
"""Passes over each row -> the figure of every student."""


def read(path: Path) -> tuple[dict[str, dict[str, Points]], list[float]]:
    """Metric -> method -> points, and the entropies of the teachers."""
    found: dict[str, dict[str, Points]] = {m: defaultdict(lambda: defaultdict(list)) for m in METRICS}
    with path.open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    for run in runs:
        for metric, methods in found.items():
            methods[run["method"]][ROWS_SEEN / float(run["limit"])].append(float(run[metric]))
    return found, sorted({float(run["teacher entropy"]) for run in runs})


def panel(found: Mapping[str, Mapping[str, Points]], teachers: list[float]) -> Panel:
    """Both metrics, one above the other."""
    first = next(iter(found.values()))
    students = {len(values) for points in first.values() for values in points.values()}
    assert len(students) == 1, "every method has met the same students"
    rows = [
        (metric, method, passes, statistics.mean(values), min(values), max(values))
        for metric, methods in found.items()
        for method, points in methods.items()
        for passes, values in sorted(points.items())
    ]

    def draw(figure: Any) -> None:
        axes = new_axes(figure, 2, 1, sharex=True)
        for axis, (metric, methods) in zip(axes, found.items(), strict=True):
            _draw(axis, methods)
            axis.set_ylabel(METRICS[metric])
        axes[1].axhspan(min(teachers), max(teachers), color=INK, alpha=0.15, linewidth=0)
        middle = statistics.mean(teachers)
        axes[1].axhline(middle, color=INK, linewidth=1.1, linestyle=(0, (1, 1.4)), label="teacher")
        places = sorted({row[2] for row in rows})
        axes[1].set_xticks(places, [f"{place:.2g}" if place < 10 else f"{place:.0f}" for place in places])
        axes[1].minorticks_off()
        axes[1].set_xlabel("passes over each row, at 1,200 steps of 16 rows")
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)

    note = (
        f"Lines: means of {students.pop()} students, half of them for each of two teachers; bands: lowest to "
        "highest. Rows are the teacher's own; figures on held-out rows. Dotted: the teachers' entropy."
    )
    title = "Distance from the teacher, and entropy, over passes"
    columns = ("metric", "method", "passes", "mean", "low", "high")
    return Panel("map", title, columns, rows, draw, height=5.6, note=note)


def _draw(axis: Any, methods: Mapping[str, Points]) -> None:
    looks = looks_of([*NAMED, *(method for method in methods if method not in NAMED)])
    others = [method for method in methods if method not in NAMED]
    for method in [*others, *NAMED]:
        places = sorted(methods[method])
        values = [methods[method][place] for place in places]
        look = looks[method]
        label = method if look.is_named else f"{len(others)} others" if method == others[0] else None
        means = [statistics.mean(some) for some in values]
        style: dict[str, Any] = {"color": look.color, "linestyle": look.dash, "marker": look.marker}
        width = 1.6 if look.is_named else 0.9
        axis.plot(places, means, linewidth=width, markersize=4, label=label, **style)
        if look.is_named:
            low, high = [min(some) for some in values], [max(some) for some in values]
            axis.fill_between(places, low, high, color=look.color, alpha=0.12, linewidth=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(which="both", labelsize=8)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for kind, data in to_files(panel(*read(RUNS))).items():
        write_atomically(TARGET / f"map.{kind}", lambda draft, data=data: draft.write_bytes(data))


if __name__ == "__main__":
    main()
