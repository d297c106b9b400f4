"""Run by scripts/scaling.py --measure: cost per token here, by model size and processes; cache bandwidth.

torchrun --standalone --nproc_per_node 2 scripts/scaling_measure.py WIDTH OUTPUT.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hpd.losses import reweighted_nll
from hpd.methods import METHODS, choose_terms, name_terms
from hpd.models.forward import add_head_function, scores_of
from hpd.training.stopping import leaving_processes

WIDTHS = (128, 256, 512)
VOCAB, LAYERS, ROWS, LENGTH, STEPS = 8192, 4, 4, 128, 5
_CACHE_TOKENS = 20_000


def model(width: int) -> LlamaForCausalLM:
    """A random causal language model of four layers."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64 or 1,
        num_key_value_heads=width // 64 or 1,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def measure_steps(width: int) -> dict[str, Any]:
    """Median seconds of a training step (forward KL, every token a label) on each process's own 512
    tokens."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if processes > 1:
        distributed.init_process_group("gloo")
    student: nn.Module = add_head_function(model(width)).train()
    teacher = add_head_function(model(width)).requires_grad_(False)
    parameters = sum(p.numel() for p in student.parameters())
    if processes > 1:
        student = DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    assert "forward_kl" in METHODS
    terms = name_terms(choose_terms("forward_kl", {}, ()))
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(processes))
    index = torch.arange(ROWS * LENGTH)
    labels = ids.roll(-1).flatten()
    seconds = []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        known = scores_of(teacher, {"input_ids": ids}, index)
        loss = student(
            input_ids=ids,
            label_index=index,
            head_function=lambda scores, known=known: (
                reweighted_nll(scores, known, labels, terms, scale=1 / len(labels), metric_stride=16).loss
            ),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {
        "width": width,
        "processes": processes,
        "parameters": parameters,
        "tokens": ROWS * LENGTH,
        "seconds": statistics.median(seconds[1:]),
    }


def measure_cache(width: int, folder: Path) -> dict[str, Any]:
    """GB/s and tokens/s of reading hidden states (bfloat16) row by row in random order, from disk or page
    cache."""
    file = folder / "rows.bin"
    shape = (_CACHE_TOKENS // LENGTH, LENGTH * width)
    numpy.zeros(shape, dtype=numpy.uint16).tofile(file)
    rows = numpy.memmap(file, dtype=numpy.uint16, mode="r", shape=shape)
    order = numpy.random.default_rng(0).permutation(shape[0])
    started = time.perf_counter()
    for row in order:
        torch.from_numpy(numpy.array(rows[row])).view(torch.bfloat16)
    seconds = time.perf_counter() - started
    return {
        "width": width,
        "gb_per_second": rows.nbytes / seconds / 1e9,
        "tokens_per_second": shape[0] * LENGTH / seconds,
    }


def measure_all() -> dict[str, Any]:
    """Every width on one and two processes, each in a launch of its own, and the cache."""
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS:
            for processes in (1, 2):
                output = Path(folder) / f"{width}-{processes}.json"
                launch = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc_per_node",
                    str(processes),
                    __file__,
                    str(width),
                    str(output),
                ]
                subprocess.run(launch, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
                steps.append(json.loads(output.read_text()))
        cache = [measure_cache(width, Path(folder)) for width in (512, 1536, 3584)]
    return {"steps": steps, "cache": cache}


if __name__ == "__main__":
    with leaving_processes():
        found = measure_steps(int(sys.argv[1]))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
