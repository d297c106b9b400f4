"""Every recipe parses, and runs two steps on tiny models of its architectures and rows of its columns."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM

from hpd import config
from hpd.config import load_recipe
from hpd.train import train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# The architecture of a recipe's models, and whether their heads differ in size.
FAMILIES = {"qwen2.5": ("qwen2", True), "llama3": ("llama", False), "gsm8k": ("llama", False), "ultrafeedback": ("qwen2", True)}
TURNS = [{"role": "user", "content": "say one two"}, {"role": "assistant", "content": "one two three"}]


def tiny_rows(recipe: dict) -> list[dict]:
    """Rows with the columns that the recipe names."""
    data = recipe["data"]
    if "columns" in data:
        row = {data["columns"]["prompt"]: "say one two", data["columns"]["completion"]: "one two three"}
    else:
        row = {"prompt": "say one two", "completion": "one two three"}
        if data.get("labels") == "last_turn":
            row = {"messages": TURNS}
    return [row] * 64


def shrink(tree: dict, folder: Path, architecture: str, unequal: bool) -> dict:
    """The recipe with tiny models, a file of its own and settings for a CPU; the rest is as written."""
    vocab = {"student_vocab": 320, "teacher_vocab": 328} if unequal else {}
    student, teacher = tiny_pair(architecture, folder, **vocab)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(tree)))
    small = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False,
             "logging_steps": 1, "max_length": 64, "eval_strategy": "no", "save_steps": 2}  # fmt: skip
    return {
        **tree,
        "student": {**(tree["student"] if isinstance(tree["student"], dict) else {}), "model": str(student)},
        "teacher": {"model": str(teacher)},
        "data": {**{k: v for k, v in tree["data"].items() if k not in ("name", "split")}, "path": str(rows), "validation": 0.25},
        "train": {**tree["train"], **small},
        "output_dir": str(folder / "run"),
    }


def logs_of(folder: Path) -> list[dict]:
    return [log for log in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()) if "loss" in log]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_runs_two_steps(path, tmp_path):
    load_recipe(path)
    architecture, unequal = next(family for prefix, family in FAMILIES.items() if path.stem.startswith(prefix))
    train(load_recipe(shrink(yaml.safe_load(path.read_text()), tmp_path, architecture, unequal)))
    logs = logs_of(tmp_path)
    assert len(logs) == 2
    assert all(math.isfinite(log["loss"]) and log["forward_kl"] > 0 for log in logs)
    assert all(("teacher_mass_outside" in log) == unequal for log in logs)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == architecture


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral"])
def test_other_architectures_run_the_same_recipe(architecture, tmp_path):
    tree = yaml.safe_load((ROOT / "recipes" / "gsm8k_smollm2.yaml").read_text())
    train(load_recipe(shrink(tree, tmp_path, architecture, unequal=False)))
    assert all(math.isfinite(log["loss"]) for log in logs_of(tmp_path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short_and_says_what_it_reproduces(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 30
    assert path.name in (ROOT / "recipes" / "README.md").read_text()


def test_every_recipe_field_is_read_somewhere():
    """A knob that nothing reads is a lie."""
    attributes = set()
    for file in (ROOT / "hpd").rglob("*.py"):
        tree = ast.parse(file.read_text())
        attributes |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    classes = (config.ModelConfig, config.TeacherConfig, config.DataConfig, config.EvalConfig, config.Recipe)
    for owner in classes:
        for field in dataclasses.fields(owner):
            assert field.name in attributes, f"{owner.__name__}.{field.name}"
