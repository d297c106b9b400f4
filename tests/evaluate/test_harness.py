"""`hpd eval --harness lm-eval` for real: local tasks on whole models and on adapters. `make test-engines`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import forked
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.engines

WRITTEN: dict[str, Any] = {
    "task": "sums",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOSEN: dict[str, Any] = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["#### 2", "#### 4", "#### 6"],
    "doc_to_target": 1,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
PERPLEXITY: dict[str, Any] = {
    "task": "texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{answer}}",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A student, an adapter on it, the two merged by `hpd export`, and tasks."""
    pytest.importorskip("lm_eval", reason="pip install 'hybrid-policy-distillation[lm-eval]'")
    folder = tmp_path_factory.mktemp("harness")
    student, _ = tiny_pair("qwen2", folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    done = forked.hpd("export", folder / "adapter", "--merge", "--output", folder / "merged")
    assert done.returncode == 0, done.stderr
    rows = [{"question": f"add {i} and {i}:", "answer": f"#### {2 * i}"} for i in range(6)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "yaml").mkdir()
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "problems.jsonl")}},
        "test_split": "test",
    }
    for task in (WRITTEN, CHOSEN, PERPLEXITY):
        (folder / "yaml" / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | source))
    return folder


def harness(place: Path, *words: object):
    return forked.hpd("eval", *words, "--harness", "lm-eval", "--data", place / "yaml", cwd=place)


def test_an_adapter_gets_what_the_merged_export_gets(place):
    done = harness(
        place,
        *("student", "adapter", "merged", "--tasks", "sums,choices,texts", "--limit", 5, "--output", "lm"),
    )
    assert done.returncode == 0, done.stderr
    assert "exact_match,none" in done.stdout
    assert "Many other model arguments" not in done.stderr
    entries = json.loads((place / "lm" / "evals.json").read_text())
    found = {entry["model"]: entry["results"] for entry in entries}
    for results in found.values():
        assert 0.0 <= results["sums"]["exact_match,none"] <= 1.0
        assert 0.0 <= results["choices"]["acc,none"] <= 1.0
    perplexity = {name: results["texts"]["word_perplexity,none"] for name, results in found.items()}
    assert perplexity["adapter"] == pytest.approx(perplexity["merged"], rel=1e-5)
    assert perplexity["student"] != pytest.approx(perplexity["merged"], rel=1e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student", "--tasks", "summs"], "lm-eval has no task 'summs'"),
        (["yaml", "--tasks", "sums"], "no config.json"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(place, words, message):
    done = harness(place, *words)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
