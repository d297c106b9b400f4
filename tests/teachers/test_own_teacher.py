"""A teacher of one's own: the example's numbers, a recipe that names it, and what is refused."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers.trainers import first_batch, make_trainer
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd import load_recipe
from hpd.cli import app
from hpd.config.models import teacher_shorthand

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "extensions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "smoothed.py").write_text((FOLDER / "smoothed.py").read_text())
    (folder / "odd.py").write_text(
        "class Odd:\n    pass\n\n\ndef broken():\n    raise KeyError('no table')\n\n\nnumber = 3\n"
    )
    return folder


@pytest.fixture
def smoothed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from smoothed import Smoothed

    yield Smoothed
    sys.modules.pop("smoothed", None)


def recipe(folder, teacher, **more):
    return {
        "student": str(folder / "student"),
        "teacher": teacher,
        "method": "forward_kl",
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "max_length": 32,
            "metric_stride": 1,
            "logging_steps": 1,
        },
        "output_dir": str(folder / "run"),
        **more,
    }


def command(folder, monkeypatch, name, teacher, *words, **more):
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(json.dumps(recipe(folder, teacher, **more)))
    done = CliRunner().invoke(app, [name, "recipe.yaml", *words])
    for module in ("smoothed", "odd"):
        sys.modules.pop(module, None)
    return done


def test_forward_kl_to_smoothed_labels_is_label_smoothing(folder, smoothed, tmp_path):
    pair = (folder / "student", None)
    trainer = make_trainer(pair, tmp_path / "out", teacher=smoothed(epsilon=0.2), method="forward_kl")
    inputs = first_batch(trainer)
    batch = inputs.copy()
    loss = trainer.compute_loss(trainer.model, batch)
    (ours,) = torch.autograd.grad(loss, trainer.model.get_output_embeddings().weight)
    logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
    labels = inputs["labels"]
    expected_loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.2
    )
    (expected,) = torch.autograd.grad(expected_loss, trainer.model.get_output_embeddings().weight)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_recipe_names_it_by_its_module(folder, monkeypatch):
    done = command(folder, monkeypatch, "train", "smoothed:Smoothed", "--overwrite")
    assert done.exit_code == 0, done.output
    assert "the object smoothed:Smoothed" in done.output
    written = load_recipe(folder / "run" / "recipe.yaml").teacher
    assert (written.type, written.object) == ("object", "smoothed:Smoothed")
    # p = 0.9 + 0.1 / V at the label and 0.1 / V elsewhere: the teacher's entropy in closed form.
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    vocab = json.loads((folder / "run" / "config.json").read_text())["vocab_size"]
    other = 0.1 / vocab
    entropy = -(0.9 + other) * math.log(0.9 + other) - (vocab - 1) * other * math.log(other)
    logged = [line["teacher_entropy"] for line in lines if "teacher_entropy" in line]
    assert logged == pytest.approx([entropy] * len(logged), rel=1e-4)
    assert logged


def test_its_arguments_count(folder, monkeypatch):
    done = command(
        folder,
        monkeypatch,
        "doctor",
        {"type": "object", "object": "smoothed:Smoothed", "kwargs": {"epsilon": 0.3}},
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("smoothed:Nobody", "cannot be imported"),
        ("nowhere:Smoothed", "cannot be imported"),
        ("odd:number", "cannot be called"),
        ({"type": "object", "object": "smoothed:Smoothed", "kwargs": {"epsylon": 0.3}}, "epsylon"),
        ({"type": "object"}, "teacher.object is missing"),
        ({"type": "object", "object": "smoothed:Smoothed", "dtype": "bfloat16"}, "teacher.dtype is for type"),
        ({"type": "object", "object": "smoothed:Smoothed", "model": "x"}, "teacher.model is for type"),
        ({"model": "x", "kwargs": {"epsilon": 0.3}}, "teacher.kwargs is for type object"),
        (
            {
                "type": "mixture",
                "teachers": {"a": "smoothed:Smoothed", "b": "x"},
                "weights": {"a": 1, "b": 1},
            },
            "teacher.teachers.a is an object of your own",
        ),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_loads(folder, monkeypatch, teacher, said):
    done = command(folder, monkeypatch, "train", teacher, "--dry-run")
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("odd:Odd", "gave a Odd: derive it from hpd.teachers.Teacher"),
        ("odd:broken", "could not be made: KeyError: 'no table'"),
        (
            {"type": "object", "object": "smoothed:Smoothed", "kwargs": {"epsilon": 3}},
            "epsilon must be in (0, 1)",
        ),
    ],
    ids=str,
)
def test_one_that_cannot_be_made_is_a_sentence(folder, monkeypatch, teacher, said):
    done = command(folder, monkeypatch, "train", teacher, output_dir=str(folder / "none"))
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not (folder / "none").exists()


def test_commands_that_need_a_model_refuse_it(folder, monkeypatch):
    done = command(folder, monkeypatch, "cache", "smoothed:Smoothed", "cache.path=cache")
    assert done.exit_code == 2, done.output
    assert "object of your own" in done.output
    done = command(folder, monkeypatch, "generate", "smoothed:Smoothed", "generate.output=o.jsonl")
    assert done.exit_code == 2, done.output
    assert "writes nothing" in done.output


@pytest.mark.parametrize("text", ["org/model", "C:\\models\\x", "self", "./a:b/c", "model"])
def test_other_names_are_no_modules(text):
    assert teacher_shorthand(text)["type"] in ("model", "self")
