"""DeepSpeed for real, on a CPU: ZeRO-2 and ZeRO-3 on two processes against one. `make test-engines`.

Whole students, adapters, and what `hpd cache` writes.

Its extension for the CPU is compiled at the first start, in about a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import forked
from helpers.sockets import free_port
from safetensors.torch import load_file
from tiny_models import tiny_pair

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.engines
STAGES = (2, 3)


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Not where the file is read: a run without these tests must not skip it."""
    pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair whose student has a tied head, rows, and the same recipe in one process for each stage."""
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_pair("llama", folder)
    rows = [
        {"prompt": f"add {i} and {i}:", "completion": f" {2 * i}", "hint": f"twice {i}"} for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in STAGES:
        done = forked.hpd("train", recipe(folder, f"one{stage}", 8, stage))
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def recipe(folder: Path, name: str, batch: int, stage: int = 0, **more: Any) -> Path:
    """The teacher of ZeRO-3 reads rows of its own."""
    teacher = {"model": str(folder / "teacher")}
    tree = {
        **more,
        "student": str(folder / "student"),
        "teacher": teacher | ({"prompt": "{prompt} ({hint})"} if stage == 3 else {}),
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.25},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_length": 64,
            "metric_stride": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        },
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def launch(stage: int, recipe: Path, command: str = "train") -> subprocess.CompletedProcess[str]:
    """The recipe under DeepSpeed in two processes, as docs/guides/distributed.md says."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "TERM": "dumb",
    }
    config = ROOT / f"recipes/accelerate/zero{stage}.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    words += ["--num_processes", "2", "--main_process_port", str(free_port()), "--mixed_precision", "no"]
    words += ["-m", "hpd", command, str(recipe), "train.ddp_backend=gloo"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module", params=STAGES)
def two(request, folder):
    """The stage and the output of its run on two processes."""
    done = launch(request.param, recipe(folder, f"zero{request.param}", 4, request.param))
    assert done.returncode == 0, done.stderr[-5000:]
    return request.param, done


def logs_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def difference(ours: Path, theirs: Path, file: str = "model.safetensors") -> float:
    weights, expected = (load_file(run / file) for run in (ours, theirs))
    assert weights.keys() == expected.keys()
    return max(float((weights[name] - expected[name]).abs().max()) for name in weights)


def test_two_processes_equal_one(folder, two):
    stage, _ = two
    found = [
        {log["step"]: log for log in logs_of(folder / name) if "loss" in log}
        for name in (f"zero{stage}", f"one{stage}")
    ]
    assert found[0].keys() == found[1].keys() == {1, 2, 3, 4}
    for step, log in found[1].items():
        for name in ("loss", "forward_kl", "reverse_kl", "student_entropy"):
            assert found[0][step][name] == pytest.approx(log[name], abs=5e-7), (step, name)
    assert difference(folder / f"zero{stage}", folder / f"one{stage}") < 1e-5


def test_a_tied_head_is_exported_once(folder, two):
    stage, _ = two
    for run in (f"zero{stage}", f"one{stage}"):
        names = load_file(folder / run / "model.safetensors").keys()
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names


def test_one_process_prints_the_final_table(two):
    _, done = two
    assert done.stdout.count("student and metrics in") == 1


def test_it_resumes_where_a_checkpoint_stands(folder, two):
    stage, _ = two
    run, straight = folder / f"zero{stage}", folder / f"straight{stage}"
    shutil.copytree(run, straight)
    shutil.rmtree(run / "checkpoint-4")
    (run / "summary.json").unlink()
    earlier = (run / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    done = launch(stage, folder / f"zero{stage}.yaml")
    assert done.returncode == 0, done.stderr[-5000:]
    assert (run / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == earlier
    assert difference(run, straight) == 0.0
    assert torch.equal(
        *(torch.tensor([log["loss"] for log in logs_of(p) if "loss" in log]) for p in (run, straight))
    )


ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def lone_adapter(folder):
    """An adapter trained in one process; merged too."""
    done = forked.hpd("train", recipe(folder, "lone", 8, lora={"r": 4}))
    assert done.returncode == 0, done.stderr[-3000:]
    merge(folder / "lone")
    return folder / "lone"


def merge(run: Path) -> None:
    done = forked.hpd("export", run, "--merge", "--output", run.with_name(f"{run.name}-merged"))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_is_that_of_one_process_and_resumes(folder, lone_adapter, stage):
    run, straight = folder / f"adapter{stage}", folder / f"straight-adapter{stage}"
    file = recipe(folder, run.name, 4, lora={"r": 4})
    done = launch(stage, file)
    assert done.returncode == 0, done.stderr[-5000:]
    learned = [weight for name, weight in load_file(run / ADAPTER).items() if "lora_B" in name]
    assert max(float(weight.abs().max()) for weight in learned) > 1e-3
    assert difference(run, lone_adapter, ADAPTER) < 1e-5
    merge(run)
    assert difference(folder / f"{run.name}-merged", folder / "lone-merged") < 1e-5

    shutil.copytree(run, straight)
    shutil.rmtree(run / "checkpoint-4")
    (run / "summary.json").unlink()
    earlier = (run / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    done = launch(stage, file)
    assert done.returncode == 0, done.stderr[-5000:]
    assert (run / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == earlier
    assert difference(run, straight, ADAPTER) == 0.0


@pytest.mark.slow
def test_a_cache_is_that_of_one_process(folder):
    """Under ZeRO-3, whose processes gather the teacher together: small shards, so that both write some."""
    one, two = (folder / f"cache-{name}" for name in ("one", "zero3"))
    shards = {"shard_bytes": 4096}
    done = forked.hpd("cache", recipe(folder, "none", 4, cache={"path": str(one), **shards}))
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch(3, recipe(folder, "none3", 4, cache={"path": str(two), **shards}), "cache")
    assert done.returncode == 0, done.stderr[-5000:]
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in two.glob("*.safetensors"))
    assert len(names) > 2
    for name in names:
        assert difference(two, one, name) == 0.0
