"""Two processes: rollouts are disjoint, reproducible and those of one; a sharded student writes what a whole
one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_pair

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/helpers/ddp_rollouts.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def run(mode, pair, folder, processes):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    done = subprocess.run(
        [*launcher, str(SCRIPT), mode, *map(str, pair), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_two_processes_write_disjoint_rows_again_and_like_one(pair, tmp_path):
    for name, processes in (("a", 2), ("b", 2), ("c", 1)):
        (tmp_path / name).mkdir()
        run(str(processes), pair, tmp_path / name, processes)
    first, again = ([read(tmp_path / name, f"2-{rank}") for rank in (0, 1)] for name in ("a", "b"))
    single = read(tmp_path / "c", "1-0")
    assert [side["rows"] for side in first] == [side["rows"] for side in again]
    for step in range(3):
        mine, theirs = (set(map(tuple, side["rows"][step])) for side in first)
        assert not mine & theirs
        assert sorted(mine | theirs) == sorted(set(map(tuple, single["rows"][step])))
    assert first[0]["norm"] == first[1]["norm"]
    assert first[0]["norm"] == pytest.approx(single["norm"], rel=1e-6)
    for ours, theirs in zip(first[0]["logs"], single["logs"], strict=True):
        for name in ("loss", "rollouts/share", "rollouts/length", "forward_kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_rollouts_that_were_stored_train_two_processes_as_one_streamed_or_not(pair, tmp_path):
    found = {}
    for mode in ("stored", "stream"):
        for processes in (1, 2):
            run(mode, pair, tmp_path, processes)
            found[mode, processes] = [
                read(tmp_path, f"{mode}-{processes}-{rank}") for rank in range(processes)
            ]
    whole = found["stored", 1][0]
    assert whole["logs"][0]["policy/kl_old"] > 0.0
    for name, sides in found.items():
        for side in sides:
            assert side["norm"] == pytest.approx(whole["norm"], rel=1e-6), name
            for ours, theirs in zip(side["logs"], whole["logs"], strict=True):
                for metric in ("loss", "policy/kl_old", "policy/clipped", "forward_kl"):
                    assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), (name, metric)


def test_rules_over_positions_weigh_on_two_processes_as_on_one(pair, tmp_path):
    for processes in (1, 2):
        run("weighed", pair, tmp_path, processes)
    whole, *sides = (read(tmp_path, f"weighed-{name}") for name in ("1-0", "2-0", "2-1"))
    for side in sides:
        assert side["norm"] == pytest.approx(whole["norm"], rel=1e-6)
        for ours, theirs in zip(side["logs"], whole["logs"], strict=True):
            for metric in ("loss", "forward_kl"):
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4)


def test_a_sharded_student_writes_what_a_whole_one_does(pair, tmp_path):
    run("fsdp", pair, tmp_path, 2)
    for rank in (0, 1):
        whole, sharded = read(tmp_path, f"fsdp-{rank}")
        assert whole == sharded
        assert len(whole) == 5 - 2 * rank
