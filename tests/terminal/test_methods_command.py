"""`hpd methods`: the table and each row of it, without the seconds that torch takes to import."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hpd.cli import app


def run(*arguments):
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["methods", *arguments])


def test_torch_is_not_imported():
    code = (
        "import sys\nfrom hpd.cli import app\ntry:\n app(sys.argv[1:])\nfinally:\n"
        " print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    for arguments in ([], ["hpd"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "methods", *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_method_is_shown_with_what_the_table_says():
    from hpd.methods import METHODS

    table = run().output
    for name, method in METHODS.items():
        assert name in table
        shown = " ".join(run(name).output.split())
        assert method.reference.split(",")[0] in shown
        assert " ".join(method.weight.split())[:40] in shown
    shown = run("akl").output
    assert "mu" in shown
    assert "0.5" in shown
    assert "mass of the head, in (0, 1)" in shown
    assert "no parameters" in run("sft").output


def test_a_slip_is_answered_with_the_name():
    done = run("foward_kl")
    assert done.exit_code == 2


@pytest.mark.parametrize("name", ["hpd", "taid", "gkd"])
def test_the_example_is_one(name, tmp_path):
    import shlex

    from hpd.config import load_recipe

    lines = [line for line in run(name).output.splitlines() if line.startswith("example:")]
    words = shlex.split(lines[0])[4:]
    recipe = {"student": "a", "teacher": "b", "data": "c", "output_dir": str(tmp_path)}
    assert load_recipe(recipe, words).method == name
