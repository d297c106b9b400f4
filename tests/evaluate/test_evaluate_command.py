"""`hpd eval` as users run it: several models and tasks, metrics."""

import json
from pathlib import Path

import pytest
from helpers import forked
from tiny_models import tiny_pair


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    tiny_pair("qwen2", folder)
    rows = [{"question": f"add {i} and {i}:", "answer": f"#### {2 * i}"} for i in range(6)]
    for name, texts in (
        ("problems.jsonl", rows),
        ("texts.jsonl", [{"prompt": r["question"], "completion": r["answer"]} for r in rows]),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def hpd(folder: Path, *arguments: object):
    return forked.hpd("eval", *arguments, cwd=folder)


def test_models_side_by_side_with_a_paired_test(workspace):
    done = hpd(
        workspace,
        "student",
        "teacher",
        "--tasks",
        "gsm8k=problems.jsonl,exact-match=problems.jsonl",
        "--max-new-tokens",
        4,
        "--samples",
        2,
        "--temperature",
        1,
        "--output",
        "both",
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "student",
        "teacher",
        "against first",
        "pass@2",
        "maj@2",
        "6 problems, 2 samples each",
        "signs of the problems' differences",
    ):
        assert text in done.stdout, text
    entries = json.loads((workspace / "both" / "evals.json").read_text())
    assert [(entry["model"], entry["task"]) for entry in entries] == [
        (model, task) for model in ("student", "teacher") for task in ("gsm8k", "exact-match")
    ]
    assert len((workspace / "both" / "records-gsm8k.jsonl").read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student", "--tasks", "gsm8j"], "Did you mean 'gsm8k'"),
        (["student", "student", "--data", "problems.jsonl"], "named twice"),
        (
            ["student", "--data", "problems.jsonl", "--engine", "vllm"],
            "pip install 'hybrid-policy-distillation[vllm]'",
        ),
        (["student", "--data", "problems.jsonl", "--tensor-parallel", 2], "needs --engine vllm"),
        (
            ["student", "--data", "problems.jsonl", "--eager", "--memory-share", 0.5],
            "--memory-share, --eager: vLLM's, and the engine is transformers",
        ),
        (
            ["student", "--data", "problems.jsonl", "--engine", "vllm", "--memory-share", 2],
            "memory_share must be in (0, 1], got 2.0",
        ),
        (["student", "--data", "problems.jsonl", "--teacher", "teacher"], "--teacher has no effect"),
        (["student", "--metrics", "kl", "--data", "texts.jsonl"], "give one with --teacher"),
        (
            ["student", "--metrics", "entropy", "--data", "texts.jsonl", "--few-shot", 2],
            "--few-shot has no effect on --metrics",
        ),
        (["student", "--harness", "other", "--tasks", "x"], "Unknown harness"),
        (
            ["student", "--harness", "lm-eval", "--tasks", "x", "--preset", "paper"],
            "--preset has no effect on --harness",
        ),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_paragraph(workspace, arguments, message):
    done = hpd(workspace, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_metrics_of_the_distribution(workspace):
    done = hpd(
        workspace,
        "student",
        "--metrics",
        "kl,entropy",
        "--teacher",
        "teacher",
        "--data",
        "texts.jsonl",
        "--limit",
        4,
        "--max-new-tokens",
        8,
        "--output",
        "metrics",
    )
    assert done.returncode == 0, done.stderr
    assert "forward kl" in done.stdout
    (entry,) = json.loads((workspace / "metrics" / "evals.json").read_text())
    assert (entry["model"], entry["teacher"], entry["metrics"]) == ("student", "teacher", ["kl", "entropy"])
    assert entry["distribution"]["dataset"]["forward_kl"]["value"] > 0
