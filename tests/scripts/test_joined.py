"""scripts/joined.py: what pages say of two grids together is what both tables of runs give."""

from __future__ import annotations

import csv
import importlib
import shutil
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("joined")


@pytest.mark.parametrize("name", ["epochs", "foreign"])
def test_the_published_report_is_that_of_both_parts(script, name):
    report = script.joined(name)
    assert report.status.startswith("320 runs, 8 students")
    assert {c.num_seeds for c in report.comparisons} == {8}
    shown = {table.key: table for section in report.sections for table in section.tables}
    folder = script.TARGET / f"{name}_joined" / "data"
    for table in (report.verdicts, shown["results"], shown["tests"], *report.data):
        assert (folder / f"{table.key}.csv").read_text(encoding="utf-8") == table.as_csv(), table.key


def test_a_student_of_both_parts_is_refused(script, monkeypatch, tmp_path):
    first, second = script.parts("foreign")
    for path in (first, first.parent / "results.csv", second):
        target = tmp_path / path.relative_to(script.TARGET)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    monkeypatch.setattr(script, "TARGET", tmp_path)
    with script.parts("foreign")[1].open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[1][2] = "s0, teacher-0, seed 0"
    with script.parts("foreign")[1].open("w", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(ValueError, match="both parts have s0, teacher-0, seed 0"):
        script.joined("foreign")
