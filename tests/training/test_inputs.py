"""A run does not go on with other data, another teacher or another tokenizer than it began with."""

import json
import shutil

import pytest
import torch
import yaml
from helpers.forked import hpd
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pair

from hpd.files import checksum_samples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": "student",
        "teacher": "teacher",
        "data": {"path": "rows.jsonl"},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "max_length": 64,
        },
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert hpd("train", "recipe.yaml", cwd=folder).returncode == 0
    return folder


@pytest.fixture
def place(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    return folder


def lines(place):
    return (place / "rows.jsonl").read_text().splitlines(keepends=True)


def scale_teacher(place):
    file = place / "teacher" / "model.safetensors"
    save_file({n: t * 1.01 for n, t in load_file(file).items()}, file, {"format": "pt"})


def other_end(place):
    file = place / "student" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<|im_start|>"}))


CHANGES = {
    "rewritten": (
        lambda p: (p / "rows.jsonl").write_text("".join(lines(p)).replace("and", "or")),
        "training rows",
    ),
    "reordered": (lambda p: (p / "rows.jsonl").write_text("".join(reversed(lines(p)))), "training rows"),
    "doubled": (lambda p: (p / "rows.jsonl").write_text("".join(lines(p) * 2)), "training rows"),
    "cut": (lambda p: (p / "rows.jsonl").write_text("".join(lines(p)[:-2])), "training rows"),
    "teacher": (scale_teacher, "teacher"),
    "end token": (other_end, "tokenizer"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_named(place, name):
    change, named = CHANGES[name]
    change(place)
    done = hpd("train", "recipe.yaml", "train.max_steps=3", cwd=place)
    assert done.returncode == 2
    text = " ".join(done.stderr.split())
    assert f"its {named}" in text
    assert "--changed-inputs" in text
    assert (place / "run" / "summary.json").is_file()
    allowed = hpd("train", "recipe.yaml", "train.max_steps=3", "--changed-inputs", cwd=place)
    assert allowed.returncode == 0, allowed.stderr
    (note,) = [json.loads(line) for line in (place / "run" / "changes.jsonl").read_text().splitlines()]
    assert named in note["changed"]
    assert note["step"] == 2


def test_what_does_not_matter_may_change(place):
    """Copied files with other times, a student whose weights come from the checkpoint, an older folder."""
    for file in place.rglob("*"):
        file.touch()
    student = place / "student" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(student).items()}, student, {"format": "pt"})
    done = hpd("train", "recipe.yaml", "train.max_steps=3", cwd=place)
    assert done.returncode == 0, done.stderr
    (place / "run" / "inputs.json").unlink()
    assert hpd("train", "recipe.yaml", "train.max_steps=4", cwd=place).returncode == 0
    assert set(json.loads((place / "run" / "inputs.json").read_text())) == {
        *("training rows", "tokenizer", "chat template", "teacher")
    }


def test_the_base_of_an_adapter_is_compared(place):
    lora = ["lora={r: 2}", "output_dir=adapter"]
    assert hpd("train", "recipe.yaml", *lora, cwd=place).returncode == 0
    student = place / "student" / "model.safetensors"
    save_file({n: t * 1.01 for n, t in load_file(student).items()}, student, {"format": "pt"})
    done = hpd("train", "recipe.yaml", *lora, "train.max_steps=3", cwd=place)
    assert done.returncode == 2
    assert "its student" in " ".join(done.stderr.split())


def test_samples_notice_a_file_that_was_rewritten(tmp_path):
    file = tmp_path / "weights.safetensors"
    values = torch.randn(3_000_000)
    save_file({"a": values}, file)
    before = checksum_samples(file)
    assert checksum_samples(file) == before
    save_file({"a": values * 1.01}, file)
    assert checksum_samples(file) != before
