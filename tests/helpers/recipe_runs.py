"""What a run of two steps must leave, whichever recipe it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["check_mass_outside", "check_run"]


def check_run(
    summary: dict[str, Any], logs: list[dict[str, Any]], pair: tuple[Path, Path], run: Path
) -> None:
    """Two finite steps with their KLs, and a student that loads, generates and is not the one it started
    from."""
    steps = [log for log in logs if "loss" in log]
    assert [log["step"] for log in steps] == [1, 2]
    for log in steps:
        assert math.isfinite(log["loss"])
        assert math.isfinite(log["grad_norm"])
        assert log["forward_kl"] > 0.0
        assert log["reverse_kl"] > 0.0
    for name in ("loss", "forward_kl", "reverse_kl"):
        assert math.isfinite(summary[f"{name} before"])
        assert summary[f"{name} after"] != summary[f"{name} before"]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair[0], run))
    assert type(after) is type(before)
    assert after.get_output_embeddings().weight.shape == before.get_output_embeddings().weight.shape
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    tokenizer = AutoTokenizer.from_pretrained(run)
    inputs = tokenizer("say one:", return_tensors="pt")
    assert after.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def check_mass_outside(logs: list[dict[str, Any]], student_vocab: int, teacher_vocab: int) -> None:
    """The teacher's mass beyond the student's vocabulary is logged where there is such a thing, and only
    there."""
    for log in (log for log in logs if "loss" in log):
        if student_vocab == teacher_vocab:
            assert "teacher_mass_outside" not in log
        else:
            assert 0.0 < log["teacher_mass_outside"] < 1.0
