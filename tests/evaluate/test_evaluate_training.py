"""Tasks in a recipe: schedules, logs, the best checkpoint, and training that goes on as if nothing had
happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_pair

from hpd.config import load_recipe
from hpd.training.plan import plan
from hpd.training.run import train


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows[:6]]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return folder


def _recipe(workspace: Path, output: str, evals, **training):
    return load_recipe(
        {
            "student": str(workspace / "student"),
            "teacher": str(workspace / "teacher"),
            "data": {"path": str(workspace / "rows.jsonl")},
            "eval": evals,
            "output_dir": str(workspace / output),
            "train": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "gradient_checkpointing": False,
                "learning_rate": 1e-2,
                "max_length": 64,
                "save_strategy": "no",
                **training,
            },
        }
    )


def _task(workspace: Path, **fields) -> dict:
    return {"task": "exact-match", "data": str(workspace / "problems.jsonl"), "max_new_tokens": 6, **fields}


def _logs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tasks_run_at_their_steps_and_training_does_not_notice(workspace):
    evals = [
        _task(workspace, every=2, limit=4, limit_seed=1),
        {
            "task": "gsm8k",
            "data": str(workspace / "problems.jsonl"),
            "max_new_tokens": 4,
            "every": "epoch",
            "temperature": 1.0,
        },
    ]
    (workspace / "problems.jsonl").touch()
    summary = train(_recipe(workspace, "watched", evals))
    logs = _logs(workspace / "watched")
    assert [log["step"] for log in logs if "eval_exact_match_accuracy" in log] == [2, 4]
    assert all(
        {"eval_exact_match_tokens", "eval_exact_match_truncated"} <= log.keys()
        for log in logs
        if "eval_exact_match_accuracy" in log
    )
    assert [log["step"] for log in logs if "eval_gsm8k_accuracy" in log] == [
        4
    ]  # 24 rows in steps of 4: the epoch is cut at 4
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3, 4]
    names = {
        (entry["model"], entry["task"])
        for entry in json.loads((workspace / "watched" / "evals.json").read_text())
    }
    assert {
        ("student step 2", "exact-match"),
        ("student step 4", "exact-match"),
        ("teacher", "gsm8k"),
    } <= names
    assert {"student before exact_match_accuracy", "student after gsm8k_accuracy"} <= summary.keys()
    train(_recipe(workspace, "alone", None))
    watched, alone = (load_file(workspace / name / "model.safetensors") for name in ("watched", "alone"))
    assert all(torch.equal(watched[name], alone[name]) for name in alone)
    losses = [
        [log["loss"] for log in _logs(workspace / name) if "loss" in log] for name in ("watched", "alone")
    ]
    assert losses[0] == losses[1]


def test_the_checkpoint_that_does_best_on_a_task_is_kept(workspace, monkeypatch):
    from hpd.evaluate.benchmarks.exact_match import ExactMatch
    from hpd.evaluate.task import Verdict

    calls = []

    def grade(self, examples, answers):
        """The second evaluation in training is the best one."""
        calls.append(len(answers))
        right = {2: 1, 3: 5, 4: 2, 5: 2}.get(len(calls) - 1, 0)
        return [Verdict(correct=index < right) for index in range(len(answers))]

    monkeypatch.setattr(ExactMatch, "grade", grade)
    training = {
        "save_strategy": "best",
        "metric_for_best_model": "exact_match_accuracy",
        "load_best_model_at_end": True,
    }
    summary = train(_recipe(workspace, "best", _task(workspace, every=1), **training))
    assert sorted(path.name for path in (workspace / "best").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    kept, best = (
        load_file(workspace / "best" / name)
        for name in ("model.safetensors", "checkpoint-2/model.safetensors")
    )
    assert all(torch.equal(kept[name], best[name]) for name in kept)
    assert "student after accuracy" in summary


@pytest.mark.parametrize(
    ("fields", "training", "message"),
    [
        ({"data": "missing.jsonl"}, {}, "no data file missing.jsonl"),
        ({"options": {"color": 1}}, {}, "has no option 'color'"),
        ({"limit_seed": 1}, {}, "limit_seed has no effect"),
        ({}, {"metric_for_best_model": "exact_match_accuracy"}, "has no `every`"),
        ({"num_samples": 3}, {}, "would write the same answer 3 times"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(workspace, fields, training, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(_recipe(workspace, "never", _task(workspace, **fields), **training))


def test_one_task_or_a_list_or_none(workspace):
    assert _recipe(workspace, "x", None).eval == ()
    one, many = _recipe(workspace, "x", _task(workspace)), _recipe(workspace, "x", [_task(workspace)])
    assert one.eval == many.eval
    with pytest.raises(ValueError, match="names a task twice"):
        _recipe(workspace, "x", [_task(workspace), _task(workspace)])
    with pytest.raises(ValueError, match=r"eval\.every must be 1 or more"):
        _recipe(workspace, "x", _task(workspace, every=0))


@pytest.mark.slow
def test_two_processes_answer_what_one_does(workspace):
    results = {}
    for processes in (1, 2):
        tree = {
            "student": str(workspace / "student"),
            "teacher": str(workspace / "teacher"),
            "data": {"path": str(workspace / "rows.jsonl")},
            "output_dir": str(workspace / f"ranks{processes}"),
            "eval": _task(workspace, every=1, batch_size=2, temperature=1.0, num_samples=2),
            "train": {
                "max_steps": 1,
                "per_device_train_batch_size": 4 // processes,
                "gradient_checkpointing": False,
                "learning_rate": 0.0,
                "max_length": 64,
                "save_strategy": "no",
                "use_cpu": True,
            },
        }
        recipe = workspace / f"ranks{processes}.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_machines",
            "1",
            "--num_processes",
            str(processes),
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
            "hpd",
            "train",
            str(recipe),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        evals = {
            entry["model"]: entry["id"]
            for entry in json.loads((workspace / f"ranks{processes}" / "evals.json").read_text())
        }
        lines = (workspace / f"ranks{processes}" / "records-exact-match.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        results[processes] = [
            (r["id"], r["sample"], r["text"]) for r in records if r["eval"] == evals["student step 1"]
        ]
    assert len(results[1]) == 12
    assert results[1] == results[2]
