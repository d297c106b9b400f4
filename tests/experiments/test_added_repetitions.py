"""More seeds for a grid that has begun: what is finished stays, and the report says when they came."""

import importlib
import json
import shutil

import pytest
import yaml
from helpers.tiny_grid import command, tiny_experiment, tiny_grid

from hpd.experiments.compare import compare
from hpd.experiments.experiment import read_experiment
from hpd.experiments.grid import expand
from hpd.experiments.manifest import open_manifest
from hpd.experiments.report import build_report

_SHORT = {
    "budget": {"type": "steps", "value": 2},
    "tune": None,
    "evals": [],
    "own_samples": 0,
    "entropy_tertiles": False,
    "metrics": ["forward_kl"],
    "reach": {},
}


def begin(path, overrides=()):
    """What `compare` does before its first run."""
    text = path.read_text()
    experiment = read_experiment(text, overrides)
    return open_manifest(
        experiment, text, overrides, [], expand(experiment, experiment.folder), ["git_commit"]
    )


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tiny_experiment(tmp_path_factory.mktemp("begun"), **_SHORT)
    begin(path)
    return path


def test_added_seeds_are_in_the_manifest_with_their_date_and_in_the_report(tmp_path_factory, tmp_path):
    """On a copy of a finished grid; its runs of two seeds stay what they are."""
    grid = tiny_grid(tmp_path_factory)
    folder = tmp_path / "grid"
    shutil.copytree(grid, folder)
    assert not any("later" in warning for warning in build_report([folder]).warnings)

    path = grid.parent / "tiny.yaml"
    assert len(begin(path, [f"output_dir={folder}", "axes.seed=[0, 1, 2]"])["cells"]) == 6
    assert len(begin(path, [f"output_dir={folder}", "axes.seed=[0, 1, 2]"])["added"]) == 1
    report = build_report([folder])
    assert report.status.startswith("4 of 6 runs finished")
    assert "when 4 of 4 runs were finished" in report.warnings[-1]
    environment = next(table for s in report.sections for table in s.tables if table.key == "environment")
    assert [row[1].endswith("4 of 4 runs finished") for row in environment.rows if "added" in row[0]] == [
        True
    ]

    # The file grows instead of an override, before any run of the first addition: no look came between.
    tree = {**yaml.safe_load(path.read_text()), "output_dir": str(folder)}
    tree["axes"]["seed"] = [0, 1, 2, 3]
    grown = tmp_path / "grown.yaml"
    grown.write_text(yaml.safe_dump(tree))
    assert [step["runs"] for step in begin(grown)["added"]] == [4, 6]
    assert (folder / "experiment.yaml").read_text() == grown.read_text()


def test_repetitions_added_before_any_result_are_no_reason_to_warn(tmp_path):
    path = tiny_experiment(tmp_path, **_SHORT)
    begin(path)
    assert begin(path, ["axes.seed=[0, 1, 2]"])["added"][0]["finished"] == 0
    assert not any("later" in warning for warning in build_report([tmp_path / "grid"]).warnings)


@pytest.mark.parametrize(
    "overrides",
    [
        ["axes.seed=[2, 0, 1]"],  # in front: tuning stands at the first value
        ["axes.seed=[0]"],
        ["axes.seed=[0, 2]"],
        ["axes.seed=[0, 1, 2]", "budget.value=3"],
        ["axes.seed=[0, 1, 2]", "metrics=[reverse_kl]"],
        ["axes.seed=[0, 1, 2]", "axes.method=[hpd, forward_kl, sft]"],
        ["axes.seed=[0, 1, 2]", "exclude=[{seed: 1, method: hpd}]"],
        ["axes.method=[hpd, forward_kl, sft]"],
        ["question=Another?"],
    ],
)
def test_anything_but_more_repetitions_is_refused_and_changes_nothing(begun, overrides):
    manifest = (begun.parent / "grid" / "manifest.json").read_text()
    with pytest.raises(ValueError, match="Only repetitions may be added"):
        begin(begun, overrides)
    assert (begun.parent / "grid" / "manifest.json").read_text() == manifest


def test_a_cell_left_out_before_is_no_new_repetition(tmp_path):
    """It would give one method a run that was chosen after the others' results."""
    path = tiny_experiment(tmp_path, **_SHORT, exclude=[{"seed": 1, "method": "hpd"}])
    begin(path)
    for overrides in (["exclude=[]"], ["exclude=[]", "axes.seed=[0, 1, 2]"]):
        with pytest.raises(ValueError, match="Only repetitions may be added"):
            begin(path, overrides)


def test_files_that_changed_are_found_when_repetitions_are_added(tmp_path):
    path = tiny_experiment(tmp_path, **_SHORT)
    begin(path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="Files have changed since the experiment began: data.path"):
        begin(path, ["axes.seed=[0, 1, 2]"])


@pytest.mark.slow
def test_a_repetition_with_a_teacher_of_its_own_runs_alone_and_evaluates_that_teacher(tmp_path):
    shape = {
        **_SHORT,
        "evals": [{"name": "accuracy", "data": str(tmp_path / "problems.jsonl"), "max_new_tokens": 6}],
        "metrics": ["accuracy", "forward_kl"],
        "paired": ["teacher_init"],
    }
    inits = {"a": {"teacher.model": str(tmp_path / "teacher")}}
    axes = {"method": ["hpd", "forward_kl"], "teacher_init": inits, "seed": [0]}
    path = tiny_experiment(tmp_path, **shape, axes=axes)
    assert compare(path)[1] == []
    grid = tmp_path / "grid"
    records = {file: file.stat().st_mtime_ns for file in grid.glob("runs/*/experiment.json")}
    assert len(records) == 2
    alone = json.loads((grid / "teacher" / "figures.json").read_text())

    inits["b"] = {"teacher.model": str(tmp_path / "student")}
    done = command("compare", tiny_experiment(tmp_path, **shape, axes=axes))
    assert done.exit_code == 0, done.output
    assert "2 of 2 runs were finished" in " ".join((grid / "report" / "report.md").read_text().split())
    assert {file: file.stat().st_mtime_ns for file in records} == records
    assert len(list(grid.glob("runs/*/experiment.json"))) == 4
    each = [json.loads(file.read_text()) for file in (grid / "teacher").glob("*/figures.json")]
    assert len(each) == 2
    assert alone in each
    both = json.loads((grid / "teacher" / "figures.json").read_text())
    assert both["accuracy"] == pytest.approx(sum(one["accuracy"] for one in each) / 2)


def test_a_teacher_keeps_its_folder_where_another_comes_before_it(tmp_path):
    module = importlib.import_module("hpd.experiments.compare")
    first = module._teacher_folders(tmp_path, ["one", "two"])
    assert [folder.name for folder in first] == ["0", "1"]
    for model, folder in zip(["one", "two"], first, strict=True):
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps({"model": model}))
    grown = module._teacher_folders(tmp_path, ["one", "three", "two"])
    assert [folder.name for folder in grown] == ["0", "2", "1"]
