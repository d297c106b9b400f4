"""Before anything else is imported: run offline, on two threads, with the shapes of public signatures
checked."""

from __future__ import annotations

import os
from pathlib import Path

# Hub clients read these when they are imported. Whoever runs the tests marked `network` sets
# HF_HUB_OFFLINE=0.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
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

torch.set_num_threads(2)


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
