"""Nothing is overwritten without --overwrite: what is there is resumed, kept or refused."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from pathlib import Path

import pytest
import yaml
from helpers.forked import start
from helpers.tiny_grid import tiny_experiment
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd.cli import app
from hpd.experiments.output import check_target, write_report
from hpd.experiments.report import Report, Section
from hpd.experiments.table import Table
from hpd.locks import holding


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("overwrite")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "max_length": 64,
            "gradient_checkpointing": False,
        },
        "generate": {"output": str(folder / "out.jsonl"), "max_new_tokens": 4, "truncated": "keep"},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_train_refuses_what_is_there(place):
    assert run("train", place / "recipe.yaml")[0] == 0
    before = contents(place / "run")
    for changes, message in (
        ((), "finished"),
        (("method=akl",), "another recipe"),
        (("train.lerning_rate=2",), "unknown key 'train.lerning_rate'; did you mean 'learning_rate'"),
        (("train.loss_type=dft",), "train.loss_type has no effect"),
        (("output_dir=" + str(place / "student"),), "not a run of hpd"),
    ):
        code, text = run("train", place / "recipe.yaml", *changes)
        assert code == 2
        assert message in " ".join(text.split())
        assert contents(place / "run") == before
    # Another's folder is not deleted even with the switch.
    student = contents(place / "student")
    assert run("train", place / "recipe.yaml", f"output_dir={place / 'student'}", "--overwrite")[0] == 2
    assert contents(place / "student") == student
    assert run("train", place / "recipe.yaml", "method=akl", "--overwrite")[0] == 0
    assert contents(place / "run") != before


def test_generate_refuses_output_that_is_there(place):
    assert run("generate", place / "recipe.yaml")[0] == 0
    before = (place / "out.jsonl").read_bytes()
    code, text = run("generate", place / "recipe.yaml", "generate.seed=5")
    assert code == 2
    assert "exists" in text
    assert (place / "out.jsonl").read_bytes() == before
    assert run("generate", place / "recipe.yaml", "generate.seed=5", "--overwrite")[0] == 0


def test_eval_keeps_earlier_entries(place):
    (place / "problems.jsonl").write_text('{"prompt": "add one", "answer": "two"}\n')
    command = [
        "eval",
        place / "student",
        "--data",
        place / "problems.jsonl",
        "--output",
        place / "ev",
        "--max-new-tokens",
    ]
    assert run(*command, 4)[0] == 0
    first = json.loads((place / "ev" / "evals.json").read_text())
    assert run(*command, 5)[0] == 0
    assert [
        entry for entry in json.loads((place / "ev" / "evals.json").read_text()) if entry in first
    ] == first


REPORT = Report(
    title="t",
    question="",
    status="none",
    summary="",
    warnings=[],
    verdicts=None,
    comparisons=[],
    sections=[Section("s", "S", [Table("results", "", "", ("a",), [("b",)])], [])],
    samples=[],
    data=[],
)


@pytest.mark.parametrize("name", ["notes.txt", "index.html", "report.md", "data/results.csv", ".hidden"])
def test_a_report_is_not_written_over_what_is_no_report(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]} and no report"):
        write_report(REPORT, tmp_path)
    assert list(contents(tmp_path).values()) == [b"mine"]
    with pytest.raises(ValueError, match="is a file"):
        write_report(REPORT, tmp_path / name)


def test_a_report_is_written_into_an_empty_folder_and_over_a_report(tmp_path):
    write_report(REPORT, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    write_report(REPORT._replace(title="u"), tmp_path)
    assert "<title>u</title>" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "data" / "results.csv").read_text() == "a\nb\n"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    check_target(tmp_path / "none")


def test_report_refuses_a_folder_of_others(place, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, text = run("report", place / "run", "--output", tmp_path)
    assert code == 2
    assert "holds notes.txt and no report" in " ".join(text.split())
    assert list(contents(tmp_path).values()) == [b"mine"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report/notes.txt", "holds notes.txt and no report|holds report but no manifest.json"),
        ("runs/a/weights", "holds runs but no manifest.json"),
        ("tuned.json", "holds tuned.json but no manifest.json"),
        ("experiment.yaml", "holds another experiment.yaml"),
    ],
)
def test_compare_refuses_a_folder_of_others(tmp_path, name, message):
    experiment = tiny_experiment(tmp_path)
    theirs = tmp_path / "grid" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    code, text = run("compare", experiment)
    assert code == 2
    assert re.search(message, " ".join(text.split()))
    assert list(contents(tmp_path / "grid").values()) == [b"mine"]


def hold(target, is_folder, ready, end):
    with holding(target, is_folder=is_folder):
        ready.set()
        end.wait(120)


@pytest.fixture
def held():
    """Has another process write to a place; gives its number."""
    processes = multiprocessing.get_context("fork")
    end, started = processes.Event(), []

    def start(target, is_folder=True):
        ready = processes.Event()
        started.append(processes.Process(target=hold, args=(target, is_folder, ready, end)))
        started[-1].start()
        assert ready.wait(60)
        return started[-1].pid

    yield start
    end.set()
    for process in started:
        process.join()


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (("train", "{}/recipe.yaml"), "run"),
        (("train", "{}/recipe.yaml", "method=akl", "--overwrite"), "run"),
        (("train", "{}/recipe.yaml", "output_dir={}/staged", "stages=[{name: a}]"), "staged"),
        (("cache", "{}/recipe.yaml", "cache.path={}/cache"), "cache"),
        (("cache", "{}/recipe.yaml", "cache.path={}/cache", "--overwrite"), "cache"),
        (("generate", "{}/recipe.yaml", "--overwrite"), "out.jsonl"),
        (("eval", "{}/student", "--data", "{}/problems.jsonl", "--output", "{}/ev"), "ev"),
        (("eval", "{}/student", "--metrics", "length", "--data", "{}/rows.jsonl", "--output", "{}/ev"), "ev"),
        (("compare", "{}/grid.yaml"), "grid"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_what_another_process_writes_is_left_alone(place, tmp_path, held, command, target):
    (place / "problems.jsonl").write_text('{"prompt": "add one", "answer": "two"}\n')
    if command[0] == "compare":
        place = tiny_experiment(tmp_path).rename(tmp_path / "grid.yaml").parent
    is_folder = target != "out.jsonl"
    pid = held(place / target, is_folder)
    before = contents(place)
    words = [word.replace("{}", str(place)) for word in command]
    code, text = run(*words)
    assert code == 2, text
    assert f"{target} is in use: process {pid} on" in " ".join(text.split())
    assert contents(place) == before


def test_a_second_start_beside_a_live_run(place, tmp_path):
    """The first ends as if nothing had happened."""
    where = f"output_dir={tmp_path / 'run'}"
    first = start("train", place / "recipe.yaml", where, "train.max_steps=60")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file():
        assert time.monotonic() < deadline
        assert first.is_alive()
        time.sleep(0.01)
    for more in ((), ("--overwrite",)):
        code, text = run("train", place / "recipe.yaml", where, "train.max_steps=60", *more)
        assert code == 2
        assert f"in use: process {first.pid} on" in " ".join(text.split())
    assert first.is_alive(), "the run was too short to be met"
    first.join(120)
    assert first.exitcode == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps)
    assert not list(tmp_path.glob("**/.hpd.lock"))
