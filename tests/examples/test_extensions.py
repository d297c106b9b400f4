"""The example of an objective, a teacher and a task of one's own, run as its page says."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd import distillation_loss
from hpd.cli import app

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "extensions"


@pytest.fixture
def chi_square(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from chi_square import chi_square

    yield chi_square
    sys.modules.pop("chi_square", None)


def test_its_weight_is_the_gradient_of_its_value(chi_square):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels = torch.zeros(1, 6, dtype=torch.long)
    loss, _ = distillation_loss(student, teacher, labels, objective=chi_square())
    (ours,) = torch.autograd.grad(loss, student)
    p, q = teacher[0, :-1].softmax(-1), student[0, :-1].softmax(-1)
    (expected,) = torch.autograd.grad(((p - q) ** 2 / q).sum(-1).mean(), student)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_a_run_finds_all_three_next_to_the_recipe(tmp_path, monkeypatch):
    student, _ = tiny_pair("llama", tmp_path)
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    changes = [
        f"student={student}",
        "teacher=smoothed:Smoothed",
        "data.path=rows.jsonl",
        "train={max_steps: 2, per_device_train_batch_size: 4, gradient_checkpointing: false, max_length: 32}",
        f"eval.data={FOLDER / 'words.jsonl'}",
        "output_dir=run",
    ]
    done = CliRunner().invoke(app, ["train", str(FOLDER / "recipe.yaml"), *changes])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "run" / "evals.json").read_text())
    assert {entry["task"] for entry in figures} == {"reversal"}
    assert all(entry["num_examples"] == 3 for entry in figures)
    assert "chi_square:chi_square" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_an_evaluation_finds_the_task_in_the_working_folder(tmp_path, monkeypatch):
    student, _ = tiny_pair("llama", tmp_path)
    monkeypatch.chdir(FOLDER)
    output = tmp_path / "evals"
    arguments = [
        str(student),
        "--tasks",
        "reversal:Reversal",
        "--data",
        "words.jsonl",
        "--output",
        str(output),
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0, done.output
    assert "letters" in done.output
    assert f"next: hpd chat {student}" in done.output
