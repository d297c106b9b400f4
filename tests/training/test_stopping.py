"""The end of several processes: no thread of a process group outlives what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pair
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hpd.training.stopping import leaving_processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/helpers/ending_ranks.py"


def threads_of_gloo() -> list[str]:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def fail_with_a_wrapped_model() -> None:
    """As a trainer does: the wrapper is in a cycle, and in a frame of the error."""
    model = DistributedDataParallel(nn.Linear(2, 2))
    held: list[object] = [model]
    held.append(held)
    model(torch.ones(1, 2)).sum().backward()
    assert threads_of_gloo() or not Path("/proc/self/task").is_dir()
    raise RuntimeError("no more")


def test_a_group_and_its_threads_end_behind_an_error_that_holds_the_model(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with pytest.raises(RuntimeError, match="no more"), leaving_processes():
        fail_with_a_wrapped_model()
    assert not distributed.is_initialized()
    assert not threads_of_gloo()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["command", "script", "failing"])
def test_ranks_end_without_an_abort(mode, tmp_path):
    """With MODE 50 by hand it is what docs/evidence/reliability.md counts."""
    tiny_pair("llama", tmp_path / "pair")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "pair"), str(tmp_path), mode, "3"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"statuses": {"1" if mode == "failing" else "0": 6}, "said": []}
