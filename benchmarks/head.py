"""Time of the loss operator beside the bare matrix products, TRL's operator and our own reference.

    python benchmarks/head.py [--shape a] [--repeats 5] [--methods hpd,akl] [--json | --check]
    python benchmarks/head.py --device cuda --dtype bfloat16    # an accelerator: printed, never stored
    python benchmarks/head.py --docs    # docs/performance.md from the stored result, nothing measured
    python benchmarks/head.py --shape tiny    # in a second: whether it runs

The floor is the products that no method can do without, in the same chunks: three with the student's head
(logits, gradient of the hidden states, gradient of the head), one with the teacher's. Run it on an idle
machine with OMP_WAIT_POLICY=PASSIVE. In bfloat16 the floor's logits are float32, as the operator's are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peers import peers
from timing import (
    check_tiny,
    count,
    interleaved,
    machine,
    methods_to_measure,
    ratios,
    replace_block,
    spread,
    store_or_check,
    stored,
    table,
)
from torch import Tensor

from hpd.batch import uniforms
from hpd.losses import Head, Scores, reweighted_nll
from hpd.losses.operator import METRIC_STRIDE, default_chunk_bytes
from hpd.losses.products import add_product_, chunk_rows, product_
from hpd.methods import method_terms, name_terms

# label positions, hidden size of student and teacher, vocabulary
SHAPES = {
    "a": (1024, 576, 576, 49152),
    "b": (512, 896, 1536, 151936),
    "small": (256, 256, 256, 16384),
    "tiny": (24, 8, 12, 96),
    # A batch of a 1.5B student and a 7B teacher, for a GPU.
    "large": (8192, 1536, 3584, 151936),
}
STORED = ("a", "b")


class Problem:
    """Random hidden states and heads of one shape."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        seed: int = 0,
        chunk_bytes: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        num_tokens, student, teacher, vocab = shape
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

        self.hidden = normal(num_tokens, student).requires_grad_()
        self.weight = normal(vocab, student, scale=student**-0.5).requires_grad_()
        self.teacher_hidden = normal(num_tokens, teacher)
        self.teacher_weight = normal(vocab, teacher, scale=teacher**-0.5)
        self.labels = torch.randint(vocab, (num_tokens,), generator=generator, device=device)
        self.uniforms = uniforms(torch.arange(num_tokens), seed=0, step=0, count=1).to(device)
        self.chunk_bytes = chunk_bytes or default_chunk_bytes(device)
        self.rows = chunk_rows(num_tokens, 4 * vocab, self.chunk_bytes)
        self.buffers = torch.empty(2, self.rows, vocab, device=device)

    def floor(self) -> None:
        hidden, weight = self.hidden.detach(), self.weight.detach()
        wide = {"dtype": torch.float32, "device": hidden.device}
        grad_hidden, grad_weight = torch.empty(hidden.shape, **wide), torch.empty(weight.shape, **wide)
        for start in range(0, len(hidden), self.rows):
            chunk = slice(start, start + self.rows)
            student, teacher = self.buffers[:, : len(hidden[chunk])]
            product_(hidden[chunk], weight.T, student)
            product_(self.teacher_hidden[chunk], self.teacher_weight.T, teacher)
            gradient = student.to(hidden.dtype)
            product_(gradient, weight, grad_hidden[chunk])
            (product_ if start == 0 else add_product_)(gradient.T, hidden[chunk], grad_weight)

    def operator(self, method: str, impl: str = "chunked") -> Callable[[], None]:
        terms = name_terms(method_terms(method, {}))

        def run() -> None:
            self.hidden.grad = self.weight.grad = None
            reweighted_nll(
                Scores(self.hidden, Head(self.weight)),
                Scores(self.teacher_hidden, Head(self.teacher_weight)),
                self.labels,
                terms,
                uniforms=self.uniforms,
                scale=1 / len(self.labels),
                impl=impl,
                chunk_bytes=self.chunk_bytes,
                metric_stride=METRIC_STRIDE,
            ).loss.backward()

        return run


def measure(
    shape: str,
    methods: list[str],
    repeats: int,
    others: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Ratios to the floor and the seconds behind them."""
    problem = Problem(SHAPES[shape], device=device, dtype=dtype)
    candidates: dict[str, Callable[[], None]] = {
        "floor": problem.floor,
        **{m: problem.operator(m) for m in methods},
    }
    if others:
        found, left_out = peers(problem)
        for name, why in left_out.items():
            print(f"left out: {name} ({why})")
        candidates |= found
        candidates["reference forward_kl"] = problem.operator("forward_kl", "reference")
    seconds = interleaved(candidates, repeats, device)
    return ratios(seconds, "floor"), seconds


def tables(result: dict[str, Any]) -> str:
    """A stored result as docs/performance.md shows it."""
    place = result["machine"]
    said = [
        place.get("device", place["cpu"]),
        f"{place['threads']} threads",
        f"torch {place['torch']}",
        place.get("date"),
    ]
    parts = [", ".join(filter(None, said)) + "."]
    for shape, found in result["ratios"].items():
        num_tokens, student, teacher, vocab = SHAPES[shape]
        seconds = result.get("seconds", {}).get(shape, {})
        rows = [
            [name, f"{ratio:.2f}", *(spread(seconds[name], 1e3, 0) if name in seconds else ["", ""])]
            for name, ratio in found.items()
        ]
        parts.append(
            f"Shape {shape}: {num_tokens:,} label positions, hidden size {student} (teacher {teacher}), "
            f"vocabulary {vocab:,}."
        )
        parts.append(table(["operator", "x floor", "median ms", "range ms"], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--methods", help="comma-separated names of METHODS; all, or with --check the stored")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--no-peers", action="store_true", help="leave out other people's operators and the reference"
    )
    parser.add_argument(
        "--json", action="store_true", help="store the ratios in benchmarks/results/head.json"
    )
    parser.add_argument("--check", action="store_true", help="compare our own with the stored ratios")
    parser.add_argument(
        "--docs", action="store_true", help="write the stored ratios into docs/performance.md, and stop"
    )
    options = parser.parse_args()
    check_tiny(parser, options, options.shape == "tiny")
    if options.docs:
        replace_block("head table", tables(stored("head")))
        return
    if options.device == "cpu" and options.dtype != "float32":
        parser.error("on a CPU the operator multiplies in float32: --dtype bfloat16 needs --device cuda.")
    if options.device != "cpu" and (options.json or options.check):
        parser.error("the stored ratios are a CPU's: --json and --check need --device cpu.")
    if options.device != "cpu" and not torch.accelerator.is_available():
        parser.error(f"there is no accelerator here, so --device {options.device} cannot be measured.")
    torch.set_num_threads(options.threads)
    methods = methods_to_measure("head", options.methods, options.check)
    result: dict[str, Any] = {"machine": machine(options.device), "ratios": {}, "seconds": {}}
    for shape in STORED if options.shape == "all" else [options.shape]:
        result["ratios"][shape], result["seconds"][shape] = measure(
            shape,
            methods,
            options.repeats,
            not (options.no_peers or options.check),
            options.device,
            getattr(torch, options.dtype),
        )
    print(tables(result))
    result["methods"] = result["ratios"].get("a", next(iter(result["ratios"].values())))
    store_or_check("head", result, options.json, options.check)


if __name__ == "__main__":
    main()
