"""How many of our hands a step passes through between the trainer and the maths, and in how many files."""

import json

import pytest
import torch
import yaml
from helpers.frames import way_to
from helpers.tiny_models import tiny_pair
from helpers.trainers import first_batch, make_trainer, rows
from typer.testing import CliRunner

from hpd.cli import app

# HOUSE.md's bounds, for frames and for files.
FROM_COMPUTE_LOSS = (9, 6)
FROM_THE_CLI = (15, 10)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def is_weights(code):
    return code.co_name == "weights" and "/hpd/objectives/" in code.co_filename


def within(way, bounds):
    assert (len(way.frames) <= bounds[0], len(way.files) <= bounds[1]) == (True, True), "\n".join(way.frames)


def test_from_compute_loss_to_the_weights(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, method="hpd", impl="chunked")
    batch = first_batch(trainer)
    way = way_to(is_weights, lambda: trainer.compute_loss(trainer.model.train(), batch))
    assert way.frames[0] == "training/trainer.py:compute_loss"
    assert way.frames[:3] == (
        "training/trainer.py:compute_loss",
        "models/forward.py:forward",
        "training/trainer.py:_loss",
    )
    within(way, FROM_COMPUTE_LOSS)


def test_from_the_command_line_to_the_weights(pair, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    train = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "max_length": 64,
        "use_cpu": True,
    }
    recipe = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "method": "hpd",
        "train": train,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = []
    way = way_to(
        is_weights, lambda: done.append(CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")]))
    )
    assert done[0].exit_code == 0, done[0].output
    assert way.frames[0] == "cli.py:train"
    within(way, FROM_THE_CLI)


def test_a_way_counts_frames_and_files_of_the_package_only():
    from hpd.objectives import reverse_kl

    log_p, log_q = torch.randn(2, 3, 7).log_softmax(-1)
    way = way_to(is_weights, lambda: reverse_kl().weights(log_p, log_q))
    assert [frame.partition(":")[2] for frame in way.frames] == ["weights"]
    assert len(way.files) == 1
    with pytest.raises(AssertionError, match="not called"):
        way_to(is_weights, lambda: None)
