"""Memory of the loss operator beside its inputs, forward and backward, for each method and its peers.

    python benchmarks/memory.py [--shape a] [--methods hpd,akl] [--json | --check]
    python benchmarks/memory.py --docs    # docs/performance.md from the stored result, nothing measured
    python benchmarks/memory.py --shape tiny    # in a moment: whether it runs

The bound is what the operator must hold: gradients of head and hidden states, and two chunks of logits.
`allocated` adds up the tensors that are alive, as an accelerator's allocator would; `resident` is the growth
of the process's peak resident memory, which also has the workspace of matrix products and what malloc keeps.
A process each; Linux only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import torch
from head import SHAPES, STORED, Problem
from peers import peers
from timing import (
    check_tiny,
    machine,
    methods_to_measure,
    replace_block,
    resident_mib,
    store_or_check,
    stored,
    table,
)

from hpd.estimate.live_bytes import LiveBytes
from hpd.losses.chunked import _cpu_scratch

MIB = 2**20
PRODUCTS = "bare products"


def bound_mib(problem: Problem) -> float:
    """Gradient of the head and of the hidden states, and two chunks of logits."""
    return 4 * (problem.weight.numel() + problem.hidden.numel() + problem.buffers.numel()) / MIB


def measure(name: str, shape: str) -> tuple[float, float]:
    """MiB allocated and resident at the peak of one operator, in this process."""
    problem = Problem(SHAPES[shape])
    # Threads and packing buffers, which every program with matrix products has.
    torch.mm(torch.ones(1024, SHAPES[shape][1]), torch.ones(SHAPES[shape][1], 4096))
    others, _ = peers(problem)
    if name == PRODUCTS:
        operator = problem.floor
    else:
        operator = others[name] if name in others else problem.operator(*name.split(" "))
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    operator()
    operator()
    resident = resident_mib("VmHWM") - before
    problem.hidden.grad = problem.weight.grad = None
    _cpu_scratch.clear()
    with LiveBytes() as live:
        operator()
    # The products' own chunks were made with the problem.
    kept = problem.buffers.numel() * 4 if name == PRODUCTS else 0
    return (live.peak + kept) / MIB, resident


def peaks_of(name: str, shape: str, threads: int) -> list[float]:
    command = [sys.executable, __file__, "--peak-of", name, "--shape", shape, "--threads", str(threads)]
    done = run(command, capture_output=True, text=True, check=True)
    return [float(figure) for figure in done.stdout.split()[-2:]]


def tables(result: dict[str, Any]) -> str:
    """A stored result as docs/performance.md shows it."""
    parts = []
    for shape, peaks in result["mib"].items():
        num_tokens, student, teacher, vocab = SHAPES[shape]
        bound = result["bound_mib"][shape]
        parts.append(
            f"Shape {shape}: {num_tokens:,} label positions, hidden size {student} (teacher {teacher}), "
            f"vocabulary {vocab:,}; bound {bound:.0f} MiB."
        )
        rows = [[name, f"{a / bound:.2f}", f"{a:.0f}", f"{r:.0f}"] for name, (a, r) in peaks.items()]
        parts.append(table(["operator", "allocated x bound", "allocated MiB", "resident MiB"], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="a")
    parser.add_argument("--methods", help="comma-separated names of METHODS; all, or with --check the stored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="leave out TRL's operator and the reference")
    parser.add_argument(
        "--json", action="store_true", help="store the ratios in benchmarks/results/memory.json"
    )
    parser.add_argument("--check", action="store_true", help="compare our own with the stored ratios")
    parser.add_argument(
        "--docs", action="store_true", help="write the stored result into docs/performance.md, and stop"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_tiny(parser, options, options.shape == "tiny")
    torch.set_num_threads(options.threads)
    if options.docs:
        replace_block("memory table", tables(stored("memory")))
        return
    if options.peak_of:
        print(*measure(options.peak_of, options.shape))
        return
    methods = methods_to_measure("memory", options.methods, options.check)
    result: dict[str, Any] = {"machine": machine(), "bound_mib": {}, "mib": {}, "ratios": {}}
    for shape in STORED if options.shape == "all" else [options.shape]:
        result["bound_mib"][shape] = bound = bound_mib(Problem(SHAPES[shape]))
        names = [PRODUCTS, *methods]
        if not (options.no_peers or options.check):
            names += [*peers(Problem(SHAPES["tiny"]))[0], "forward_kl reference"]
        peaks = {name: peaks_of(name, shape, options.threads) for name in names}
        result["mib"][shape] = peaks
        result["ratios"][shape] = {name: allocated / bound for name, (allocated, _) in peaks.items()}
    print(tables(result))
    store_or_check("memory", result, options.json, options.check)


if __name__ == "__main__":
    main()
