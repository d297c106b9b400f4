"""The function that trains, and what a run folder says of the machine."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import hpd
from hpd.training.folder import environment

ROOT = Path(hpd.__file__).parents[1]


def test_train_is_the_function_whatever_is_imported_before():
    from hpd import train

    home = importlib.import_module("hpd.training.run")
    assert train is home.train
    importlib.import_module("hpd.training")
    assert hpd.train is home.train


def test_no_exported_name_is_hidden_by_a_module():
    names = {path.stem for path in (ROOT / "hpd").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & set(hpd.__all__)


def test_a_run_folder_names_the_commit():
    found = environment()["git_commit"]
    if not (ROOT / ".git").exists():
        assert found is None
        return
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (found or "").removesuffix("-dirty") == commit.stdout.strip()
