"""Time of a distillation step on 1 to 1,024 GPUs: a model of arithmetic and communication, and measurements.

    python scripts/scaling.py                          tables and docs/images/scaling.png
    python scripts/scaling.py --student-params 1.5e9 --engine fsdp2 --teacher cached_hidden --storage-gbps 5
    python scripts/scaling.py --measure                cost per token on this machine, two minutes on two
    cores

Every number of the model is a parameter (--help); the defaults and their sources are at the head of this
file. Times are per optimizer step. Communication that an engine overlaps with arithmetic counts only where it
takes longer.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "zero2", "fsdp2", "zero3")
TEACHERS = ("model", "cached_hidden", "cached_top_k", "served", "none")
GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
_BYTES_BF16, _BYTES_FP32 = 2, 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run to be predicted; field metadata is the help text."""

    student_params: float = 1.5e9
    """Parameters of the student, embeddings and head included (default: Qwen2.5-1.5B)."""
    teacher_params: float = 7.6e9
    """Parameters of the teacher (default: Qwen2.5-7B)."""
    student_hidden: int = 1536
    """Width of the student's hidden states."""
    teacher_hidden: int = 3584
    """Width of the teacher's."""
    vocab: int = 151_936
    """Rows of both heads."""
    tokens_per_gpu: int = 16_384
    """Tokens of one GPU in one micro-batch (16 rows of 1,024)."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    label_share: float = 0.6
    """Share of the tokens that are labels, and so reach the heads."""
    engine: str = "fsdp2"
    """ddp, zero2, fsdp2 or zero3."""
    teacher: str = "model"
    """model, cached_hidden, cached_top_k, served or none."""
    top_k: int = 64
    """Entries per label of a cached_top_k teacher, likeliest or drawn."""
    rollout_share: float = 0.0
    """Share of the tokens that the student writes through vLLM in the same step."""
    global_tokens: float = 0.0
    """Fix the tokens of an optimizer step (strong scaling); 0: tokens_per_gpu on each GPU (weak scaling)."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    peak_tflops: float = 989.0
    """bf16 dense, H100 SXM (NVIDIA's data sheet)."""
    mfu: float = 0.40
    """Share of the peak that training reaches; 0.38-0.43 is what Llama 3 reports on 8,192-16,384 H100s (arXiv
    2407.21783)."""
    nvlink_gbps: float = 360.0
    """GB/s per GPU of a collective within a node: 80 % of NVLink 4's 450 GB/s in each direction."""
    network_gbps: float = 40.0
    """GB/s per GPU between nodes: 80 % of a 400 Gb/s link per GPU."""
    latency_us: float = 15.0
    """Microseconds that a collective costs per doubling of its ranks; layers times this is the floor of
    sharded engines."""
    layers: int = 28
    """Units that FSDP2 and ZeRO-3 gather one by one."""
    storage_gbps: float = 20.0
    """GB/s that shared storage gives to all readers together."""
    server_network_gbps: float = 12.5
    """GB/s into each node from a served teacher: 100 Gb/s Ethernet."""
    decode_tokens_per_second: float = 6_000.0
    """Tokens per second and GPU that vLLM writes with this student (measure yours: it moves most)."""
    overlap: float = 0.8
    """Share of an engine's communication that arithmetic can hide, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}.")
        if self.teacher not in TEACHERS:
            raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}, got {self.teacher!r}.")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of an optimizer step, by what they are spent on."""

    gpus: int
    tokens: float
    compute: float
    communication: float
    """Of gradients and parameters, before overlap."""
    latency: float
    teacher_io: float
    """Reading a cache, or hidden states from a server; prefetched, so it hides behind everything else."""
    rollout: float
    """Writing, and sending the new weights to the engine."""
    total: float

    @property
    def tokens_per_gpu_second(self) -> float:
        return self.tokens / self.total / self.gpus

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        parts = {
            "arithmetic": self.compute,
            "communication": self.communication,
            "latency": self.latency,
            "teacher's data": self.teacher_io,
            "rollouts": self.rollout,
        }
        return max(parts, key=lambda name: parts[name])


def flops_per_token(setup: Setup) -> float:
    """6 per student parameter, 2 per parameter of a teacher that runs here; heads at label positions only.

    The operator multiplies with the student's head three times and with the teacher's once.
    """
    student_head = setup.vocab * setup.student_hidden
    teacher_head = setup.vocab * setup.teacher_hidden
    flops = 6.0 * (setup.student_params - student_head) + 6.0 * student_head * setup.label_share
    if setup.teacher == "model":
        flops += 2.0 * (setup.teacher_params - teacher_head)
    if setup.teacher in ("model", "cached_hidden", "served"):
        flops += 2.0 * teacher_head * setup.label_share
    return flops


def parameter_bytes(setup: Setup, gpus: int) -> float:
    r"""Bytes that each GPU sends for student and teacher in an optimizer step.

    All-reduce: :math:`2 (n - 1) / n` times the gradient's bytes. All-gather and reduce-scatter: :math:`(n -
    1) / n` each. DDP all-reduces float32 gradients; ZeRO-2 reduce-scatters them and all-gathers the new
    bfloat16 weights once a step; FSDP2 and ZeRO-3 gather bfloat16 weights for forward and backward and
    reduce-scatter bfloat16 gradients in every micro-batch, and gather the teacher once for its forward.
    """
    ring = (gpus - 1) / gpus
    student = setup.student_params
    teacher = setup.teacher_params if setup.teacher == "model" else 0.0
    if setup.engine == "ddp":
        return 2 * ring * _BYTES_FP32 * student
    if setup.engine == "zero2":
        return ring * (_BYTES_FP32 + _BYTES_BF16) * student
    return ring * setup.accumulation * _BYTES_BF16 * (3 * student + teacher)


def collective_bandwidth(setup: Setup, gpus: int) -> float:
    """Bytes per second and GPU: NVLink within a node; beyond, the slower of both, since a ring crosses the
    network."""
    within = setup.nvlink_gbps
    return 1e9 * (within if gpus <= setup.gpus_per_node else min(within, setup.network_gbps))


def teacher_bytes_per_token(setup: Setup) -> float:
    """Bytes per token of text that a teacher elsewhere sends: hidden state and logZ, or k ids with
    log-probabilities."""
    if setup.teacher in ("cached_hidden", "served"):
        return setup.label_share * (_BYTES_BF16 * setup.teacher_hidden + _BYTES_FP32)
    if setup.teacher == "cached_top_k":
        return setup.label_share * (setup.top_k * (4 + 2) + _BYTES_FP32)
    return 0.0


def predict(setup: Setup, gpus: int) -> Step:
    """The step on `gpus` GPUs.

    .. math:: t = \\max(t_{io},\\; t_{compute} + \\max(0, t_{comm} - o\\, t_{compute}) + t_{latency} +
        t_{rollout})
    """
    per_gpu = (
        setup.tokens_per_gpu * setup.accumulation if not setup.global_tokens else setup.global_tokens / gpus
    )
    tokens = per_gpu * gpus
    compute = per_gpu * flops_per_token(setup) / (setup.peak_tflops * 1e12 * setup.mfu)
    communication = parameter_bytes(setup, gpus) / collective_bandwidth(setup, gpus)
    collectives = 3 * setup.layers * setup.accumulation if setup.engine in ("fsdp2", "zero3") else 2
    latency = collectives * setup.latency_us * 1e-6 * math.log2(gpus) if gpus > 1 else 0.0
    nodes = max(1, gpus // setup.gpus_per_node)
    source = setup.storage_gbps if setup.teacher.startswith("cached") else setup.server_network_gbps * nodes
    teacher_io = tokens * teacher_bytes_per_token(setup) / (source * 1e9)
    rollout = 0.0
    if setup.rollout_share:
        sync = _BYTES_BF16 * setup.student_params / collective_bandwidth(setup, gpus) if gpus > 1 else 0.0
        rollout = per_gpu * setup.rollout_share / setup.decode_tokens_per_second + sync
    exposed = max(0.0, communication - setup.overlap * compute)
    total = max(teacher_io, compute + exposed + latency + rollout)
    return Step(
        gpus=gpus,
        tokens=tokens,
        compute=compute,
        communication=communication,
        latency=latency,
        teacher_io=teacher_io,
        rollout=rollout,
        total=total,
    )


def bytes_per_gpu(setup: Setup, gpus: int) -> float:
    """Bytes of weights, gradients and AdamW (float32 master weights) on each GPU, without activations."""
    student = setup.student_params
    teacher = setup.teacher_params if setup.teacher == "model" else 0.0
    weights, gradients, optimizer = 4.0 * student, 4.0 * student, 8.0 * student
    if setup.engine == "ddp":
        return weights + gradients + optimizer + 2.0 * teacher
    if setup.engine == "zero2":
        return 2.0 * student + (weights + gradients + optimizer) / gpus + 2.0 * teacher
    return (weights + gradients + optimizer + 2.0 * teacher) / gpus


def table(setup: Setup, gpus: Sequence[int] = GPUS) -> str:
    """Markdown: one line per number of GPUs."""
    lines = [
        "| GPUs | ms/step | arithmetic | communication | latency | teacher's data | rollouts | tokens/s/GPU "
        "| GB/GPU | bound by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for count in gpus:
        step = predict(setup, count)
        times = (step.total, step.compute, step.communication, step.latency, step.teacher_io, step.rollout)
        cells = " | ".join(f"{1e3 * seconds:,.0f}" for seconds in times)
        memory = bytes_per_gpu(setup, count) / 1e9
        lines.append(
            f"| {count:,} | {cells} | {step.tokens_per_gpu_second:,.0f} | {memory:,.1f} | {step.bound} |"
        )
    return "\n".join(lines)


CASES: dict[str, Setup] = {
    "DDP, teacher with the student": Setup(engine="ddp"),
    "FSDP2, teacher sharded": Setup(engine="fsdp2"),
    "ZeRO-2, teacher with the student": Setup(engine="zero2"),
    "FSDP2, 72B teacher": Setup(
        engine="fsdp2",
        teacher_params=72.7e9,
        teacher_hidden=8192,
        layers=80,
        student_params=7.6e9,
        student_hidden=3584,
    ),
    "FSDP2, cached hidden states": Setup(engine="fsdp2", teacher="cached_hidden"),
    "FSDP2, cached top-64": Setup(engine="fsdp2", teacher="cached_top_k"),
    # Of n drawn tokens as many bytes are stored as of the n likeliest.
    "FSDP2, cached draws (8)": Setup(engine="fsdp2", teacher="cached_top_k", top_k=8),
    "FSDP2, served teacher": Setup(engine="fsdp2", teacher="served"),
    "FSDP2, half the tokens written by the student": Setup(engine="fsdp2", rollout_share=0.5),
    "FSDP2, 1 M tokens a step whatever the GPUs": Setup(engine="fsdp2", global_tokens=2**20),
}


def summary(gpus: Sequence[int] = (8, 64, 128, 256, 1024)) -> str:
    """Markdown: tokens per second and GPU of every case, with what bounds it."""
    lines = [
        f"| tokens/s/GPU on | {' | '.join(f'{count:,} GPUs' for count in gpus)} | GB/GPU on {gpus[0]}, "
        f"{gpus[-1]:,} |",
        "|---" * (len(gpus) + 2) + "|",
    ]
    for name, setup in CASES.items():
        steps = [predict(setup, count) for count in gpus]
        cells = " | ".join(f"{step.tokens_per_gpu_second:,.0f} ({step.bound})" for step in steps)
        memory = ", ".join(f"{bytes_per_gpu(setup, count) / 1e9:.1f}" for count in (gpus[0], gpus[-1]))
        lines.append(f"| {name} | {cells} | {memory} |")
    return "\n".join(lines)


def plot(path: Path) -> None:
    """Tokens per second and GPU against GPUs, one line per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = ["o-", "s-", "D--", "^-", "v--", "x:", "+:", "P-.", "*-", "h:"]
    figure, axes = pyplot.subplots(figsize=(8.5, 4.6))
    for style, (name, setup) in zip(styles, CASES.items(), strict=True):
        counts = [gpus for gpus in GPUS if gpus >= 8]
        axes.plot(
            counts,
            [predict(setup, gpus).tokens_per_gpu_second for gpus in counts],
            style,
            label=name,
            markersize=5,
        )
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens / second / GPU")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_yticks(rates := (2_000, 5_000, 10_000, 20_000, 40_000), [f"{rate:,}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.set_title("A model, not a measurement: H100, assumptions in docs/evidence/scaling.md", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def measured(found: dict) -> str:
    """Markdown tables of what scripts/scaling_measure.py found, with the arithmetic rate that the formula
    above implies."""
    lines = [
        "| width | parameters | processes | ms/step | ms/token (all processes) | GFLOP/s a process |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found["steps"]:
        width, tokens = entry["width"], entry["tokens"]
        setup = Setup(
            student_params=entry["parameters"],
            teacher_params=entry["parameters"],
            student_hidden=width,
            teacher_hidden=width,
            vocab=8192,
            label_share=1.0,
            engine="ddp",
        )
        rate = flops_per_token(setup) * tokens / entry["seconds"] / 1e9
        per_token = 1e3 * entry["seconds"] / (tokens * entry["processes"])
        lines.append(
            f"| {width} | {entry['parameters'] / 1e6:.1f} M | {entry['processes']} | "
            f"{1e3 * entry['seconds']:.0f} | {per_token:.2f} | {rate:.1f} |"
        )
    lines += ["", "| cached hidden states | GB/s | tokens/s |", "|---|---|---|"]
    lines += [
        f"| width {e['width']} | {e['gb_per_second']:.2f} | {e['tokens_per_second']:,.0f} |"
        for e in found["cache"]
    ]
    return "\n".join(lines)


def _help_texts() -> dict[str, str]:
    """The string under each field of `Setup`."""
    body = ast.parse(inspect.getsource(Setup)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: text.value.value  # type: ignore[union-attr]
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = _help_texts()
    for field in dataclasses.fields(Setup):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=kind, help=f"{texts[field.name]} Default: {field.default}.".replace("%", "%%")
        )
    parser.add_argument(
        "--measure", action="store_true", help="Measure this machine instead of predicting others."
    )
    parser.add_argument(
        "--plot", type=Path, default=ROOT / "docs/images/scaling.png", help="Where the picture goes."
    )
    return parser


def main() -> None:
    arguments = vars(_parser().parse_args())
    picture, measure = arguments.pop("plot"), arguments.pop("measure")
    if measure:
        sys.path.insert(0, str(Path(__file__).parent))
        from scaling_measure import measure_all

        print(measured(measure_all()))
        return
    changed = {name: value for name, value in arguments.items() if value is not None}
    if changed:
        print(table(Setup(**changed)))
        return
    print(summary() + "\n")
    for name, setup in CASES.items():
        print(f"### {name}\n\n{table(setup)}\n")
    plot(picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
