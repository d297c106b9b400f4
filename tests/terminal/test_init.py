"""`hpd init`, by options and by questions in a terminal, and options that were meant as keys of a recipe."""

import json
import os
import pty
import select
import sys
import time

import pytest
import yaml
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd.cli import app
from hpd.terminal.slips import meant_key


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    tiny_pair("llama", folder)
    rows = [{"question": f"add {i} and {i}:", "answer": f" {2 * i}"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def given(place, *more):
    named = {"student": place / "student", "teacher": place / "teacher", "data": place / "rows.jsonl"}
    return [word for name, value in named.items() for word in (f"--{name}", str(value))] + list(more)


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_options_make_a_recipe_that_doctor_accepts(place):
    file = place / "by options.yaml"
    done = run("init", file, *given(place, "--output-dir", place / "run: 1"))
    assert done.exit_code == 0, done.output
    recipe = yaml.safe_load(file.read_text())
    assert recipe["output_dir"] == str(place / "run: 1")
    assert recipe["method"] == "forward_kl"
    assert recipe["data"]["columns"] == {"prompt": "question", "completion": "answer"}
    accepted = run("doctor", file)
    assert accepted.exit_code == 0, accepted.output
    assert run("init", file, *given(place)).exit_code == 2  # it is there
    columns = ["--prompt-column", "answer", "--completion-column", "question", "--overwrite"]
    assert run("init", file, *given(place, *columns)).exit_code == 0
    assert yaml.safe_load(file.read_text())["data"]["columns"] == {
        "prompt": "answer",
        "completion": "question",
    }


def test_heads_of_two_sizes_get_the_line_that_they_need(place, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    config = json.loads((place / "teacher" / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    done = run("init", tmp_path / "r.yaml", *given(place, "--teacher", str(teacher)))
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["train"]["vocabulary"] == "shared_prefix"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --student, --teacher, --data"),
        (["--method", "foward_kl"], "Did you mean 'forward_kl'"),
        (["--data", "nowhere.jsonl"], "There is no file or folder nowhere.jsonl"),
    ],
)
def test_mistakes_leave_no_file(place, tmp_path, words, said):
    done = run("init", tmp_path / "r.yaml", *(given(place, *words) if words else []))
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "r.yaml").exists()


def test_questions_in_a_terminal(place, tmp_path):
    """A wrong answer is asked for again; an empty one takes the default."""
    answers = [str(place / "student"), str(place / "teacher"), "nowhere.jsonl", str(place / "rows.jsonl")]
    file = tmp_path / "asked.yaml"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "hpd", "init", str(file)])
    shown = ""
    waiting = [*answers, "hdp", "hpd", ""]
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 5)[0]:
            continue
        try:
            shown += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the child has gone
            break
        if waiting and shown.rstrip(" ").endswith(":") and shown.endswith(": "):
            os.write(terminal, (waiting.pop(0) + "\n").encode())
    _, status = os.waitpid(child, 0)
    assert status == 0, shown
    assert "There is no file or folder nowhere.jsonl" in shown
    assert "Did you mean 'hpd'" in shown
    recipe = yaml.safe_load(file.read_text())
    assert (recipe["student"], recipe["method"]) == (answers[0], "hpd")
    assert (recipe["data"]["path"], recipe["output_dir"]) == (answers[3], "runs/mine")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("max_steps", "train.max_steps"),
        ("lr", "train.learning_rate"),
        ("batch_size", "train.per_device_train_batch_size"),
        ("learning_rat", "train.learning_rate"),
        ("output_dir", "output_dir"),
        ("data_path", "data.path"),
        ("methd", "method"),
        ("no_such_thing_at_all", None),
    ],
)
def test_the_key_that_an_option_means(name, key):
    assert meant_key(name) == key


def test_options_that_are_keys_are_answered_with_them(place, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("student: a\n")
    for command, words, said in (
        ("train", ["--max-steps", "100"], "hpd train ... train.max_steps=100"),
        ("train", ["--lr=1e-3"], "hpd train ... train.learning_rate=1e-3"),
        ("compare", ["--max-steps", "100"], "hpd compare ... set.train.max_steps=100"),
        ("train", ["--dryrun"], "No such option"),
    ):
        done = run(command, file, *words)
        assert done.exit_code == 2
        assert said in " ".join(done.output.replace("│", " ").split()), done.output
