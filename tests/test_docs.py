"""Documents say what is true: generated pages are current, and what readers are told to type works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def test_methods_page_is_what_the_tables_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_docs

    assert make_docs.PAGE.read_text(encoding="utf-8") == make_docs.page()
    assert make_docs.FACTS.read_text(encoding="utf-8") == make_docs.facts()
    for name, method in json.loads(make_docs.facts()).items():
        for term in method["terms"]:
            assert all(parameter["meaning"] for parameter in term["parameters"]), name


def test_the_reference_and_the_schema_are_what_the_dataclasses_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_reference

    assert make_reference.PAGE.read_text(encoding="utf-8") == make_reference.page()
    assert make_reference.SCHEMA.read_text(encoding="utf-8") == make_reference.schema()
    for section in make_reference.sections():
        fields = set(section.__dataclass_fields__)
        assert fields == fields & make_reference.documented(section).keys(), section


def test_the_first_page_names_every_method_once():
    from hpd import METHODS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Its {len(METHODS)} methods" in text
    listed = text.partition("\n## Methods\n")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z_0-9]+)`", listed.partition("* **")[2])
    assert sorted(named) == sorted(METHODS)


def test_commands_and_tasks_are_what_the_tables_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_pages

    assert make_pages.COMMANDS.read_text(encoding="utf-8") == make_pages.commands_page()
    assert make_pages.TASK_PAGE.read_text(encoding="utf-8") == make_pages.tasks_page()
    assert make_pages.MATRIX.read_text(encoding="utf-8") == make_pages.matrix_page()
    assert {"works", "refused", "approximated", "`tail: uniform`"} <= set(
        make_pages.matrix_page().split(" | ")
    )
    assert "--dry-run" in make_pages.commands_page()
    assert make_pages.tasks_page().count("\n| `") == len(make_pages.TASKS)


@pytest.mark.slow
def test_pages_show_what_their_commands_print():
    """Every command below `<!-- terminal: -->`, run again: the same lines, figures aside."""
    pytest.importorskip("pyte", reason="pip install -e .[dev]")
    done = subprocess.run(
        [sys.executable, "scripts/make_outputs.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr


def test_an_objective_in_fifteen_lines_followed_literally(tmp_path, monkeypatch):
    """The listing of CONTRIBUTING.md, put into a module and used as a recipe would."""
    from hpd import TermConfig

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listing = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert listing is not None
    code = listing[1]
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "my_module.py").write_text("from hpd import Objective\n\n\n" + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        objective = TermConfig(objective="my_module:chi_square").build().objective
    finally:
        sys.modules.pop("my_module", None)
    p, q = torch.randn(2, 3, 5, dtype=torch.float64).softmax(-1)
    log_q = q.log().requires_grad_()
    value = objective.value(p.log(), log_q.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(value, ((p - q) ** 2 / q).sum(-1))
    w = objective.weights(p.log(), q.log())
    (gradient,) = torch.autograd.grad(value.sum(), log_q)
    torch.testing.assert_close(gradient, w.sum(-1, keepdim=True) * q - w)


def test_readme_commands_exist():
    """Every hpd command and make target that a document shows is one that exists."""
    from typer.main import get_command

    from hpd.cli import app

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "recipes" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        # Commands stand at the start of a line of a listing, in backticks, or behind another command.
        for command in re.findall(r"(?:^ {4}|^\$ |^|`|&& )hpd ([a-z][a-z-]*)", text, re.MULTILINE):
            assert command in commands, f"{page.name}: hpd {command}"
        for target in re.findall(r"(?:^ {4}|^|`|&& )make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_no_placeholder_is_left_in_a_document():
    for page in [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        assert not re.search(
            r"@[A-Z_]+@|\b[A-Z0-9]+_(OUTPUT|TABLE|SENTENCE|MINUTES)\b|TODO|FIXME",
            page.read_text(encoding="utf-8"),
        ), page.name


def test_dry_runs_of_eight_formats_are_what_the_page_shows(tmp_path, monkeypatch):
    from helpers.data_examples import EXAMPLES, PAGE, page
    from tiny_models import tiny_pair

    tiny_pair("llama", tmp_path / "pair")
    monkeypatch.setenv("COLUMNS", "110")
    assert len(EXAMPLES) == 8
    assert PAGE.read_text(encoding="utf-8") == page(tmp_path)


def test_the_experiment_of_which_method_is_one(tmp_path, monkeypatch):
    from hpd.experiments.experiment import load_experiment
    from hpd.experiments.grid import expand

    text = (ROOT / "docs/start/which-method.md").read_text(encoding="utf-8")
    listing = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert listing is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "which.yaml").write_text(listing[1].replace("base: recipe.yaml", "base: demo"))
    assert len(expand(load_experiment(tmp_path / "which.yaml"), tmp_path)) == 20
