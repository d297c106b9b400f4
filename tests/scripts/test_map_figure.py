"""The map of docs/results.md says what the runs say."""

import math
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("sft", "masked_sft", "hpd", "hpd_no_draw", "forward_kl", "hpd_full")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import map_figure

    return map_figure


def test_the_lines_of_the_map_are_the_means_of_the_runs(script):
    found, _ = script.read(script.RUNS)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    row = r"^\| \[the teacher's\]\(evidence/repeated-rows\.md\) \| ([\d.]+) \| 8 \| (.*) \|$"
    lines = re.findall(row, page, re.MULTILINE)
    assert len(lines) == len(next(iter(found["forward kl"].values())))
    for passes, cells in lines:
        for method, cell in zip(COLUMNS, cells.split(" | "), strict=True):
            points = found["forward kl"][method]
            near = (
                some for place, some in points.items() if math.isclose(place, float(passes), rel_tol=0.05)
            )
            (values,) = near
            shown = cell.strip("*")
            digits = len(shown.partition(".")[2])
            assert f"{statistics.mean(values):.{digits}f}" == shown, (passes, method)


def test_the_figure_draws_every_method_of_equal_students(script):
    found, teachers = script.read(script.RUNS)
    panel = script.panel(found, teachers)
    assert {row[1] for row in panel.rows} == {*found["forward kl"]} >= {*script.NAMED}
    assert all(low <= mean <= high for *_, mean, low, high in panel.rows)
    assert "means of 8 students" in panel.note
