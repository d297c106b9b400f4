"""What distilling costs beside fine-tuning: steps and buffers relative to our own `sft`, and whole runs of
ten epochs with the cache's writing in them (the comparison of the paper's Table 6).

    python benchmarks/epochs.py [--repeats 5] [--json]                     # steps and buffers
    python benchmarks/epochs.py --recipe RECIPE data.limit=16 [--json]     # whole runs too
    python benchmarks/epochs.py --docs    # docs/performance.md from the stored result, nothing measured
    python benchmarks/epochs.py --tiny    # in seconds: whether it runs

Steps are those of benchmarks/step.py: 2 rows of 512 tokens, a student of SmolLM2's shape cut to 10 layers, a
teacher of its 30. `sft` reads a cached teacher for its metrics, on every 16th position; what that costs is
in it, the cache's writing is not. Buffers are what is alive at the peak of the loss operator on the labels of
such a step, beyond its inputs and the gradients of hidden states and head. RECIPE names student, teacher and
data; its method, epochs, output and cache are set here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from head import Problem
from step import LABELED, ROWS, SMOLLM2, TINY, Shape, candidate
from timing import (
    check_tiny,
    count,
    interleaved,
    machine,
    ratios,
    replace_block,
    spread,
    store_or_check,
    stored,
    table,
)

from hpd.config import load_recipe
from hpd.estimate.live_bytes import LiveBytes
from hpd.losses.chunked import _cpu_scratch
from hpd.training.caching import write_cache
from hpd.training.run import train

BASE = "sft (cached)"
METHODS = ("hpd", "forward_kl", "akl", "abkd")
MIB = 2**20


def steps(shape: Shape, methods: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of `sft`, and of each method with a live teacher and with a cached one."""
    with tempfile.TemporaryDirectory() as folder:
        return interleaved({name: candidate(name, folder, shape) for name in _names(methods)}, repeats)


def buffers_mib(shape: Shape, method: str, impl: str = "chunked") -> float:
    """MiB that the operator holds at its peak beyond what it is given and the gradients it leaves."""
    positions = int(ROWS * shape.tokens * LABELED)
    problem = Problem((positions, shape.student.hidden, shape.teacher.hidden, shape.vocab))
    operator = problem.operator(method, impl)
    operator()
    problem.hidden.grad = problem.weight.grad = None
    _cpu_scratch.clear()
    with LiveBytes() as live:
        operator()
    return (live.peak - 4 * (problem.hidden.numel() + problem.weight.numel())) / MIB


def whole_runs(
    recipe: str, overrides: list[str], methods: list[str], epochs: int
) -> dict[str, dict[str, float]]:
    """Seconds of whole runs, from loading to the saved student: `train`, and `cache` where one is written."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = [*overrides, f"train.num_train_epochs={epochs}", "train.save_strategy=no", "eval=null"]
        cache = f"{folder}/cache"
        # One serves all methods; each but the base has its whole cost.
        written = _seconds(write_cache, load_recipe(recipe, [*common, f"cache={{path: {cache}}}"]))
        for name in _names(methods):
            method, *how = name.split(" ")
            given = [*common, f"method={method}", f"output_dir={folder}/{name.replace(' ', '-')}"]
            given += ["teacher=null", "teacher.type=cached", f"teacher.path={cache}"] if how else []
            trained = _seconds(train, load_recipe(recipe, given), baselines=False)
            found[name] = {"cache": written if how and name != BASE else 0.0, "train": trained}
            print(f"{name}: {found[name]}", flush=True)
    return found


def _names(methods: list[str]) -> list[str]:
    return [BASE, *(f"{method}{how}" for method in methods for how in ("", " (cached)"))]


def _seconds(run: Any, *given: Any, **options: Any) -> float:
    started = time.perf_counter()
    run(*given, **options)
    return time.perf_counter() - started


def tables(result: dict[str, Any]) -> str:
    """A stored result as docs/performance.md shows it."""
    place, whole = result["machine"], result.get("whole")
    rows = [
        [name, f"{ratio:.2f}", *spread(result["seconds"][name]), f"{result['buffers_mib'][name]:.0f}"]
        for name, ratio in result["ratios"]["step"].items()
    ]
    parts = [
        f"{place['cpu']}, {place['threads']} threads, torch {place['torch']}, {place['date']}.",
        table(["step", "x sft (cached)", "median s", "range s", "buffers MiB"], rows),
    ]
    if whole:
        base = whole["seconds"][BASE]["train"]
        lines = [
            [
                name,
                f"{(line['cache'] + line['train']) / base:.2f}",
                f"{line['cache']:.0f}" if line["cache"] else "",
                f"{line['train']:.0f}",
            ]
            for name, line in whole["seconds"].items()
        ]
        header = [f"{whole['epochs']} epochs", "x sft (cached)", "cache s", "train s"]
        parts.append(table(header, lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the recipe, as in `hpd train`")
    parser.add_argument("--recipe", help="measure whole runs of this recipe's pair and data too")
    parser.add_argument("--epochs", type=count, default=10)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--json", action="store_true", help="store in benchmarks/results/epochs.json")
    parser.add_argument("--check", action="store_true", help="compare with the stored ratios")
    parser.add_argument(
        "--docs", action="store_true", help="write the stored result into docs/performance.md, and stop"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether the script runs")
    options = parser.parse_intermixed_args()
    check_tiny(parser, options, options.tiny)
    if options.overrides and not options.recipe:
        parser.error("overrides change a recipe: give --recipe.")
    if options.docs:
        replace_block("epochs table", tables(stored("epochs")))
        return
    torch.set_num_threads(options.threads)
    shape, methods = TINY if options.tiny else SMOLLM2, options.methods.split(",")
    seconds = steps(shape, methods, options.repeats)
    buffers = {name: buffers_mib(shape, name.split(" ")[0]) for name in seconds}
    result: dict[str, Any] = {"machine": machine(), "seconds": seconds, "buffers_mib": buffers}
    result["ratios"] = {"step": ratios(seconds, BASE)}
    if options.recipe:
        found = whole_runs(options.recipe, options.overrides, methods, options.epochs)
        result["whole"] = {"epochs": options.epochs, "seconds": found}
    print(tables(result))
    store_or_check("epochs", result, options.json, options.check)


if __name__ == "__main__":
    main()
