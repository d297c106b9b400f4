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

_, name, device, dtype = sys.argv
given = problem(601).to(getattr(torch, dtype)).on(device)
compiled = compute(given, TERMS[name], rows=5, impl="compiled")
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(rtol=2e-2, atol=2e-3)
assert_equal(compiled, compute(given, TERMS[name], rows=5), **tolerance)
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", "float32", marks=pytest.mark.slow),
        pytest.param("cuda", "float32", marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("name", ["hpd", "generalized_jsd", "sum"])
def test_compiled_is_chunked(name: str, device: str, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, device, dtype],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
