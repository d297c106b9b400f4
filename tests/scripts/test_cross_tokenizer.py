"""scripts/cross_tokenizer.py: bits per byte are right for any tokenizer, and a killed comparison goes on."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from helpers.trainers import rows
from helpers.two_tokenizers import mixed_pair
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "cross_tokenizer.py"))


def test_bits_per_byte_are_those_of_the_models_own_loss(tmp_path):
    for folder in mixed_pair(tmp_path):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        row = rows(5)[4]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        labels = torch.tensor([ids])
        labels[:, : len(tokenizer(row["prompt"])["input_ids"])] = -100
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([ids]), labels=labels).loss) * int(
                (labels != -100).sum()
            )
        bits = loss / math.log(2) / len(row["completion"].encode())
        assert SCRIPT["bits_per_byte"](str(folder), [row]) == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
def test_a_comparison_goes_on_with_what_is_missing(tmp_path):
    student, teacher = mixed_pair(tmp_path)
    same = tiny_model("llama", tmp_path / "same", role="teacher", seed=5)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(12)), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    tree = {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(data), "validation": 0.25},
        "train": {
            "vocabulary": "bytes",
            "max_steps": 2,
            "use_cpu": True,
            "report_to": "none",
            "learning_rate": 1e-3,
        },
        "output_dir": str(tmp_path / "run"),
    }
    recipe.write_text(json.dumps(tree), encoding="utf-8")
    output = tmp_path / "out"
    SCRIPT["compare"](recipe, str(same), output, [0], [])
    lines = (output / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert [json.loads(line)["arm"] for line in lines][3:] == ["sft", "masked", "bytes", "other", "same"]
    (output / "results.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    kept = (output / "sft-0.001-0" / "model.safetensors").stat().st_mtime_ns
    SCRIPT["compare"](recipe, str(same), output, [0], [])
    again = (output / "results.jsonl").read_text(encoding="utf-8").splitlines()
    for line, before in zip(again, lines, strict=True):
        assert json.loads(line)["bits_per_byte"] == json.loads(before)["bits_per_byte"]
    assert (output / "sft-0.001-0" / "model.safetensors").stat().st_mtime_ns == kept
    assert "| other | 0.001 |" in SCRIPT["table"]([json.loads(line) for line in again])
    # The second seed runs at the rate that the first one chose.
    SCRIPT["compare"](recipe, str(same), output, [0, 1], [], [1e-3, 1e-5], ["sft"])
    more = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()[8:]]
    assert [(line["rate"], line["seed"]) for line in more] == [(1e-5, 0), (1e-3, 1)]


def test_the_table_is_of_the_rate_that_other_rows_chose():
    """At rate 2 the arm is better on the rows of the table and worse on those that choose: 1 is shown."""
    lines = [
        {"arm": "student", "tuning": 5.0, "bits_per_byte": 5.0},
        *({"arm": "same", "rate": 1.0, "seed": n, "tuning": 1.0, "bits_per_byte": 2.0 + n} for n in (0, 1)),
        {"arm": "other", "rate": 1.0, "seed": 0, "tuning": 2.0, "bits_per_byte": 3.0},
        {"arm": "other", "rate": 2.0, "seed": 0, "tuning": 3.0, "bits_per_byte": 1.0},
    ]
    shown = SCRIPT["table"](lines).splitlines()
    assert shown[3] == "| same | 1 | 2.500 | 2.000, 3.000 | 2 | 100% |"
    assert shown[4] == "| other | 1 | 3.000 | 3.000, 3.000 | 1 | 80% |"


def test_the_figure_shows_the_chosen_rate_at_steps_of_all_runs():
    from cross_tokenizer_figure import curves

    lines = [
        {"arm": "sft", "rate": 1.0, "seed": 0, "tuning": 2.0, "curve": [[1, 4.0], [2, 3.0], [4, 2.0]]},
        {"arm": "sft", "rate": 2.0, "seed": 0, "tuning": 3.0, "curve": [[2, 9.0], [4, 9.0]]},
        {"arm": "sft", "rate": 1.0, "seed": 1, "tuning": 2.0, "curve": [[2, 5.0], [4, 2.5]]},
        {"arm": "sft", "rate": 1.0, "seed": 2, "tuning": 2.0, "curve": []},
    ]
    assert curves(lines) == {"sft": [(2, 4.0, 3.0, 5.0), (4, 2.25, 2.0, 2.5)]}
