"""Growth of the operator's time with label positions, vocabulary, hidden size and chunk size.

    python benchmarks/growth.py [--axes tokens,vocabulary,hidden,chunk] [--repeats 3] [--json | --check]
    python benchmarks/growth.py --docs    # docs/performance.md from the stored result, nothing measured
    python benchmarks/growth.py --tiny    # in a second: whether it runs

HPD and forward KL beside TRL's operator, our reference and the bare products; forward and backward; medians.
One axis moves at a time from the middle shape.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from head import Problem
from peers import peers
from timing import (
    RESULTS,
    check_tiny,
    count,
    interleaved,
    machine,
    ratios,
    replace_block,
    store_or_check,
    stored,
    table,
)

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
MIDDLE = {"tokens": 256, "vocabulary": 32768, "hidden": 512, "chunk": 16}
AXES = {
    "tokens": [64, 128, 256, 512, 1024],
    "vocabulary": [4096, 8192, 16384, 32768, 65536],
    "hidden": [128, 256, 512, 1024],
    "chunk": [4, 8, 16, 32],
}
TINY_MIDDLE = {"tokens": 8, "vocabulary": 64, "hidden": 8, "chunk": 1}
TINY_AXES = {"tokens": [8, 16], "vocabulary": [64, 96], "hidden": [8, 12], "chunk": [1, 2]}
LABELS = {
    "tokens": "label positions",
    "vocabulary": "vocabulary",
    "hidden": "hidden size",
    "chunk": "bytes of a chunk, MiB",
}


def candidates(point: dict[str, int], others: bool) -> dict[str, Callable[[], None]]:
    problem = Problem(
        (point["tokens"], point["hidden"], point["hidden"], point["vocabulary"]),
        chunk_bytes=point["chunk"] * 2**20,
    )
    ours = {
        "bare products": problem.floor,
        "hpd": problem.operator("hpd"),
        "forward_kl": problem.operator("forward_kl"),
    }
    if not others:
        return ours
    return ours | {
        "TRL forward KL": peers(problem)[0]["TRL forward KL"],
        "reference forward_kl": problem.operator("forward_kl", "reference"),
    }


def measure(axis: str, repeats: int, others: bool, tiny: bool = False) -> dict[str, dict[str, list[float]]]:
    """Seconds of each candidate at each point of an axis."""
    middle, axes = (TINY_MIDDLE, TINY_AXES) if tiny else (MIDDLE, AXES)
    return {
        str(value): interleaved(candidates({**middle, axis: value}, others), repeats) for value in axes[axis]
    }


def plot(axis: str, medians: dict[str, dict[str, float]]) -> None:
    """Milliseconds over the axis, both logarithmic: a straight line of slope one is cost in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(figsize=(6.0, 4.0), dpi=120, layout="constrained")
    values = [int(value) for value in medians]
    styles = {
        "bare products": ("black", "--", "."),
        "hpd": ("#c1121f", "-", "o"),
        "forward_kl": ("#e09f3e", "-", "s"),
        "TRL forward KL": ("#335c67", "-", "^"),
        "reference forward_kl": ("#8d99ae", "-", "v"),
    }
    for name, (color, line, marker) in styles.items():
        axes.plot(
            values,
            [1e3 * at[name] for at in medians.values()],
            color=color,
            ls=line,
            marker=marker,
            ms=5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(LABELS[axis])
    axes.set_ylabel("forward and backward, ms")
    words = {**LABELS, "chunk": "chunks of"}
    fixed = [
        f"{words[name]} {value:,}{' MiB' if name == 'chunk' else ''}"
        for name, value in MIDDLE.items()
        if name != axis
    ]
    axes.set_title(", ".join(fixed), fontsize=8)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"growth-{axis}.png", metadata={"Software": None})
    plt.close(figure)


def tables(result: dict[str, Any]) -> str:
    """A stored result as docs/performance.md shows it: milliseconds, and times the bare products."""
    parts = []
    for axis, medians in result["median_seconds"].items():
        names = list(next(iter(medians.values())))
        rows = [
            [f"{int(v):,}", *(f"{1e3 * at[n]:.0f} ({result['ratios'][f'{axis} {v}'][n]:.2f})" for n in names)]
            for v, at in medians.items()
        ]
        parts.append(table([LABELS[axis], *names], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", default=",".join(AXES), help="comma-separated: " + ", ".join(AXES))
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--json", action="store_true", help="store these axes in benchmarks/results/growth.json"
    )
    parser.add_argument("--check", action="store_true", help="compare our own with the stored ratios")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="draw the plots and write the tables of the stored result, and stop",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether the script runs")
    options = parser.parse_args()
    check_tiny(parser, options, options.tiny)
    if options.docs:
        result = stored("growth")
        for axis, medians in result["median_seconds"].items():
            plot(axis, medians)
        replace_block("growth tables", tables(result))
        return
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), "ratios": {}, "median_seconds": {}}
    for axis in options.axes.split(","):
        seconds = measure(axis, options.repeats, not options.check, options.tiny)
        result["median_seconds"][axis] = {
            value: {name: statistics.median(times) for name, times in at.items()}
            for value, at in seconds.items()
        }
        result["ratios"] |= {f"{axis} {value}": ratios(at, "bare products") for value, at in seconds.items()}
    print(tables(result))
    if options.json and (RESULTS / "growth.json").is_file():
        known = stored("growth")
        result = {key: {**known[key], **result[key]} for key in result}
    store_or_check("growth", result, options.json, options.check)


if __name__ == "__main__":
    main()
