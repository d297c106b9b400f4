"""Every recipe parses, and trains two steps on a tiny pair of its architecture and rows of its columns."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from tiny_models import NUM_TOKENS, tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

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

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
QUESTIONS = [f"say {number}:" for number in NUMBERS]
ANSWERS = [f"{' '.join(NUMBERS[: i + 1])}." for i in range(len(NUMBERS))]
DIALOGUES = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


def _rows(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# What each recipe is run on: an architecture, rows of the student's and the teacher's head, rows with the
# dataset's columns.
GSM8K = _rows(question=QUESTIONS, answer=ANSWERS)
OPENR1 = _rows(problem=QUESTIONS, solution=ANSWERS, answer=list(NUMBERS), messages=DIALOGUES)
EVOL_CODE = _rows(instruction=QUESTIONS, output=ANSWERS)
ULTRAFEEDBACK = _rows(
    prompt=QUESTIONS, prompt_id=list(NUMBERS), chosen=DIALOGUES, rejected=DIALOGUES, messages=DIALOGUES
)
CASES: dict[str, tuple[str, int, int, list[dict[str, Any]]]] = {
    "gsm8k_smollm2": ("llama", NUM_TOKENS, NUM_TOKENS, GSM8K),
    "llama3_math": ("llama", NUM_TOKENS, NUM_TOKENS, OPENR1),
    "qwen2.5_coder": ("qwen2", 320, 328, EVOL_CODE),
    "qwen2.5_math": ("qwen2", 320, 328, OPENR1),
    "ultrafeedback_chat": ("qwen2", 320, 328, ULTRAFEEDBACK),
}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """Pairs by architecture and head sizes, each made once."""
    made: dict[tuple[str, int, int], tuple[Path, Path]] = {}

    def get(architecture: str, student_vocab: int, teacher_vocab: int) -> tuple[Path, Path]:
        key = (architecture, student_vocab, teacher_vocab)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[key] = tiny_pair(
                architecture, folder, student_vocab=student_vocab, teacher_vocab=teacher_vocab
            )
        return made[key]

    return get


def _two_steps(
    recipe: Any, pair: tuple[Path, Path], rows: list[dict[str, Any]], folder: Path, *more: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, with models, data and sizes replaced and nothing else; the summary and the logs."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    student, teacher = pair
    overrides = [
        f"student={student}",
        f"teacher={teacher}",
        f"data.path={data}",
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


def _check_run(
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
    architecture, student_vocab, teacher_vocab, rows = CASES[name]
    pair = pair_of(architecture, student_vocab, teacher_vocab)
    summary, logs = _two_steps(RECIPES[name], pair, rows, tmp_path)
    _check_run(summary, logs, pair, tmp_path / "run")
    for log in (log for log in logs if "loss" in log):
        if student_vocab == teacher_vocab:
            assert "teacher_mass_outside" not in log
        else:
            assert 0.0 < log["teacher_mass_outside"] < 1.0


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral"])
def test_other_families_train_two_steps(architecture, pair_of, tmp_path):
    pair = pair_of(architecture, NUM_TOKENS, NUM_TOKENS)
    summary, logs = _two_steps(GENERIC, pair, OPENR1, tmp_path, "train.learning_rate=1e-3")
    _check_run(summary, logs, pair, tmp_path / "run")


def test_published_batches_are_what_the_comments_say():
    for name, path in RECIPES.items():
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
        if tree.get("bf16"):
            rows = tree["per_device_train_batch_size"] * tree["gradient_accumulation_steps"]
            assert rows * 8 == 256, name
            assert re.search(
                r"per_device_train_batch_size: .*# .*\b8 GPUs", path.read_text(encoding="utf-8")
            ), name


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
