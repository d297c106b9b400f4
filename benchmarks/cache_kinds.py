"""Kinds of caches side by side: bytes a position, bias and spread of the teacher's distribution, time.

    python benchmarks/cache_kinds.py --teacher models/smollm2-135m --student models/smollm2-135m-10l \\
        --data train.jsonl.gz

The teacher is asked once about GSM8K rows; each kind stores its answers, which are read as training reads
them.
Against the teacher's own distribution p, for the estimate P that a kind gives:

    bias      total variation of E P and p, mean over positions: it stays, however many positions are averaged
    spread    sqrt(sum_v Var P_v), mean over positions: it averages out, as 1 / sqrt(positions)

The gradient of the forward KL with respect to the logits is q - P, so both are those of the gradient. Kinds
without draws have no spread. Of kind sampled E P - p is the rounding of the stored weights, over `--seeds`
seeds; its spread is that over the seeds. Independent draws with counts (Sparse Logit Sampling, 3 bytes for
each distinct token and its count) are by formula: they are not a kind of hpd, and stand for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from torch import Tensor

from hpd.batch import token_batch
from hpd.config.models import ModelConfig
from hpd.config.schema import CacheConfig
from hpd.losses import Head, Scores, reweighted_nll
from hpd.losses.products import logits
from hpd.losses.teacher_side import teacher_logits
from hpd.methods import method_terms, name_terms
from hpd.models.forward import add_head_function, scores_of
from hpd.models.load import load_model, load_tokenizer
from hpd.teachers import ModelTeacher
from hpd.teachers.cached import scores_of_stored
from hpd.training.shards import TeacherAnswer, stored_tensors

KINDS: dict[str, dict[str, Any]] = {
    "hidden float32": {"dtype": "float32"},
    "hidden bfloat16": {"dtype": "bfloat16"},
    "hidden float16": {"dtype": "float16"},
    "hidden int8": {"dtype": "int8"},
    **{f"top_k {k}, float16": {"kind": "top_k", "top_k": k, "dtype": "float16"} for k in (8, 64)},
    **{f"sampled {n}, float16": {"kind": "sampled", "draws": n, "dtype": "float16"} for n in (4, 8, 16, 32)},
    "sampled 8, float32": {"kind": "sampled", "draws": 8, "dtype": "float32"},
}
INDEPENDENT = (12, 50, 100)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8")}


class Asked(NamedTuple):
    """Both models at the same positions."""

    teacher: Scores
    student: Scores
    labels: Tensor
    keys: Tensor
    student_seconds: float


class Figures(NamedTuple):
    bytes: float
    bias: float
    spread: float
    seconds: float | None


def ask(args: argparse.Namespace) -> Asked:
    tokenizer = load_tokenizer(ModelConfig(model=args.teacher), "teacher")
    rows = load_dataset("json", data_files=args.data, split=f"train[:{args.rows}]")
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=256))
    batch = token_batch(
        {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    )
    every = torch.linspace(0, len(batch.index) - 1, args.positions).long().unique()
    batch = batch.at(every)
    with torch.no_grad():
        teacher = ModelTeacher(load_model(ModelConfig(model=args.teacher), "teacher")).scores(inputs, batch)
    model = add_head_function(load_model(ModelConfig(model=args.student), "student").train().requires_grad_())
    times = []
    for _ in range(3):
        began = time.perf_counter()
        model.base_model(**inputs).last_hidden_state.sum().backward()
        times.append(time.perf_counter() - began)
    student = scores_of(model, inputs, batch.index)
    hidden, weight = student.hidden.detach().requires_grad_(), student.head.weight.detach().requires_grad_()
    seconds = statistics.median(times)
    return Asked(teacher, Scores(hidden, Head(weight)), batch.labels, batch.keys, seconds)


def estimate(asked: Asked, config: CacheConfig) -> tuple[dict[str, Tensor], Tensor]:
    """What is stored, and the distribution that it gives."""
    answer = TeacherAnswer(asked.teacher, asked.labels, asked.keys)
    stored = stored_tensors(answer, config, DTYPES[config.dtype])
    scores = scores_of_stored(stored, config.kind, asked.teacher.vocab, asked.teacher.head)
    found = teacher_logits(scores, asked.labels, asked.teacher.vocab, asked.teacher.hidden)
    return stored, torch.softmax(found, -1)


def figures(asked: Asked, p: Tensor, options: dict[str, Any], seeds: int) -> Figures:
    config = CacheConfig(path="none", **options)
    stored, found = estimate(asked, config)
    size = sum(t[0].numel() * t.element_size() for t in stored.values())
    if config.kind != "sampled":
        return Figures(size, float((found - p).abs().sum(-1).mean() / 2), 0.0, None)
    squares, rounding = torch.zeros(len(p), dtype=torch.float64), torch.zeros_like(p)
    for seed in range(seeds):
        drawn = estimate(asked, CacheConfig(path="none", **{**options, "seed": seed}))[1]
        whole = estimate(asked, CacheConfig(path="none", **{**options, "seed": seed, "dtype": "float32"}))[1]
        squares += (drawn - p).double().square().sum(-1) / seeds
        rounding += (drawn - whole) / seeds
    return Figures(size, float(rounding.abs().sum(-1).mean() / 2), float(squares.sqrt().mean()), None)


def independent(p: Tensor, n: int) -> Figures:
    """n independent draws and their counts, by formula."""
    distinct = float((1 - (1 - p.double()).pow(n)).sum(-1).mean())
    spread = float((p.double() * (1 - p.double()) / n).sum(-1).sqrt().mean())
    return Figures(3 * distinct + 4, 0.0, spread, None)


def loss_seconds(asked: Asked, repeats: int) -> dict[str, float]:
    """Median time of looking up and of the forward KL with its gradients, of each kind; kinds take turns."""
    terms, taken = name_terms(method_terms("forward_kl", {})), {name: [] for name in KINDS}
    ready = {}
    for name, options in KINDS.items():
        config = CacheConfig(path="none", **options)
        ready[name] = (config.kind, estimate(asked, config)[0])
    for _ in range(repeats):
        for name, (kind, stored) in ready.items():
            began = time.perf_counter()
            teacher = scores_of_stored(stored, kind, asked.teacher.vocab, asked.teacher.head)
            reweighted_nll(asked.student, teacher, asked.labels, terms, metric_stride=0).loss.backward()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = ask(args)
    p = torch.softmax(logits(asked.teacher), -1)
    seconds = loss_seconds(asked, args.repeats)
    print(f"{len(p)} positions; the student's body, both ways: {asked.student_seconds:.2f} s")
    print("| kind | bytes per position | bias | spread | loss, seconds |\n|---|---|---|---|---|")
    found = {name: figures(asked, p, options, args.seeds) for name, options in KINDS.items()}
    for name, one in found.items():
        print(f"| {name} | {one.bytes:,.0f} | {one.bias:.2g} | {one.spread:.2g} | {seconds[name]:.2f} |")
    for n in INDEPENDENT:
        one = independent(p, n)
        print(f"| {n} independent draws, counts | {one.bytes:,.0f} | 0 | {one.spread:.2g} | |")


if __name__ == "__main__":
    main()
