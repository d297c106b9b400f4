"""Memory that the loss operator takes beside its inputs, forward and backward, for each method; peers in the same table.

    python benchmarks/memory.py [--shape a] [--methods hpd,akl] [--json | --check]

A process each; the figure is the growth of the peak resident memory over what was resident before the first call. The bound is
what the operator must hold: the head's gradient, that of the hidden states, and two chunks of logits. Two calls, since a step of
training finds the allocator as the one before left it. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from head import SHAPES, TRL, Problem
from timing import machine, print_table, resident_mib, store_or_check

from hpd.methods import METHODS

MIB = 2**20


def bound_mib(problem: Problem) -> float:
    """Gradient of the head and of the hidden states, and two chunks of logits."""
    return 4 * (problem.weight.numel() + problem.hidden.numel() + problem.buffers.numel()) / MIB


def measure(name: str, shape: str) -> float:
    """Extra peak memory of one operator, in this process."""
    problem = Problem(SHAPES[shape])
    warm_up(shape)
    run = problem.trl(TRL[name]) if name in TRL else problem.ours(*name.split(" "))
    before = resident_mib("VmRSS")
    reset_peak()
    run()
    run()
    return resident_mib("VmHWM") - before


def warm_up(shape: str) -> None:
    """Threads and the packing buffers of matrix products, which every program with such products has."""
    width = SHAPES[shape][1]
    torch.mm(torch.ones(1024, width), torch.ones(width, 4096))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(name: str, shape: str, threads: int) -> float:
    command = [sys.executable, __file__, "--peak-of", name, "--shape", shape, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="a")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated names of METHODS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="leave out TRL's operator and the reference")
    parser.add_argument("--json", action="store_true", help="store the ratios in benchmarks/results/memory.json")
    parser.add_argument("--check", action="store_true", help="compare with the stored ratios")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(measure(options.peak_of, options.shape))
        return
    found: dict[str, dict[str, float]] = {}
    for shape in SHAPES if options.shape == "all" else [options.shape]:
        num_tokens, student, teacher, vocab = SHAPES[shape]
        bound = bound_mib(Problem(SHAPES[shape]))
        names = options.methods.split(",")
        if not options.no_peers:
            names += [*TRL, "forward_kl reference"]
        peaks = {name: peak_of(name, shape, options.threads) for name in names}
        found[shape] = {name: peak / bound for name, peak in peaks.items()}
        print(f"\nN {num_tokens}, H {student}/{teacher}, V {vocab}, bound {bound:.0f} MiB, {machine()}\n")
        rows = [["bound: gradients and two chunks", "1.00", f"{bound:.0f}"]]
        rows += [[name, f"{found[shape][name]:.2f}", f"{peak:.0f}"] for name, peak in peaks.items()]
        print_table(["operator", "x bound", "extra MiB"], rows)
    store_or_check("memory", {"machine": machine(), "ratios": found}, options.json, options.check)


if __name__ == "__main__":
    main()
