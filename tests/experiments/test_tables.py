"""The tables of a report: what stands in a cell, and in the file."""

import csv
import io

import pytest
from helpers.grid_results import make_results, make_run

from hpd.experiments.results import Results
from hpd.experiments.tables import ablation_table, result_table, run_table, stability_table


def test_accuracy_of_two_seeds_is_no_interval_that_leaves_the_range():
    table = result_table(make_results([{"method": "a"}], lambda a, seed: 0.08 * seed))
    cell = table.rows[0][1]
    assert (cell.text, cell.detail) == ("4.0%", "2 seeds: 0.0 to 8.0")


def test_the_file_holds_fractions_and_the_ends_of_the_interval():
    table = result_table(make_results([{"method": "a"}], lambda a, seed: 0.5 + 0.1 * seed, (0, 1, 2)))
    assert table.rows[0][1].text == "60.0%"
    (row,) = csv.DictReader(io.StringIO(table.as_csv()))
    assert float(row["accuracy"]) == pytest.approx(0.6)
    assert float(row["accuracy low"]) == pytest.approx(0.6 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert float(row["accuracy high"]) == pytest.approx(0.6 + 4.3027 * 0.1 / 3**0.5, abs=1e-4)


def test_graded_figures_are_in_percent_whatever_their_name():
    runs = [
        make_run(
            {"method": "a"}, 0, figures={"gsm8k": 0.5, "length": 0.5}, records={"gsm8k": {"1": 1.0, "2": 0.0}}
        )
    ]
    cells = result_table(Results(title="t", runs=runs, axes=("method",))).rows[0]
    assert [cell.text for cell in cells[1:3]] == ["50.0%", "0.500"]


def test_the_axis_of_variants_is_called_method():
    runs = [make_run({"variant": "a", "data.limit": "100"}, 7)]
    results = Results(title="t", runs=runs, axes=("variant", "data.limit"))
    assert result_table(results).columns == ("method", "limit", "accuracy", "seeds")
    assert run_table(results).rows == [("a", "100", 7, 0.5)]


def test_the_share_of_clipped_steps_stands_with_each_method():
    figures = {"accuracy": 0.5, "clipped_share": 0.31}
    runs = [make_run({"method": "a"}, seed, figures=figures) for seed in range(3)]
    table = stability_table(Results(title="t", runs=runs, axes=("method",)))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["clipped steps"].text == "31.0%"
    plain = stability_table(make_results([{"method": "a"}], lambda a, s: 0.5))
    assert "clipped steps" not in plain.columns


def test_ablation_is_the_paired_effect_of_each_switch():
    axes = [{"k.mask": m, "k.reinforce": r} for m in ("off", "on") for r in ("off", "on")]
    results = make_results(
        axes, lambda a, seed: 0.5 + 0.1 * (a["k.mask"] == "on") - 0.2 * (a["k.reinforce"] == "on") + seed / 10
    )
    table = ablation_table(results, ["accuracy"])
    assert table is not None
    assert [(row[0], row[1], row[3].text, row[4]) for row in table.rows] == [
        ("mask", "off → on", "+10.0 points", 4),
        ("reinforce", "off → on", "-20.0 points", 4),
    ]
    assert table.rows[0][3].sort == pytest.approx(0.1)
