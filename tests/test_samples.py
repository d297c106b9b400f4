"""What pages tell readers to type: commands with options that exist, listings that parse, code that runs."""

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(p for p in ROOT.glob("docs/**/*.md") if "docs/results/" not in str(p)),
    *sorted(p for name in ("recipes", "experiments", "examples") for p in ROOT.glob(f"{name}/**/*.md")),
]
TYPED = re.compile(r"(?:^ {4}(?:\$ )?|^\$ |^|`|&& |-m )hpd ([a-z-]+)((?: [^`\n#|;]+)?)", re.MULTILINE)


@pytest.fixture(scope="module")
def options():
    from typer.main import get_command

    from hpd.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = {
        name: {
            form
            for p in command.params
            if p.param_type_name == "option"
            for form in (*p.opts, *p.secondary_opts)
        }
        for name, command in commands.items()
    }
    return {name: forms | {"--help", "-h"} for name, forms in named.items()}


def unknown_options(text, options):
    wrong = []
    for command, rest in TYPED.findall(text.replace(" \\\n", " ")):
        if command not in options:
            continue  # tests/test_docs.py names it
        given = re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", rest)
        wrong += [f"hpd {command} {option}" for option in given if option not in options[command]]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_a_page_shows_exist(page, options):
    assert unknown_options(page.read_text(encoding="utf-8"), options) == []


def test_an_option_that_does_not_exist_is_found(options):
    assert unknown_options("    hpd train r.yaml --dry-runs\n", options) == ["hpd train --dry-runs"]
    assert unknown_options("$ hpd eval a \\\n    --task x --no\n", options) == ["hpd eval --no"]


def is_key(key):
    """True for a key of a recipe, written a.b.c."""
    from dataclasses import fields

    from hpd.config.check import hint_at
    from hpd.config.schema import Recipe
    from hpd.training.arguments import DistillConfig

    first, *inner = key.split(".")
    if first not in {f.name for f in fields(Recipe)}:
        return False
    if first == "train" and inner:
        return inner[0] in {f.name for f in fields(DistillConfig)}
    return not inner or first in ("method_kwargs", "eval") or hint_at([first, *inner]) is not Any


def test_keys_that_a_page_replaces_exist():
    """`hpd train recipe.yaml a.b=c`: a.b is a key of a recipe."""
    seen = []
    for page in PAGES:
        if page.name == "terminal.md":  # it shows two mistakes
            continue
        for command, rest in TYPED.findall(page.read_text(encoding="utf-8")):
            if command in ("train", "doctor", "cache", "generate", "demo"):
                found = re.findall(r"(?:^| )([a-z_]+(?:\.[A-Za-z_]+)*)=", rest)
                seen += [(page.name, key) for key in found]
    assert len(seen) > 40
    assert [(page, key) for page, key in seen if not is_key(key)] == []
    assert not is_key("max_steps")
    assert not is_key("train.max_step")
    assert not is_key("lora.alpha")


def test_keys_for_those_who_come_from_elsewhere_exist():
    page = (ROOT / "docs/start/migrate.md").read_text(encoding="utf-8")
    here = [row.split("|")[4] for row in page.splitlines() if row.startswith("| ") and row.count("|") == 6]
    keys = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", " ".join(here))
    assert len(keys) > 15
    assert [key for key in keys if not is_key(key)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_listings_parse(page):
    text = page.read_text(encoding="utf-8")
    for listing in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        ast.parse(listing.replace(", ...)", ")"))  # what is left out
    for listing in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yaml.safe_load(listing)


def listings(name, language="python"):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_objective_of_the_page_passes_the_test_of_the_page(tmp_path, monkeypatch):
    module, test = listings("docs/guides/extend/objective.md")
    (tmp_path / "chi_square.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        exec(compile(test, "objective.md", "exec"), {})
        with pytest.raises(AssertionError):
            exec(compile(test.replace("** 2 / q", "** 2 / p"), "objective.md", "exec"), {})
    finally:
        sys.modules.pop("chi_square", None)


def test_the_task_of_the_page_grades(tmp_path):
    from types import SimpleNamespace

    from hpd.evaluate import Task

    scope: dict = {}
    exec(compile(listings("docs/guides/extend/task.md")[0], "task.md", "exec"), scope)
    (tmp_path / "words.jsonl").write_text('{"word": "step"}\n{"word": "loop"}\n')
    task = scope["Reversal"](tmp_path / "words.jsonl")
    assert isinstance(task, Task)
    json.dumps(task.options)
    verdicts = task.grade(task.examples(), [SimpleNamespace(text=" pets now"), SimpleNamespace(text="loop")])
    assert [verdict.correct for verdict in verdicts] == [True, False]


def test_the_teacher_of_the_page_is_the_example(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.syspath_prepend(str(ROOT / "examples" / "extensions"))
    from smoothed import Smoothed

    scope: dict = {}
    exec(compile(listings("docs/guides/extend/teacher.md")[0], "teacher.md", "exec"), scope)
    student = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(2, 7))
    batch = SimpleNamespace(labels=torch.tensor([3, 0]))
    answers = []
    for kind in (Smoothed, scope["Smoothed"]):
        teacher = kind(epsilon=0.2)
        teacher.prepare(student, SimpleNamespace(unwrap_model=lambda model: model))
        answers.append(teacher.scores({}, batch).hidden)
    sys.modules.pop("smoothed", None)
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(answers[0].exp().sum(-1), torch.ones(2))


def test_the_losses_of_the_first_page_run():
    """README's functions, with tensors in the places of its names."""
    from types import SimpleNamespace

    student, teacher = (SimpleNamespace(lm_head=torch.nn.Linear(4, 7)) for _ in range(2))
    student_hidden, teacher_hidden = torch.randn(2, 1, 5, 4)
    scope = {
        "student": student,
        "teacher": teacher,
        "student_hidden": student_hidden,
        "teacher_hidden": teacher_hidden,
        "student_logits": student.lm_head(student_hidden),
        "teacher_logits": teacher.lm_head(teacher_hidden).detach(),
        "labels": torch.tensor([[-100, 1, 2, 3, 4]]),
    }
    exec(compile(listings("README.md")[1], "README.md", "exec"), scope)
    loss, stats = scope["loss"], scope["stats"]
    loss.backward()
    assert student.lm_head.weight.grad.abs().sum() > 0
    assert float(stats["tokens"]) == 4


def test_messages_of_troubleshooting_are_those_of_the_code():
    pieces = []
    for path in ROOT.glob("hpd/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(node.value)
    said = "\n".join(pieces)
    page = (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`[^|]*\|", page.partition("## It trains, but")[0], re.MULTILINE)
    assert len(messages) >= 25
    assert [message for message in messages if message not in said] == []
