"""What the gradient filter costs and saves on real text: time beside the bare products, error, live columns.

    python benchmarks/filtered.py MODEL ROWS [--positions 1024] [--hidden 1536] [--repeats 5] [--json]
    python benchmarks/filtered.py --docs    # docs/performance.md from the stored results, nothing measured
    python benchmarks/filtered.py --tiny    # in a second, on random numbers: whether it runs

MODEL is a folder that teaches a student which is the same model with noise in its matrices: much of it
early in training, little late. ROWS is a JSON Lines file with text in any of its columns. `--hidden` pads the
hidden states and the head with zeros to a larger size, which leaves the gradient of the logits as it is: the
products of a larger model at the sparsity of real text. Errors are Frobenius norms relative to the exact
gradient; rounding that gradient to bfloat16 costs 1.7e-3. Run it on an idle machine with
OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from timing import RESULTS, count, interleaved, machine, ratios, replace_block, store_or_check, stored, table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.batch import uniforms
from hpd.losses import Head, Scores, reweighted_nll
from hpd.losses.heads import head_of
from hpd.losses.operator import METRIC_STRIDE, default_chunk_bytes
from hpd.losses.products import chunk_rows
from hpd.methods import method_terms, name_terms

METHODS = ("hpd", "forward_kl", "reverse_kl")
SHARES = (0.0, 2e-5, 5e-5, 1e-4)
NOISE = {"early": 0.25, "middle": 0.12, "late": 0.04}
"""Standard deviation of what is added to a matrix of the student, over that of its entries."""


class Text(NamedTuple):
    """Hidden states over one text."""

    teacher: Tensor
    student: Tensor
    labels: Tensor


def read_text(folder: str, rows: Path, positions: int, noise: float) -> tuple[Text, Tensor]:
    """Hidden states of the model and of its noisy copy, and the head that both have."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = load_dataset("json", data_files=str(rows), split="train")
    texts = (" ".join(str(value) for value in row.values()) for row in read)
    found: list[tuple[Tensor, Tensor]] = []
    chosen, total = [], 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
        chosen.append(ids)
        total += ids.shape[1] - 1
        if total >= positions:
            break
    head = None
    for scale in (0.0, noise):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, matrix in model.named_parameters():
                if matrix.dim() == 2 and "embed" not in name and "lm_head" not in name:
                    matrix += torch.randn(matrix.shape, generator=generator) * matrix.std() * scale
            hidden = torch.cat([model.model(ids)[0][0, :-1] for ids in chosen])[:positions]
        head = head_of(model).weight
        found.append((hidden, torch.cat([ids[0, 1:] for ids in chosen])[:positions]))
    assert head is not None
    return Text(found[0][0], found[1][0], found[0][1]), head.detach()


def random_text(positions: int = 24, hidden: int = 8, vocab: int = 96) -> tuple[Text, Tensor]:
    """For --tiny."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, positions, hidden, generator=generator)
    return Text(teacher, student, torch.arange(positions) % vocab), torch.randn(
        vocab, hidden, generator=generator
    )


class Problem:
    """The operator on one text, and the floor."""

    def __init__(self, text: Text, head: Tensor, hidden: int | None):
        def padded(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, max((hidden or 0) - tensor.shape[1], 0)))

        self.teacher, self.student = padded(text.teacher), padded(text.student).requires_grad_()
        self.teacher_head, self.head = padded(head), padded(head).clone().requires_grad_()
        self.labels = text.labels
        self.uniforms = uniforms(torch.arange(len(self.labels)), seed=0, step=0, count=1)
        self.rows = chunk_rows(len(self.labels), 4 * len(head), default_chunk_bytes("cpu"))
        self.buffers = torch.empty(2, self.rows, len(head))

    def floor(self) -> None:
        hidden, weight = self.student.detach(), self.head.detach()
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        for start in range(0, len(hidden), self.rows):
            chunk = slice(start, start + self.rows)
            student, teacher = self.buffers[:, : len(hidden[chunk])]
            torch.mm(hidden[chunk], weight.T, out=student)
            torch.mm(self.teacher[chunk], self.teacher_head.T, out=teacher)
            torch.mm(student, weight, out=grad_hidden[chunk])
            if start == 0:
                torch.mm(student.T, hidden[chunk], out=grad_weight)
            else:
                grad_weight.addmm_(student.T, hidden[chunk])

    def operator(self, method: str, share: float) -> Callable[[], dict[str, float]]:
        terms = name_terms(method_terms(method, {}))

        def run() -> dict[str, float]:
            self.student.grad = self.head.grad = None
            output = reweighted_nll(
                Scores(self.student, Head(self.head)),
                Scores(self.teacher, Head(self.teacher_head)),
                self.labels,
                terms,
                uniforms=self.uniforms,
                scale=1 / len(self.labels),
                metric_stride=METRIC_STRIDE,
                gradient_filter=share,
            )
            output.loss.backward()
            stats = output.stats
            live = stats.get("gradient_live", stats["tokens"]) / stats["tokens"]
            return {"live": float(live), "kl": float(stats["forward_kl"] / stats["metric_tokens"])}

        return run


def measure(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """A line for each method and share."""
    runs = {f"{m} {t:g}": problem.operator(m, t) for m in METHODS for t in SHARES}
    seconds = interleaved({"floor": problem.floor, **runs}, repeats)
    found, times = [], ratios(seconds, "floor")
    for method in METHODS:
        exact: list[Tensor] = []
        for share in SHARES:
            stats = runs[f"{method} {share:g}"]()
            got = [problem.student.grad, problem.head.grad]
            assert all(gradient is not None for gradient in got)
            exact = exact or [g.clone() for g in got]
            errors = [float((g - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)]
            line = {"method": method, "share": share, "time": times[f"{method} {share:g}"]}
            found.append({**line, **stats, "hidden": errors[0], "head": errors[1]})
    return found


def tables(result: dict[str, Any]) -> str:
    """Stored results as docs/performance.md shows them."""
    parts = []
    header = ["student", "KL", "method", "share", "x floor", "live", "error, hidden", "error, head"]
    for shape, measured in result["shapes"].items():
        place = measured["machine"]
        rows = [
            [
                stage,
                f"{line['kl']:.2g}",
                f"`{line['method']}`",
                f"{line['share']:g}" if line["share"] else "off",
                f"{line['time']:.2f}",
                f"{line['live']:.0%}",
                f"{line['hidden']:.1e}" if line["share"] else "",
                f"{line['head']:.1e}" if line["share"] else "",
            ]
            for stage, lines in measured["stages"].items()
            for line in lines
        ]
        threads = "1 thread" if place["threads"] == 1 else f"{place['threads']} threads"
        where = f"{place['cpu']}, {threads}, torch {place['torch']}, {place['date']}"
        parts += [f"{shape} ({where}):", table(header, rows)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("rows", nargs="?", type=Path)
    parser.add_argument("--positions", type=count, default=1024)
    parser.add_argument("--hidden", type=count, help="pad the hidden size with zeros to this one")
    parser.add_argument("--stages", default=",".join(NOISE), help="of " + ", ".join(NOISE))
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--json", action="store_true", help="add to benchmarks/results/filtered.json")
    parser.add_argument(
        "--docs", action="store_true", help="write the stored results into the page, and stop"
    )
    parser.add_argument("--tiny", action="store_true", help="random numbers: whether the script runs")
    options = parser.parse_args()
    if options.docs:
        replace_block("filter table", tables(stored("filtered")))
        return
    if options.tiny == bool(options.model) or (options.model and options.rows is None):
        parser.error("give MODEL and ROWS, or --tiny alone.")
    if options.tiny and options.json:
        parser.error("tiny shapes are not stored: leave --json out.")
    if unknown := set(options.stages.split(",")) - NOISE.keys():
        parser.error(f"--stages are of {', '.join(NOISE)}, got {', '.join(sorted(unknown))}.")
    torch.set_num_threads(options.threads)
    stages: dict[str, list[dict[str, Any]]] = {}
    for stage in options.stages.split(","):
        noise = NOISE[stage]
        made = (
            random_text()
            if options.tiny
            else read_text(options.model, options.rows, options.positions, noise)
        )
        problem = Problem(*made, options.hidden)
        stages[stage] = measure(problem, options.repeats)
    name = "tiny" if options.tiny else Path(options.model).name
    hidden = problem.head.shape[1]
    shape = f"{name}, {len(problem.labels):,} positions, H {hidden:,}, V {len(problem.head):,}"
    measured = {"machine": machine(), "stages": stages}
    result = {"machine": machine(), "shapes": {shape: measured}, "ratios": {}}
    print(tables(result))
    if options.json:
        if (RESULTS / "filtered.json").is_file():
            result["shapes"] = {**stored("filtered")["shapes"], **result["shapes"]}
        store_or_check("filtered", result, True, False)


if __name__ == "__main__":
    main()
