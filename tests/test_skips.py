"""On CI, a skip that is not listed fails the run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.skips import ALLOWED_SKIPS

CONFTEST = """
from helpers import skips

def pytest_configure(config):
    skips.fail_on_unlisted_skips(config, {"test_given.py::test_gpu": "needs a GPU"})
"""
GIVEN = """
import pytest

def test_passes(): pass

def test_gpu(): pytest.skip("needs a GPU")

@pytest.mark.xfail
def test_known(): assert False
"""
UNLISTED = """
import pytest

@pytest.fixture
def browser(): pytest.skip("no chromium")

def test_page(browser): pass

@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.skipif(True, reason="never here")
def test_level(level): pass

def test_gpu_by_another_name(): pytest.skip("needs a GPU")
"""
MODULE = """
import pytest

pytest.importorskip("no_such_module")
"""


def outcome(folder: Path, *arguments: str, ci: str, **files: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "CI": ci, "COLUMNS": "200"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins take seconds to import
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), *arguments, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.parametrize("workers", [(), ("-p", "xdist.plugin", "-n", "1")], ids=["one process", "xdist"])
def test_an_unlisted_skip_fails_the_run_and_is_named(tmp_path, workers):
    code, text = outcome(
        tmp_path, *workers, ci="1", test_given=GIVEN, test_other=UNLISTED, test_module=MODULE
    )
    assert code == 1, text
    assert "skipped on CI without being listed" in text
    named = text.split("without being listed")[1].splitlines()[1:]
    assert [line.split(": ")[0] for line in named[:5]] == [
        "test_module.py",
        "test_other.py::test_gpu_by_another_name",
        "test_other.py::test_level[1]",
        "test_other.py::test_level[2]",
        "test_other.py::test_page",
    ]
    assert "no_such_module" in named[0]
    assert named[2].endswith("never here")
    assert named[4].endswith("no chromium")
    assert re.match(r"1 passed, 6 skipped, 1 xfailed in ", named[5])


def test_listed_skips_and_other_machines_pass(tmp_path):
    code, text = outcome(tmp_path, ci="true", test_given=GIVEN)
    assert (code, "listed" in text) == (0, False), text
    code, text = outcome(tmp_path, ci="", test_given=GIVEN, test_other=UNLISTED)
    assert (code, "listed" in text) == (0, False), text


def test_the_list_names_tests_that_exist():
    for name in ALLOWED_SKIPS:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (Path(__file__).parents[1] / file).read_text()
