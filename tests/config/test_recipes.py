"""Every recipe of recipes/ parses, and trains two steps on a tiny pair of its kind and rows of its columns.

Those of recipes/paper/ are in test_paper_recipes.py.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from helpers.dialogues import ANSWERS, DIALOGUES, NUMBERS, QUESTIONS, rows
from helpers.recipe_runs import check_mass_outside, check_run
from helpers.two_tokenizers import mixed_pair
from tiny_models import NUM_TOKENS, tiny_pair

from hpd.config import (
    CacheConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    TeacherConfig,
    load_recipe,
)
from hpd.training.run import train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
GENERIC = {"student": "student", "teacher": "teacher", "data": {"path": "rows.jsonl", "labels": "last_turn"}}

# What each recipe is run on: an architecture, rows of the student's and the teacher's head, rows with the
# dataset's columns.
GSM8K = rows(question=QUESTIONS, answer=ANSWERS)
OPENR1 = rows(problem=QUESTIONS, solution=ANSWERS, answer=list(NUMBERS), messages=DIALOGUES)
CASES: dict[str, tuple[str, int, int, list[dict[str, Any]]]] = {
    "gsm8k_smollm2": ("llama", NUM_TOKENS, NUM_TOKENS, GSM8K),
    "cross_tokenizer_smollm2_gemma": ("two tokenizers", NUM_TOKENS, NUM_TOKENS, GSM8K),
    "cross_tokenizer_on_policy": ("two tokenizers", NUM_TOKENS, NUM_TOKENS, GSM8K),
    "cross_tokenizer_gemma_smollm2": ("two tokenizers, swapped", NUM_TOKENS, NUM_TOKENS, GSM8K),
}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """Pairs by architecture and head sizes, each made once."""
    made: dict[tuple[str, int, int], tuple[Path, Path]] = {}

    def get(architecture: str, student_vocab: int, teacher_vocab: int) -> tuple[Path, Path]:
        key = (architecture, student_vocab, teacher_vocab)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture.replace(",", ""))
            if architecture.startswith("two tokenizers"):
                made[key] = mixed_pair(folder, swapped="swapped" in architecture)
            else:
                made[key] = tiny_pair(
                    architecture, folder, student_vocab=student_vocab, teacher_vocab=teacher_vocab
                )
        return made[key]

    return get


def _two_steps(
    recipe: Any, pair: tuple[Path, Path], data: list[dict[str, Any]], folder: Path, *more: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, with models, data and sizes replaced and nothing else; the summary and the logs."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    student, teacher = pair
    overrides = [
        f"student={student}",
        f"teacher={teacher}",
        f"data.path={path}",
        "data.name=null",
        "data.split=train",
        "data.limit=null",
        "data.validation=0.25",
        "train.max_steps=2",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.logging_steps=1",
        "train.max_length=64",
        "train.bf16=false",
        "train.use_cpu=true",
        f"output_dir={folder / 'run'}",
    ]
    summary = train(load_recipe(recipe, [*overrides, *more]))
    logs = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return summary, [json.loads(line) for line in logs]


def test_every_recipe_has_a_case():
    assert set(CASES) == set(RECIPES)


@pytest.mark.parametrize("name", CASES)
def test_recipe_is_short_and_says_what_it_reproduces(name):
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert re.match(r"# \w.{30,}", lines[0])
    assert f"{name}.yaml" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert load_recipe(RECIPES[name]).output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", CASES)
def test_recipe_trains_two_steps(name, pair_of, tmp_path):
    architecture, student_vocab, teacher_vocab, data = CASES[name]
    pair = pair_of(architecture, student_vocab, teacher_vocab)
    summary, logs = _two_steps(RECIPES[name], pair, data, tmp_path)
    check_run(summary, logs, pair, tmp_path / "run")
    check_mass_outside(logs, student_vocab, teacher_vocab)


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral"])
def test_other_families_train_two_steps(architecture, pair_of, tmp_path):
    pair = pair_of(architecture, NUM_TOKENS, NUM_TOKENS)
    summary, logs = _two_steps(GENERIC, pair, OPENR1, tmp_path, "train.learning_rate=1e-3")
    check_run(summary, logs, pair, tmp_path / "run")


# Under which names the package holds each part of a recipe.
HOLDERS: dict[type, set[str]] = {
    Recipe: {"recipe", "self"},
    ModelConfig: {"source", "student"},
    TeacherConfig: {"source", "teacher", "part"},
    CacheConfig: {"config", "cache"},
    DataConfig: {"config", "data", "part"},
    EvalConfig: {"config", "eval"},
}


def _attribute_reads() -> set[tuple[str, str]]:
    """(holder, attribute) of every read in the package; in hpd/config, of a section's of itself."""
    reads = set()
    for path in sorted((ROOT / "hpd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = getattr(node.value, "attr", getattr(node.value, "id", ""))
                if path.parent.name != "config" or holder == "self":
                    reads.add((holder, node.attr))
    return reads


@pytest.mark.parametrize("part", HOLDERS)
def test_every_field_is_read_outside_the_configuration(part):
    """A field that nobody reads is an option without effect."""
    reads = _attribute_reads()
    unread = [
        f.name for f in dataclasses.fields(part) if not any((h, f.name) in reads for h in HOLDERS[part])
    ]
    assert not unread


def test_adapter_is_handed_to_peft_whole():
    assert ("recipe", "lora") in _attribute_reads()
    ours = dataclasses.asdict(LoraConfig())
    theirs = peft.LoraConfig(**ours)
    assert {name: getattr(theirs, name) for name in ours} == ours
