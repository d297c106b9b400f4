"""Notebooks: their cells parse, their recipes are recipes, and those for a laptop run from top to bottom."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
ON_A_LAPTOP = [path for path in NOTEBOOKS if path.stem != "gpu"]


def cells(path, kind="code"):
    tree = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in tree["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_one(path):
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in tree["cells"]]
    assert len(set(names)) == len(names)
    for cell in tree["cells"]:
        allowed = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            allowed |= {"execution_count", "outputs"}
            assert [
                output["output_type"] for output in cell["outputs"] if output["output_type"] == "error"
            ] == []
        assert set(cell) == allowed
    for code in cells(path):
        ast.parse(code)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|work|tmp)/", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(cells(path, "markdown"))):
        assert (path.parent / target).resolve().exists(), target


@pytest.mark.parametrize("path", ON_A_LAPTOP, ids=lambda path: path.stem)
def test_what_a_laptop_runs_shows_its_outputs(path):
    tree = json.loads(path.read_text(encoding="utf-8"))
    shown = [
        cell for cell in tree["cells"] if cell["cell_type"] == "code" and "print(" in "".join(cell["source"])
    ]
    assert shown
    assert all(cell["outputs"] for cell in shown)


def test_the_recipe_of_the_gpu_notebook_is_one(tmp_path):
    from hpd import load_recipe

    (path,) = [path for path in NOTEBOOKS if path.stem == "gpu"]
    (text,) = re.findall(r'recipe = """\n(.*?)"""', cells(path)[0], re.DOTALL)
    (tmp_path / "qwen.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "qwen.yaml")
    assert (recipe.method, recipe.data.format, recipe.data.name) == ("forward_kl", "chat", "main")
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in tree["cells"])  # it was not run
    assert "was not run" in cells(path, "markdown")[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_A_LAPTOP, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    """Its cells as one program: the figures that it prints are of the same kind as those that it shows."""
    (tmp_path / "cells.py").write_text("\n\n".join(cells(path)))
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    tree = json.loads(path.read_text(encoding="utf-8"))
    shown = [
        "".join(output["text"])
        for cell in tree["cells"]
        for output in cell.get("outputs", ())
        if "text" in output
    ]
    figures = re.compile(r"[-+]?\d[\d.e+-]*")
    expected = [figures.sub("#", line) for text in shown for line in text.splitlines() if "####" not in line]
    printed = [figures.sub("#", line) for line in done.stdout.splitlines()]
    assert expected
    assert [line for line in expected if line not in printed] == []
