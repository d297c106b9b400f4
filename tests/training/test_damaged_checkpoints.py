"""A checkpoint of the right sizes and the wrong content: one paragraph that names the file, and nothing is
deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd.cli import app
from hpd.config import load_recipe
from hpd.training.checkpoints import CheckpointUnreadable, mark_complete, newest_complete
from hpd.training.run import train


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of which summary and student are not written yet, with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("damaged")
    student, teacher = tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i + 1}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl")},
        "method": "opd",
        "prefixes": {"student": 0.5},
        "rollouts": {"max_new_tokens": 4, "replay": {"capacity": 8, "fresh": 0.5}},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 4,
            "gradient_checkpointing": False,
            "max_length": 64,
            "save_strategy": "steps",
            "save_steps": 2,
            "use_cpu": True,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(folder / "recipe.yaml"))
    for name in ("summary.json", "model.safetensors"):
        (folder / "run" / name).unlink()
    shutil.move(folder / "run", folder / "kept")
    return folder


@pytest.fixture
def run(stopped) -> Path:
    shutil.rmtree(stopped / "run", ignore_errors=True)
    shutil.copytree(stopped / "kept", stopped / "run")
    return stopped / "run"


def resume(run: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        app, ["train", str(run.parent / "recipe.yaml"), *words], env={"NO_COLOR": "1", "TERM": "dumb"}
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr.strip()


def contents(folder: Path) -> dict[str, bytes]:
    """All but the time of the last attempt."""
    return {
        str(path): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "environment.json"
    }


def garbage(start: int, length: int = 200):
    """Other bytes in the place of as many."""

    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        at = start % len(content)
        end = min(at + length, len(content))
        content[at:end] = bytes((7 * i + 165) % 256 for i in range(end - at))
        file.write_bytes(content)

    return change


def edited(change):
    """A JSON file with other content, filled up or cut to its size by spaces."""

    def apply(file: Path) -> None:
        size, tree = file.stat().st_size, json.loads(file.read_text())
        text = json.dumps(change(tree))
        assert len(text) <= size
        file.write_text(text.ljust(size))

    return apply


def retorched(change):
    def apply(file: Path) -> None:
        found = torch.load(file, weights_only=True)
        torch.save(change(found), file)
        mark_complete(file.parent, {"step": 4, "evaluation": None})  # sizes are right again

    return apply


def renamed(file: Path) -> None:
    tensors = load_file(file)
    save_file(
        {name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items()},
        file,
        {"format": "pt"},
    )
    mark_complete(file.parent, {"step": 4, "evaluation": None})


def reshaped(file: Path) -> None:
    save_file({name: tensor[:1].clone() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    mark_complete(file.parent, {"step": 4, "evaluation": None})


DAMAGES = {
    "state, first bytes": ("trainer_state.json", garbage(0)),
    "state, no object": ("trainer_state.json", edited(lambda tree: [1, 2])),
    "state, unknown key": (
        "trainer_state.json",
        edited(lambda tree: {**tree, "log_history": [], "os": "rm"}),
    ),
    "state, of another step": ("trainer_state.json", edited(lambda tree: {**tree, "global_step": 3})),
    "state, step is text": ("trainer_state.json", edited(lambda tree: {**tree, "global_step": "4"})),
    "state, history of numbers": ("trainer_state.json", edited(lambda tree: {**tree, "log_history": [1]})),
    "state, history without steps": (
        "trainer_state.json",
        edited(lambda tree: {**tree, "log_history": [{"loss": 1.0}]}),
    ),
    "state, callbacks": ("trainer_state.json", edited(lambda tree: {**tree, "stateful_callbacks": 3})),
    "config": ("config.json", garbage(10)),
    "weights, header": ("model.safetensors", garbage(0)),
    "weights, header's JSON": ("model.safetensors", garbage(8)),
    "weights, other names": ("model.safetensors", renamed),
    "weights, other shapes": ("model.safetensors", reshaped),
    "optimizer, first bytes": ("optimizer.pt", garbage(0)),
    "optimizer, in its numbers": ("optimizer.pt", garbage(120_000)),
    "optimizer, last bytes": ("optimizer.pt", garbage(-200)),
    "optimizer, other groups": (
        "optimizer.pt",
        retorched(lambda state: {**state, "param_groups": state["param_groups"][:1]}),
    ),
    "optimizer, no groups": ("optimizer.pt", retorched(lambda state: {})),
    "optimizer, a list": ("optimizer.pt", retorched(lambda state: [state])),
    "schedule": ("scheduler.pt", garbage(300)),
    "random numbers": ("rng_state.pth", garbage(5000)),
    "own state": ("state-rank0.pt", garbage(700)),
    "own state, none": ("state-rank0.pt", retorched(lambda state: {})),
    "own state, no replay": ("state-rank0.pt", retorched(lambda state: {**state, "on_policy": {}})),
    "own state, no loss": (
        "state-rank0.pt",
        retorched(lambda state: {**state, "window": {"last_logged": 4}}),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_file_is_named_and_nothing_is_deleted(run, name):
    file, damage = DAMAGES[name]
    damage(run / "checkpoint-4" / file)
    before = contents(run)
    code, text = resume(run)
    assert code == 2, text
    assert len(text.splitlines()) == 1
    assert f"error: {file} of the checkpoint {run / 'checkpoint-4'} cannot be read: " in text
    assert (
        "Delete that folder to resume from the one before, checkpoint-2, or start the run again with "
        "--overwrite." in text
    )
    assert contents(run) == before


def test_what_the_error_says_works(run):
    garbage(0)(run / "checkpoint-4" / "optimizer.pt")
    shutil.rmtree(run / "checkpoint-4")
    assert resume(run)[0] == 0
    assert (run / "checkpoint-4" / "complete.json").is_file()


def test_without_an_earlier_checkpoint(run):
    shutil.rmtree(run / "checkpoint-2")
    garbage(0)(run / "checkpoint-4" / "trainer_state.json")
    code, text = resume(run)
    assert code == 2
    assert "Delete that folder to begin again with the first step, since there is none before it" in text


def test_a_pickle_that_would_run_a_program_is_refused_and_not_run(run, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state": Payload()}, run / "checkpoint-4" / "optimizer.pt")
    mark_complete(run / "checkpoint-4", {"step": 4, "evaluation": None})
    code, text = resume(run)
    assert code == 2
    assert "optimizer.pt" in text
    assert "holds more than tensors" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["garbage", "[]", '{"bytes": 3}', "{}"])
def test_a_damaged_list_of_files_is_no_complete_checkpoint(run, caplog, content):
    (run / "checkpoint-4" / "complete.json").write_text(content)
    assert newest_complete(run) == run / "checkpoint-2"
    assert "checkpoint-4 is incomplete" in caplog.text


def test_damaged_notes_of_the_run_are_named(run):
    (run / "baselines.json").write_text("{")
    code, text = resume(run)
    assert code == 2
    assert f"{run / 'baselines.json'} is damaged" in text


def test_the_trainer_says_the_same(run):
    garbage(0)(run / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(CheckpointUnreadable, match=r"optimizer.pt of the checkpoint .* checkpoint-2"):
        train(load_recipe(run.parent / "recipe.yaml"))
