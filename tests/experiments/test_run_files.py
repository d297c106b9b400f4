"""Damaged files of runs: named by file and line, and the rest is reported."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from hpd.cli import app
from hpd.experiments.report import build_report
from hpd.experiments.results import read_results
from hpd.experiments.run_files import RunFiles
from hpd.experiments.statistics import stability

GOOD = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'


@pytest.fixture
def run(tmp_path):
    """A finished run by its files alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("method: forward_kl\ntrain: {seed: 1}\n")
    (folder / "metrics.jsonl").write_bytes(GOOD)
    (folder / "summary.json").write_text(json.dumps({"student after accuracy": 0.5, "train seconds": 2.0}))
    entry = {"id": "a1", "model": "student after", "records": "records-x.jsonl"}
    (folder / "evals.json").write_text(json.dumps([entry, {"id": "b2", "model": "other"}]))
    record = {"eval": "a1", "id": "p1", "prompt": "1?", "answer": "1", "text": "1", "correct": True}
    (folder / "records-x.jsonl").write_text(json.dumps(record) + "\n")
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'{"step": 3, "loss": 1.', "line 3 cannot be read at column"),
        (b"\x00\x00\x00\x00\n", "line 3 cannot be read"),
        (b"\xff\xfe\x80 binary\n", "line 3 is not UTF-8 text"),
        (b"[1, 2]\n", "line 3 holds a list, not an object"),
        (b'"text"\n', "line 3 holds a text"),
        (b"7\n", "line 3 holds a number"),
        (b"null\n", "line 3 holds null"),
        (b"[" * 100_000 + b"\n", "line 3 is nested too deeply"),
        (b'{"step": 3, "loss": ' + b"9" * 5000 + b"}\n", "line 3 cannot be read"),
        (b'{"loss": 1.0}\n', "has a line whose step is null"),
        (b'{"step": "3", "loss": 1.0}\n', 'has a line whose step is "3"'),
        (b'{"step": 3, "loss": "low"}\n', 'has "low" as loss at step 3'),
        (b'{"step": 3, "loss": [1]}\n', "has [1] as loss at step 3"),
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_read(run, damage, message):
    (run / "metrics.jsonl").write_bytes(GOOD + damage)
    results = read_results([run])
    assert [log["loss"] for log in results.runs[0].logs if "loss" in log] == [2.0, 1.5]
    (said,) = results.damages
    assert str(run / "metrics.jsonl") in said
    assert message in said
    report = build_report([run])
    assert "1 damaged part of files left out" in report.status
    assert report.samples[0].reference == "1"


def test_numbers_that_are_not_finite_are_reported_as_such(run):
    lines = [
        f'{{"step": {n}, "loss": {value}, "grad_norm": 1.0}}\n' for n, value in enumerate(["1.0", "NaN"] * 5)
    ]
    (run / "metrics.jsonl").write_text("".join([*lines, '{"step": 11, "loss": Infinity}\n']))
    report = build_report([run])
    assert not report.damages
    assert stability(read_results([run]).runs[0].logs).loss_std != 0.0


@pytest.mark.parametrize("content", [b"not JSON at all\n", b"\x00" * 64, b"\x89PNG\r\n\x1a\n", b"[1]\n[2]\n"])
def test_metrics_that_are_not_json_at_all_are_an_error(run, content):
    (run / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not JSON Lines: line 1"):
        build_report([run])
    ended = CliRunner().invoke(app, ["report", str(run)])
    assert ended.exit_code == 2
    assert not (run / "report").exists()


def test_empty_files_are_a_run_that_began(run):
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_bytes(b"")
    assert not read_results([run]).damages
    (run / "evals.json").write_bytes(b"")
    (said,) = read_results([run]).damages
    assert said.endswith("evals.json: is empty (a write of it was cut)")


@pytest.mark.parametrize(
    ("content", "message", "samples"),
    [
        (
            b'[{"id": "a1", "model": "student after", "records": "records-x.jsonl"},\n {"id": "b2", "mod',
            "line 2",
            1,
        ),
        (
            b'[{"id": "a1", "model": "student after", "records": "records-x.jsonl"}, 7]',
            "entry 2 is not an eval",
            1,
        ),
        (b'[{"id": 5, "model": "student after"}]', "entry 1 is not an evaluation with an id", 0),
        (b'[{"id": "a1", "model": "student after", "records": 7}]', None, 0),
        (b'[{"id": "a1", "model": "student after", "records": "../../etc/passwd"}]', None, 0),
    ],
)
def test_damaged_evaluations_leave_the_whole_ones(run, content, message, samples):
    (run / "evals.json").write_bytes(content)
    report = build_report([run])
    assert len(report.samples) == samples
    assert [message in said and "evals.json" in said for said in report.damages] == [True] * (
        message is not None
    )


@pytest.mark.parametrize("content", [b"no JSON", b"\xff\xfe\x00", b'{"a": 1}', b"[" * 100_000, b"17"])
def test_evaluations_that_are_no_list_are_an_error(run, content):
    (run / "evals.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"evals\.json (is not JSON|holds)"):
        build_report([run])


def test_other_files_are_named_too(run):
    (run / "summary.json").write_text('{"student after accuracy": 0.5')
    (run / "environment.json").write_text("[]")
    (run / "records-x.jsonl").write_bytes((run / "records-x.jsonl").read_bytes() + b"{cut")
    damages = read_results([run]).damages
    named = ("summary", "records-x", "environment")
    assert all(name in said for name, said in zip(named, damages, strict=True))
    (run / "recipe.yaml").write_text("[")
    with pytest.raises(ValueError, match=r"recipe\.yaml cannot be read"):
        read_results([run])


@pytest.mark.parametrize("content", [b"", b"\n \n", None], ids=["empty", "blank", "folder"])
def test_a_log_without_a_line_is_said(run, content):
    (run / "metrics.jsonl").unlink()
    if content is None:
        (run / "metrics.jsonl").mkdir()
    else:
        (run / "metrics.jsonl").write_bytes(content)
    results = read_results([run])
    (said,) = results.damages
    expected = "is not a file (left out)" if content is None else "is empty (a write of it was cut)"
    assert said.endswith(f"metrics.jsonl: {expected}")
    assert build_report([run]).samples[0].reference == "1"


def test_many_damages_of_a_file_are_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"cut\n" * 20)
    files = RunFiles()
    assert len(files.lines(path)) == 2
    assert len(files.damages) == 6
    assert files.damages[-1].endswith("and 15 more of this kind")


def test_the_command_reports_what_is_whole(run, tmp_path):
    """A half of a surrogate pair in an answer too, which no page can hold."""
    second = tmp_path / "second"
    shutil.copytree(run, second)
    (second / "recipe.yaml").write_text("method: forward_kl\ntrain: {seed: 2}\n")
    record = {
        "eval": "a1",
        "id": "p1",
        "prompt": "1?",
        "answer": "1",
        "text": "\ud800 \x00",
        "correct": False,
    }
    (run / "records-x.jsonl").write_text(json.dumps(record) + "\n")
    (second / "metrics.jsonl").write_bytes(GOOD + b"{cut")
    ended = CliRunner().invoke(app, ["report", str(run), str(second), "--output", str(tmp_path / "out")])
    assert ended.exit_code == 0, ended.output
    assert f"damaged: {second / 'metrics.jsonl'}: line 3" in ended.output.replace("\n", "")
    assert (tmp_path / "out" / "report.md").is_file()
