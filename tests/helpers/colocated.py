"""Run by tests/engines/test_vllm.py in processes of their own: vLLM in the process of a student that changes.

Usage: colocated.py rollouts STUDENT TEMPERATURE, or colocated.py train RECIPE. The last line of output is
JSON.

The CPU build of vLLM packs weights away when it has loaded them, where no new ones can be sent: here that is
off.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import vllm._custom_ops as kernels  # pyright: ignore[reportMissingImports]
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.config import load_recipe
from hpd.generation.rollouts import make_engine
from hpd.methods.prefixes import RolloutConfig
from hpd.training.run import train

ENGINE: dict[str, Any] = {"max_model_length": 128, "max_num_seqs": 8, "enforce_eager": True}


def rollouts(folder: str, temperature: str) -> dict[str, Any]:
    """Rollouts before and after a change of the weights, and how far their log-probabilities are from the
    student's own."""
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(f"say {i}:")["input_ids"] for i in range(6)]
    config = RolloutConfig(engine="vllm", max_new_tokens=12, temperature=float(temperature), vllm=ENGINE)
    engine = make_engine(config, lambda: student, student, Accelerator(cpu=True), tokenizer, None)
    largest, counts = [], []
    for step in range(3):
        written = engine.generate(prompts, [12] * len(prompts), torch.zeros(len(prompts), 12), step)
        gaps = [0.0]
        for prompt, rollout in zip(prompts, written, strict=True):
            with torch.no_grad():
                logits = student(torch.tensor([prompt + rollout.tokens])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
            gaps += [abs(float(a - b)) for a, b in zip(own, rollout.logprobs, strict=False)]
        largest.append(max(gaps))
        counts.append(sum(len(rollout.logprobs) for rollout in written))
        with torch.no_grad():
            for weight in student.parameters():
                weight += 0.05 * torch.randn(weight.shape)
    return {"largest": largest, "logprobs": counts}


def trained(recipe: str) -> dict[str, Any]:
    return dict(train(load_recipe(recipe)))


if __name__ == "__main__":
    kernels._supports_onednn = False
    mode, *arguments = sys.argv[1:]
    print("\n" + json.dumps({"rollouts": rollouts, "train": trained}[mode](*arguments), default=str))
