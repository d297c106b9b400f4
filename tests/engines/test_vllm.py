"""vLLM for real: its CPU build answers, serves, and writes rollouts. `make test-engines`.

vLLM's CPU kernels want heads of 32 numbers or more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers.sockets import free_port, padded
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.engines


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Not where the file is read: a run without these tests must not skip it."""
    pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"), head_dim=32)


def environment(**more: str) -> dict[str, str]:
    """One engine is a few hundred MiB of weights and cache here; vLLM would take half of the memory."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "TERM": "dumb",
        **more,
    }


def hpd(*arguments: object, timeout: float = 600, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpd", *map(str, arguments)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=timeout)


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """`vllm serve`, as a user starts it; yields the address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                with contextlib.suppress(urllib.error.URLError, OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def served(pair, tmp_path_factory):
    with serving(pair[1], tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


def test_its_answers_are_those_of_transformers(pair, tmp_path):
    """Greedy, token for token, under --dtype auto: vLLM's own auto would halve the float32 weights."""
    problems = [{"prompt": f"say {i}:", "answer": str(i)} for i in range(8)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    common = ("eval", pair[1], "--data", file, "--max-new-tokens", 24)
    vllm = ("--engine", "vllm", "--max-length", 128, "--eager")
    for engine, options in (("transformers", ()), ("vllm", vllm)):
        done = hpd(*common, *options, "--output", tmp_path / engine)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{engine} in float32" in done.stdout
    texts, entries = {}, {}
    for engine in ("transformers", "vllm"):
        lines = (tmp_path / engine / "records-exact-match.jsonl").read_text().splitlines()
        texts[engine] = [json.loads(line)["text"] for line in lines]
        (entries[engine],) = json.loads((tmp_path / engine / "evals.json").read_text())
    assert texts["vllm"] == texts["transformers"]
    assert entries["vllm"]["dtype"] == entries["transformers"]["dtype"] == "float32"
    assert entries["vllm"]["mean_tokens"] == entries["transformers"]["mean_tokens"]


@pytest.mark.parametrize("protocol", ["openai", "echo"])
def test_its_teacher_is_the_live_one(pair, served, protocol):
    from hpd.config import TeacherConfig
    from hpd.losses.products import logits
    from hpd.teachers.model import ModelTeacher
    from hpd.teachers.remote.server import ServedTeacher

    teacher = ServedTeacher(
        TeacherConfig(type="server", url=served, model="tiny", protocol=protocol, top_k=10), 300
    )
    teacher.connect(AutoTokenizer.from_pretrained(pair[0]))
    teacher._client.prepare(torch.device("cpu"))
    inputs, batch = padded("left")
    found = teacher.scores(inputs, batch)
    live = ModelTeacher(AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32))
    plain = {name: value for name, value in inputs.items() if not name.startswith("label")}
    expected = logits(live.scores(plain, batch)).log_softmax(-1)
    teacher.close()
    torch.testing.assert_close(
        found.label_logprobs, expected.gather(1, batch.labels[:, None])[:, 0], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(found.logprobs, expected.gather(1, found.tokens), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logprobs, expected.topk(10, -1).values, rtol=0, atol=1e-4)


def recipe(pair, folder: Path, **changes) -> Path:
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "save_strategy": "no",
            "metric_stride": 1,
        },
        "output_dir": str(folder / "run"),
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def test_it_writes_training_data(pair, served, tmp_path):
    teacher = {"type": "server", "url": served, "model": "tiny"}
    settings = {"output": str(tmp_path / "made.jsonl"), "max_new_tokens": 12, "truncated": "keep"}
    done = hpd("generate", recipe(pair, tmp_path, teacher=teacher, generate={**settings, "temperature": 0}))
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    for row in made:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["completion"] == tokenizer.decode(written, skip_special_tokens=True)


def test_training_from_its_log_probabilities_equals_the_live_teacher(pair, served, tmp_path):
    terms = [{"objective": "forward_kl", "support": "label+top_k", "top_k": 8}]
    losses = {}
    for name, teacher in (
        ("live", str(pair[1])),
        ("served", {"type": "server", "url": served, "model": "tiny", "top_k": 8}),
    ):
        (tmp_path / name).mkdir()
        done = hpd("train", recipe(pair, tmp_path / name, teacher=teacher, terms=terms))
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()
        losses[name] = [log["loss"] for log in map(json.loads, lines) if "loss" in log]
    assert len(losses["live"]) == 3
    assert losses["served"] == pytest.approx(losses["live"], rel=1e-4)


def colocated(*arguments: object) -> dict:
    command = [sys.executable, str(ROOT / "tests/helpers/colocated.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_colocated_rollouts_follow_the_weights(pair):
    """Plain sampling: vLLM's log-probabilities are those of the student after each update."""
    found = colocated("rollouts", pair[0], 1.0)
    assert max(found["largest"]) < 1e-3
    assert min(found["logprobs"]) > 12


def test_log_probabilities_of_a_reshaped_draw_are_left_out(pair):
    assert colocated("rollouts", pair[0], 0.5)["logprobs"] == [0, 0, 0]


def test_importance_replay_of_its_rollouts(pair, tmp_path):
    """Ratios against the log-probabilities that vLLM gave: on the weights that wrote they are one."""
    changes = {
        "method": "opd",
        "strategy": {"type": "policy_gradient"},
        "rollouts": {
            "engine": "vllm",
            "max_new_tokens": 12,
            "replay": {"capacity": 8, "importance": True},
            "vllm": {"max_model_length": 128, "max_num_seqs": 8, "enforce_eager": True},
        },
    }
    summary = colocated("train", recipe(pair, tmp_path, **changes))
    assert summary["steps"] == 3
    assert summary["generated tokens"] > 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    logs = [log for log in map(json.loads, lines) if "loss" in log]
    assert len(logs) == 3
    assert logs[0]["policy/clipped"] == 0.0
    assert abs(logs[0]["policy/kl_old"]) < 1e-6
