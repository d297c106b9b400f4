"""Shared by the benchmarks: interleaved timing, the machine's description, tables, and stored ratios."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hpd.methods import METHODS, name_terms

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = RESULTS.parent.parent / "docs" / "performance.md"
# A machine that other work shares drifts by this much between runs.
MARGIN = 0.15


def count(text: str) -> int:
    """An argument that is at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def check_tiny(parser: argparse.ArgumentParser, options: argparse.Namespace, tiny: bool) -> None:
    """Tiny shapes show that a script runs; their ratios say nothing."""
    if tiny and (options.json or options.check or options.docs):
        parser.error("tiny shapes are neither stored nor compared: leave --json, --check and --docs out.")


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each candidate, in rounds, so that drift of the machine hits all alike; one round before is
    not counted. An accelerator is waited for."""

    def wait() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Median over the rounds of each candidate's time relative to `base` in the same round."""
    return {
        name: statistics.median(t / b for t, b in zip(times, seconds[base], strict=True))
        for name, times in seconds.items()
    }


def spread(values: list[float], factor: float = 1.0, digits: int = 2) -> list[str]:
    """Median and range, for a row of a table."""
    low, middle, high = (factor * f(values) for f in (min, statistics.median, max))
    return [f"{middle:.{digits}f}", f"{low:.{digits}f}-{high:.{digits}f}"]


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine, as far as a reader needs it to place the numbers."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    accelerator = {"device": torch.cuda.get_device_name()} if device.startswith("cuda") else {}
    return accelerator | {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, as docs/performance.md shows it."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print(table(header, rows))


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process; getrusage's peak survives exec and would be the
    parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def replace_block(name: str, text: str) -> None:
    """Rewrite what stands between `<!-- name -->` and `<!-- end -->` in docs/performance.md."""
    page = DOCS.read_text(encoding="utf-8")
    start, found, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not found or not end:
        sys.exit(f"{DOCS} has no block <!-- {name} --> ... <!-- end -->.")
    DOCS.write_text(f"{start}{found}{text}\n{end}{after}", encoding="utf-8")


def stored(name: str) -> dict[str, Any]:
    """The result that a benchmark stored with --json."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path} does not exist: measure first, with --json.")
    return json.loads(path.read_text())


def methods_to_measure(name: str, given: str | None, check: bool) -> list[str]:
    """The methods given, or those that a check can compare, or all. A check leaves out the other operators:
    that they got slower says nothing of ours, and they take most of the time."""
    if given:
        return given.split(",")
    known = {key for found in stored(name)["ratios"].values() for key in found} if check else METHODS
    return [method for method in METHODS if method in known and _is_of_positions(method)]


def _is_of_positions(method: str) -> bool:
    """False for methods that need whole rows or two tokenizers: here are label positions only."""
    return not any(term.positions or term.support.pairs for term in name_terms(METHODS[method].terms))


def store_or_check(name: str, result: dict[str, Any], store: bool, check: bool) -> None:
    """Write results/NAME.json, or compare its ratios with the new ones (exit code 1 where one got worse by
    the margin)."""
    path = RESULTS / f"{name}.json"
    if store:
        path.write_text(json.dumps(result, indent=2) + "\n")
    if check:
        known = stored(name)["ratios"]
        worse = [
            f"{shape} {key}: {new[key]:.2f}, stored {old[key]:.2f}"
            for shape, old in known.items()
            if (new := result["ratios"].get(shape))
            for key in old
            if key in new and new[key] > old[key] * (1 + MARGIN)
        ]
        if worse:
            sys.exit("worse than stored by more than 15 %: " + "; ".join(worse))
