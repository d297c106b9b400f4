"""A run does not go on with other data, another teacher or another tokenizer than it began with."""

import json
import shutil

import pytest
import torch
import yaml
from helpers.forked import hpd
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pair

from hpd.config import load_recipe
from hpd.files import checksum_samples
from hpd.training.folder import RunFolder


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


def other_generation(place):
    (place / "student" / "generation_config.json").write_text('{"eos_token_id": 7}')


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
    "end of generation": (other_generation, "student's configuration"),
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
        *("training rows", "tokenizer", "chat template", "teacher", "student's configuration")
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


def refused(place, *words):
    done = hpd("train", "recipe.yaml", *words, cwd=place)
    assert done.returncode == 2, done.stderr
    return " ".join(done.stderr.split())


def test_what_a_cache_holds_is_compared(place):
    words = ["teacher={type: cached}", "cache.path=cache", "output_dir=of-cache"]
    assert hpd("cache", "recipe.yaml", "cache.path=cache", cwd=place).returncode == 0
    done = hpd("train", "recipe.yaml", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    scale_teacher(place)
    assert hpd("cache", "recipe.yaml", "cache.path=cache", "--overwrite", cwd=place).returncode == 0
    assert "its teacher" in refused(place, *words, "train.max_steps=3")


def test_the_problems_of_a_task_are_compared(place):
    problems = place / "problems.jsonl"
    problems.write_text('{"prompt": "one", "answer": "two"}\n')
    words = ["eval=[{task: exact-match, data: problems.jsonl, max_new_tokens: 2}]", "output_dir=of-task"]
    done = hpd("train", "recipe.yaml", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    problems.write_text('{"prompt": "one", "answer": "three"}\n')
    assert "its problems of exact_match_accuracy" in refused(place, *words, "train.max_steps=3")


def test_the_files_of_a_stream_are_compared(place):
    words = ["data.streaming=true", "output_dir=of-stream"]
    done = hpd("train", "recipe.yaml", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    CHANGES["reordered"][0](place)
    assert "its training rows" in refused(place, *words, "train.max_steps=3")


def test_an_input_may_not_change_between_two_stages(place):
    """The first stage is done, and the others have not begun."""
    pairs = [{"prompt": "a", "chosen": f" {i}", "rejected": " no"} for i in range(4)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = ["stages=[{name: a}, {name: b}, {name: c, dpo: {pairs: rollouts}}]", "output_dir=staged"]
    done = hpd("train", "recipe.yaml", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    run = place / "staged"
    (run / "summary.json").unlink()
    (run / "c" / "summary.json").unlink()
    shutil.copytree(run, place / "kept")
    shutil.rmtree(run / "b")
    shutil.rmtree(run / "c")
    for name in ("rewritten", "teacher"):
        CHANGES[name][0](place)
    text = refused(place, *words)
    assert "training rows of stage b" in text
    assert "teacher of stage b" in text
    assert not (run / "b").exists()
    # A stage that was interrupted, here that of preferences, compares its own.
    shutil.rmtree(run)
    shutil.copytree(place / "kept", run)
    (run / "inputs.json").unlink()
    assert "stages: c" not in refused(place, *words)
    allowed = hpd("train", "recipe.yaml", *words, "--changed-inputs", cwd=place)
    assert allowed.returncode == 0, allowed.stderr
    assert "training rows" in (run / "c" / "changes.jsonl").read_text()


def test_another_served_teacher_is_refused_or_noted(place):
    recipe = load_recipe(place / "recipe.yaml", [f"output_dir={place / 'served'}"])
    folder = RunFolder(recipe)
    folder.open()
    folder.keep_teacher("one")
    RunFolder(recipe).keep_teacher("one")
    with pytest.raises(ValueError, match=r"began with the teacher one, .* two: .* --changed-inputs"):
        RunFolder(recipe).keep_teacher("two")
    RunFolder(recipe, takes_changed=True).keep_teacher("two")
    (note,) = [json.loads(line) for line in (place / "served" / "changes.jsonl").read_text().splitlines()]
    assert note["changed"] == {"teacher": ["one", "two"]}
    RunFolder(recipe).keep_teacher("two")
