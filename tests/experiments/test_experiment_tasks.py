"""The tasks of the experiments, made small: their files, their graders, and a grid that reads their cache."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpd.cli import app
from hpd.config import load_recipe
from hpd.demo.task import SPLITS, is_correct
from hpd.evaluate import Answer
from hpd.experiments.tasks import ValidAnswers, chains, foreign_chains, prepared, short, short_answers
from hpd.experiments.tasks.chains import draw_chain
from hpd.experiments.tasks.short import right_answers


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Both tasks with few rows and hardly any training; the folder of each."""
    from hpd.experiments.tasks import chains as function

    module = __import__("sys").modules[function.__module__]
    sizes = {"train": 60, "validation": 20, "test": 40}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPD_HOME", str(tmp_path_factory.mktemp("home")))
        for owner in (module, short):
            patch.setattr(owner, "NUM_ROWS", sizes)
            patch.setattr(owner, "TEACHER_STEPS", 60)
            patch.setattr(owner, "STUDENT_STEPS", 4)
            patch.setattr(owner, "BATCH", 16)
        patch.setattr(module, "CHOICES", [sizes])
        folders = {name: tmp_path_factory.mktemp(name) for name in ("chains", "short")}
        yield {
            "chains": (folders["chains"], chains(folders["chains"])),
            "short": (folders["short"], short_answers(folders["short"])),
        }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", ["chains", "short"])
def test_the_splits_share_no_problem(small, task):
    folder, _ = small[task]
    prompts = [{row["prompt"] for row in _rows(folder / f"{split}.jsonl")} for split in SPLITS]
    assert all(prompts)
    assert not any(one & other for one in prompts for other in prompts if one is not other)


def test_a_chain_is_solved_one_equation_at_a_time(small):
    folder, _ = small["chains"]
    rows = _rows(folder / "truth.jsonl")
    assert len(rows) == 60
    for row in rows:
        *_, last = equations = row["completion"].partition("####")[0].split(",")
        assert len(equations) == 5
        assert all(
            str(eval(left)) == right for left, right in (equation.split("=") for equation in equations)
        )
        assert last.endswith(f"={row['answer']}")
        assert eval(row["prompt"].removesuffix("=")) == int(row["answer"])
        assert is_correct(row["completion"], row["answer"])


def test_a_chain_is_never_below_zero_or_above_twenty():
    import random

    def values(chain):
        return [chain] if isinstance(chain, int) else [chain.value, *values(chain.left), *values(chain.right)]

    rng = random.Random(0)
    assert all(0 <= value <= 20 for _ in range(200) for value in values(draw_chain(rng, "train", 5)))


def test_short_answers_are_graded_against_all_of_them(small):
    folder, recipe = small["short"]
    task = ValidAnswers(data=folder / "test.jsonl")
    example = task.examples()[0]

    def grade(text: str) -> bool | None:
        return task.grade([example], [Answer(text=text)])[0].correct

    for answer in right_answers(str(example.prompt)):
        assert grade(f" {answer}")
    assert not grade(str(example.prompt)[1])
    assert not grade(right_answers(str(example.prompt))[0][0])
    assert not grade("")
    assert load_recipe({**recipe, "output_dir": str(folder / "run")}).teacher.type == "cached"
    report = json.loads((folder / "report.json").read_text())
    assert report["kl_of_truth_to_teacher_nats"] > 1  # sixty steps teach little, and the report says so


def test_files_are_made_once_and_other_choices_make_others(tmp_path, monkeypatch):
    monkeypatch.setenv("HPD_HOME", str(tmp_path))
    monkeypatch.setattr(prepared, "_write_cache", lambda folder, recipe: None)
    built = []

    def build(folder):
        built.append(folder)
        folder.mkdir()
        (folder / "rows.jsonl").write_text("{}")
        return {}

    first = prepared.prepare("task", [1], build)
    assert prepared.prepare("task", [1], build) == first
    assert prepared.prepare("task", [2], build) != first
    assert len(built) == 2
    assert [path.name for path in first.iterdir()] == ["rows.jsonl"]

    def breaks(folder):
        folder.mkdir()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        prepared.prepare("task", [3], breaks)
    assert len(list((tmp_path / "tasks").iterdir())) == 2  # nothing half-made stays


@pytest.mark.slow
def test_a_grid_reads_the_cache_and_asks_its_model_about_own_samples(small, tmp_path):
    """Tuned on validation problems; one variant has rows of its own and asks the teacher itself."""
    folder, recipe = small["chains"]
    experiment = tmp_path / "grid.yaml"
    tree = {
        "name": "grid",
        "base": recipe,
        "set": {"eval": None},
        "budget": {"type": "steps", "value": 3},
        "variants": {
            "hpd": {"method": "hpd"},
            "sft": {
                "method": "sft",
                "data.path": str(folder / "truth.jsonl"),
                "teacher": str(folder / "teacher"),
            },
        },
        "axes": {"seed": [0, 1]},
        "evals": [{"name": "sampled_accuracy", "temperature": 1.0, "limit": 8}],
        "own_samples": 8,
        "own_samples_every": 2,
        "baseline": "sft",
        "metrics": ["sampled_accuracy", "forward_kl"],
        "output_dir": str(tmp_path / "out"),
    }
    experiment.write_text(json.dumps(tree))
    done = CliRunner().invoke(app, ["compare", str(experiment)])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "out/runs/hpd__seed-0/experiment.json").read_text())["figures"]
    own = {"own_entropy", "own_forward_kl", "own_reverse_kl"}
    assert set(figures) == {"sampled_accuracy", "clipped_share", *own}
    curve = _rows(tmp_path / "out/runs/hpd__seed-0/own_samples.jsonl")
    assert [line["step"] for line in curve] == [0, 2]
    assert curve[0]["own_entropy"] > 0
    assert "curve-own_entropy" in (tmp_path / "out/report/report.md").read_text()
    assert (tmp_path / "out/teacher/figures.json").is_file()
    assert load_recipe(tmp_path / "out/runs/hpd__seed-0/recipe.yaml").teacher.type == "cached"
    assert "sampled_accuracy" in (tmp_path / "out/report/report.md").read_text()


def test_own_samples_leave_training_alone_and_go_on_where_a_run_was_resumed(tmp_path):
    import torch
    from transformers import TrainerState

    from hpd.experiments.own_samples import OwnSampleCurve

    seen = []
    student = torch.nn.Linear(1, 1)
    curve = OwnSampleCurve(
        tmp_path / "own.jsonl", 2, lambda model: seen.append(model.training) or {"own_entropy": 1.0}
    )
    state = TrainerState()
    curve.on_train_begin(None, state, None, model=student)
    for state.global_step in (1, 2, 3, 4):
        curve.on_step_end(None, state, None, model=student)
    assert [line["step"] for line in _rows(tmp_path / "own.jsonl")] == [0, 2, 4]
    assert seen == [False] * 3
    assert student.training
    state.global_step = 3  # its checkpoint is of step 3: step 4 is done again
    curve.on_train_begin(None, state, None, model=student)
    assert [line["step"] for line in _rows(tmp_path / "own.jsonl")] == [0, 2]


def test_teachers_and_students_differ_and_other_writers_solve_the_same_problems(tmp_path, monkeypatch):
    module = __import__("sys").modules[foreign_chains.__module__]
    monkeypatch.setenv("HPD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "NUM_ROWS", {"train": 200, "validation": 10, "test": 10})
    monkeypatch.setattr(module, "NUM_FOREIGN_ROWS", 200)
    monkeypatch.setattr(module, "NUM_STUDENTS", 2)
    monkeypatch.setattr(module, "STUDENT_STEPS", 1)
    monkeypatch.setattr(module, "TEACHER_STEPS", {"equations": 1, None: 1})
    # A teacher of one step writes nothing that ends.
    monkeypatch.setattr(module, "written_by", lambda teacher, tokenizer, rows: [dict(row) for row in rows])
    base = tmp_path / "base"
    recipe = load_recipe({**foreign_chains(base), "output_dir": str(tmp_path / "run")})
    assert Path(str(recipe.teacher.path)).is_dir()
    assert Path(recipe.data.path).is_file()
    weights = {path.read_bytes() for path in base.glob("*/model.safetensors")}
    teachers = {path.read_bytes() for path in base.glob("*/model/model.safetensors")}
    assert (len(weights), len(teachers)) == (2, 2)
    rows = {path.stem: _rows(path) for path in (base / "teacher-0" / "rows").iterdir()}
    assert {len(found) for found in rows.values()} == {200}
    assert len({tuple(row["prompt"] for row in found) for found in rows.values()}) == 1
    for found in rows.values():
        assert all(is_correct(row["completion"], row["answer"]) for row in found)
    rewritten = {name: sum("," not in row["completion"] for row in found) for name, found in rows.items()}
    assert rewritten["one_sided"] == 0
    assert 20 < rewritten["four_fifths"] < 60  # a fifth of 200, four deviations wide
    assert 70 < rewritten["operands"] < 130
    first = {name: _left_first(found) for name, found in rows.items()}
    assert 0.72 < first["operands"] < 0.88
    assert 0.42 < first["one_sided"] < 0.58


def _left_first(rows: list[dict[str, Any]]) -> float:
    """The share of sums in equations whose left operand is the result of the equation before."""
    hits = []
    for row in rows:
        equations = row["completion"].partition("####")[0].split(",")
        for before, now in itertools.pairwise(equations):
            left, _, right = now.partition("=")[0].partition("+")
            value = before.rpartition("=")[2]
            if right and left != right:
                hits.append(left == value)
    return sum(hits) / len(hits)
