"""One small grid, really run by `hpd compare`, that the tests of comparison and report share."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from tiny_models import tiny_pair

__all__ = ["SCRIPT", "command", "tiny_experiment", "tiny_grid"]

SCRIPT = "<script>document.title = 'owned'</script>"
"""Stands in a prompt of the test file, so the report must escape it."""
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def command(*arguments):
    """`hpd ARGUMENTS` in this process, where everything is imported already."""
    from typer.testing import CliRunner

    from hpd.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tiny_experiment(folder: Path, **changes) -> Path:
    """Models, data and an experiment file of 2 methods x 2 seeds under `folder`; returns the file."""
    if not (folder / "student").exists():
        tiny_pair("llama", folder)
        rows = [
            {"prompt": f"say {w}:", "completion": f" {' '.join(_WORDS[i:])}"} for i, w in enumerate(_WORDS)
        ] * 3
        problems = [
            {"prompt": f"say {w}: {SCRIPT * (i == 0)}", "answer": "ten"} for i, w in enumerate(_WORDS[:6])
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    experiment = {
        "name": "tiny",
        "question": "Is it <b>calm</b> & readable?",
        "base": {
            "student": str(folder / "student"),
            "teacher": str(folder / "teacher"),
            "data": {"path": str(folder / "rows.jsonl"), "validation": 0.2},
            "train": {
                "per_device_train_batch_size": 4,
                "logging_steps": 2,
                "gradient_checkpointing": False,
                "learning_rate": 1e-2,
                "max_length": 64,
                "save_strategy": "no",
                "eval_strategy": "steps",
                "eval_steps": 4,
                "lr_scheduler_type": "cosine",
            },
        },
        "axes": {"method": ["hpd", "forward_kl"], "seed": [0, 1]},
        "budget": {"type": "steps", "value": 12},
        "tune": {
            "path": "train.weight_decay",
            "values": [0.0, 0.1],
            "seeds": [7],
            "metric": "forward_kl",
            "per": ["method"],
        },
        "evals": [{"name": "accuracy", "data": str(folder / "problems.jsonl"), "max_new_tokens": 6}],
        "own_samples": 4,
        "baseline": "forward_kl",
        "metrics": ["accuracy", "forward_kl"],
        "reach": {"forward_kl": 100.0},
        "output_dir": str(folder / "grid"),
        **changes,
    }
    path = folder / f"{experiment['name']}.yaml"
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


def tiny_grid(tmp_path_factory) -> Path:
    """The folder of the finished grid; built once per test session."""
    folder = tmp_path_factory.getbasetemp() / "tiny-grid"
    if not (folder / "grid" / "report" / "index.html").is_file():
        folder.mkdir(exist_ok=True)
        done = command("compare", tiny_experiment(folder))
        assert done.exit_code == 0, done.output
        assert "report:" in done.stdout
    return folder / "grid"
