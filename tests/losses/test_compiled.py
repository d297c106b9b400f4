"""`impl="compiled"` is the chunked operator, in other kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own: the checks of shapes that conftest.py adds to every function are not made for the
# compiler.
SCRIPT = """
import sys
import torch
from helpers.problems import TERMS, assert_equal, compute, problem

given = problem(601).to(torch.float32)
compiled = compute(given, TERMS[sys.argv[1]], rows=5, impl="compiled")
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
assert_equal(compiled, compute(given, TERMS[sys.argv[1]], rows=5), rtol=1e-4, atol=1e-5)
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("hpd", "generalized_jsd", "sum")]
)
def test_compiled_is_chunked(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
