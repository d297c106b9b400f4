"""A run goes on: with more steps, under other logging and guards, and under no other recipe."""

import json
import shutil

import pytest
import torch
import yaml
from helpers.forked import hpd
from safetensors.torch import load_file
from tiny_models import tiny_pair

from hpd.training.checkpoints import mark_complete, newest_complete


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("going_on")
    student, teacher = tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.25},
        "method": "hpd",
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "max_length": 64,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def run(place, tmp_path):
    """The finished run of four steps, in a folder of its own."""
    folder = tmp_path / "run"
    done = train(place, folder)
    assert done.returncode == 0, done.stderr
    return folder


def train(place, run, *overrides):
    return hpd("train", place / "recipe.yaml", f"output_dir={run}", *overrides)


def said(done) -> str:
    return " ".join((done.stdout + done.stderr).split())


def logs(run, key="loss"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_more_steps_are_those_of_a_longer_run(place, run, tmp_path):
    done = train(place, run, "train.max_steps=9")
    assert done.returncode == 0, done.stderr
    straight = tmp_path / "straight"
    assert train(place, straight, "train.max_steps=9").returncode == 0
    ours, theirs = load_file(run / "model.safetensors"), load_file(straight / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logs(run) == logs(straight)
    assert json.loads((run / "summary.json").read_text())["steps"] == 9
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["max_steps"] == 9
    (note,) = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert (note["step"], note["changed"]) == (4, {"train.max_steps": [4, 9]})
    again = train(place, run, "train.max_steps=9")
    assert again.returncode == 2
    assert "finished" in said(again)


def test_more_epochs(place, tmp_path):
    """Three steps an epoch, and the end of the first run's last epoch is done once."""
    epochs = ["train.max_steps=-1", "train.logging_strategy=epoch"]
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert train(place, run, *epochs, "train.num_train_epochs=1").returncode == 0
    done = train(place, run, *epochs, "train.num_train_epochs=3")
    assert done.returncode == 0, done.stderr
    assert train(place, straight, *epochs, "train.num_train_epochs=3").returncode == 0
    assert logs(run) == logs(straight)
    assert sorted(logs(run)) == [3, 6, 9]
    ours, theirs = load_file(run / "model.safetensors"), load_file(straight / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_learning_rate_follows_the_longer_schedule(place, tmp_path):
    run = tmp_path / "run"
    linear = "train.lr_scheduler_type=linear"
    assert train(place, run, linear).returncode == 0
    assert logs(run, "learning_rate")[4] == pytest.approx(0.01 / 4)
    assert train(place, run, linear, "train.max_steps=8").returncode == 0
    expected = {step: 0.01 * (1 - (step - 1) / (4 if step <= 4 else 8)) for step in range(1, 9)}
    assert logs(run, "learning_rate") == pytest.approx(expected)
    # The step right after is taken at that rate, not at the zero that the first schedule ended with.
    before, after = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (4, 8))
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_the_first_step_after_a_finished_schedule_moves(place, tmp_path):
    run = tmp_path / "run"
    linear = ["train.lr_scheduler_type=linear", "train.save_steps=1"]
    assert train(place, run, *linear).returncode == 0
    assert train(place, run, *linear, "train.max_steps=5").returncode == 0
    four, five = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (4, 5))
    assert not torch.equal(four["model.norm.weight"], five["model.norm.weight"])


def test_without_a_checkpoint_it_says_so(place, tmp_path):
    run = tmp_path / "run"
    assert train(place, run, "train.save_strategy=no").returncode == 0  # text, though YAML reads a false
    assert not list(run.glob("checkpoint-*"))
    before = contents(run)
    done = train(place, run, "train.save_strategy=no", "train.max_steps=8")
    assert done.returncode == 2
    assert "no checkpoint to do more steps from" in said(done)
    assert contents(run) == before


def test_logging_and_guards_may_change(place, run):
    done = train(place, run, "train.max_steps=8", "train.logging_steps=2", "guards.repetition.warn=0.9")
    assert done.returncode == 0, done.stderr
    assert sorted(logs(run)) == [1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.learning_rate=0.5"], "(train.learning_rate: 0.01 -> 0.5; before -> now)"),
        (["method=akl", "train.max_steps=8"], "(method: 'hpd' -> 'akl'; before -> now)"),
        (["train.weight_decay=0.1"], "train.weight_decay: not given -> 0.1"),
        (["train.max_steps=2"], "train.max_steps: 4 -> 2"),
        (["train.max_steps=8", "train.seed=3"], "(train.seed: not given -> 3;"),
        (["train.lerning_rate=2"], "did you mean 'learning_rate'"),
        ([], "finished. Continue with more steps"),
        (["train.logging_steps=2"], "finished. Continue with more steps"),
    ],
)
def test_another_recipe_is_refused_by_its_keys(place, changes, message):
    run = place / "finished"
    if not run.exists():
        assert train(place, run).returncode == 0
    before = contents(run)
    done = train(place, run, *changes)
    assert done.returncode == 2
    assert message in said(done)
    # Deleting is the last thing that is offered.
    assert "--overwrite" not in said(done) or said(done).index("output_dir") < said(done).index("--overwrite")
    assert contents(run) == before


def test_a_run_in_the_middle_may_grow(place, run):
    (run / "summary.json").unlink()
    done = train(place, run, "train.max_steps=6")
    assert done.returncode == 0, done.stderr
    assert sorted(logs(run)) == [1, 2, 3, 4, 5, 6]


def test_a_kill_between_the_two_recipes_leaves_a_run_that_goes_on(place, run):
    """The old summary goes first: what is left is the old recipe, unfinished."""
    (run / "summary.json").unlink()
    assert train(place, run).returncode == 0
    assert (run / "summary.json").is_file()


def test_stages_do_not_grow(place, tmp_path):
    run = tmp_path / "run"
    stages = "stages=[{name: a}, {name: b, method: sft}]"
    assert train(place, run, stages, "train.max_steps=2").returncode == 0
    done = train(place, run, stages, "train.max_steps=4")
    assert done.returncode == 2
    assert "train.max_steps: 2 -> 4" in said(done)
    shutil.rmtree(run)


def test_another_number_of_processes_is_refused_before_a_model_loads(place, run):
    """A checkpoint with the files of two; test_distributed.py has one that two have written."""
    checkpoint = newest_complete(run)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    (checkpoint / "complete.json").unlink()
    mark_complete(checkpoint, {"step": 4})
    before = contents(run)
    done = train(place, run, "train.max_steps=9")
    assert done.returncode == 2
    assert "was written by a launch of 2 processes, and this one has 1: a step would see" in said(done)
    assert "student" not in done.stdout
    assert contents(run) == before
