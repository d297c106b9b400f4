"""Before anything else is imported: run offline, on few threads, with the shapes of public signatures
checked."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Hub clients read these when they are imported. Whoever runs the tests marked `network` sets
# HF_HUB_OFFLINE=0.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Torch reads it when it is imported, and so do the processes that tests start: all compute on as many
# threads, on which the last bit of a product may depend.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from helpers.skips import fail_on_unlisted_skips
from jaxtyping import install_import_hook

# The modules whose signatures carry shapes. The trainer's are left out, their types are foreign classes and
# protocols; so are the objectives', since torch.compile, which their tests use, cannot trace the checks.
SHAPED = [
    "batch",
    "losses",
    "methods.sampling",
    "methods.supports",
    "methods.terms",
    "models.forward",
    "objectives.estimators",
]
install_import_hook([f"hpd.{module}" for module in SHAPED], "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    fail_on_unlisted_skips(config)


def pytest_collection_finish() -> None:
    # A trainer collects garbage at its end: half of the time of a tiny run, spent on looking through the
    # libraries and tests that were imported until now and stay.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads_stay_as_they_are():
    """A run of `hpd compare` sets the number of threads of its process; the next test computes on as many as
    the one before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared test data: HPD_SHARED, or `shared/` in the repository root or a folder above
    it."""
    root = Path(__file__).resolve().parents[1]
    given = os.environ.get("HPD_SHARED")
    candidates = [Path(given)] if given else [folder / "shared" for folder in (root, *root.parents)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip("no shared/ folder: set HPD_SHARED to one")
