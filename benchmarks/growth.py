"""How the operator's time grows with label positions, vocabulary, hidden size and chunk size: a table and a plot of each.

    python benchmarks/growth.py [--axes tokens,vocabulary,hidden,chunk] [--repeats 3] [--json | --check] [--plots]

HPD and forward KL beside TRL's operator, our reference and the bare products; forward and backward; medians. One axis moves at a
time from the middle shape.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from head import Problem
from timing import interleaved, machine, print_table, ratios, store_or_check

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
MIDDLE = {"tokens": 512, "vocabulary": 32768, "hidden": 512, "chunk": 64}
AXES = {
    "tokens": [128, 256, 512, 1024, 2048],
    "vocabulary": [4096, 8192, 16384, 32768, 65536],
    "hidden": [128, 256, 512, 1024],
    "chunk": [1, 4, 16, 64],
}
LABELS = {"tokens": "label positions", "vocabulary": "vocabulary", "hidden": "hidden size", "chunk": "bytes of a chunk, MiB"}


def candidates(point: dict[str, int]) -> dict[str, Callable[[], None]]:
    problem = Problem(
        (point["tokens"], point["hidden"], point["hidden"], point["vocabulary"]), chunk_bytes=point["chunk"] * 2**20
    )
    return {
        "bare products": problem.floor,
        "hpd": problem.ours("hpd"),
        "forward_kl": problem.ours("forward_kl"),
        "TRL forward KL": problem.trl(0.0),
        "reference forward_kl": problem.ours("forward_kl", "reference"),
    }


def measure(axis: str, repeats: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of each candidate at each point of an axis."""
    return {value: interleaved(candidates({**MIDDLE, axis: value}), repeats) for value in AXES[axis]}


def plot(axis: str, medians: dict[int, dict[str, float]]) -> None:
    """Milliseconds over the axis, both logarithmic: a straight line of slope one is cost in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(6.0, 4.0), dpi=120, layout="constrained")
    values = list(medians)
    styles = {"bare products": ("black", "--", "."), "hpd": ("#c1121f", "-", "o"), "forward_kl": ("#e09f3e", "-", "s"),
              "TRL forward KL": ("#335c67", "-", "^"), "reference forward_kl": ("#8d99ae", "-", "v")}  # fmt: skip
    for name, (color, line, marker) in styles.items():
        axes.plot(values, [1e3 * medians[v][name] for v in values], color=color, ls=line, marker=marker, ms=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel(LABELS[axis])
    axes.set_ylabel("forward and backward, ms")
    fixed = ", ".join(
        f"{LABELS[name].split(',')[0]} {value:,}{' MiB' if name == 'chunk' else ''}"
        for name, value in MIDDLE.items()
        if name != axis
    )
    axes.set_title(fixed, fontsize=8)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"growth-{axis}.png", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES), help="comma-separated: " + ", ".join(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plots", action="store_true", help="draw docs/images/growth-AXIS.png")
    parser.add_argument("--json", action="store_true", help="store the ratios in benchmarks/results/growth.json")
    parser.add_argument("--check", action="store_true", help="compare with the stored ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(), "ratios": {}, "median_seconds": {}}
    for axis in options.axes.split(","):
        seconds = measure(axis, options.repeats)
        medians = {value: {name: statistics.median(times) for name, times in at.items()} for value, at in seconds.items()}
        result["median_seconds"][axis] = medians
        for value, at in seconds.items():
            result["ratios"][f"{axis} {value}"] = ratios(at, "bare products")
        print(f"\n{LABELS[axis]}, {machine()}\n")
        names = list(next(iter(medians.values())))
        rows = [
            [f"{v:,}", *(f"{1e3 * at[n]:.0f} ({result['ratios'][f'{axis} {v}'][n]:.2f})" for n in names)]
            for v, at in medians.items()
        ]
        print_table([LABELS[axis], *(f"{name}, ms (x products)" for name in names)], rows)
        if options.plots:
            plot(axis, medians)
    store_or_check("growth", result, options.json, options.check)


if __name__ == "__main__":
    main()
