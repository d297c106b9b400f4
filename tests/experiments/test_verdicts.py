"""What the tests of a grid are said to show."""

import csv
import io

import pytest
from helpers.grid_results import comparison

from hpd.experiments.metrics import scale_of
from hpd.experiments.statistics import correct
from hpd.experiments.verdicts import comparison_table, summarize, verdict_table, warnings_about

SCALES = {metric: scale_of(metric) for metric in ("accuracy", "forward_kl")}
BETTER = {"accuracy": True, "forward_kl": False}


def found(*comparisons):
    return correct(list(comparisons), BETTER)


def test_two_seeds_get_a_warning_and_no_verdict_however_alike_they_are():
    (c,) = found(comparison([0.3, 0.300001]))
    assert c.p_holm < 0.05  # which two seeds cannot bear
    assert c.verdict == "too few seeds"
    (warning,) = warnings_about([c])
    assert "1 of 1 comparisons have 2 seeds and no verdict" in warning
    table = verdict_table([c], SCALES)
    assert table is not None
    assert table.rows[0][1].detail == "2 seeds, +30.0 points (30.0 to 30.0)"


def test_three_seeds_can_win_but_not_find_nothing():
    clear, unclear = found(comparison([0.3, 0.31, 0.32]), comparison([0.3, -0.2, 0.1]))
    assert (clear.verdict, unclear.verdict) == ("win", "too few seeds")


def test_no_difference_found_stands_with_its_interval_and_what_could_be_found():
    (c,) = found(comparison([0.02, -0.01, 0.01, -0.02, 0.01]))
    assert c.verdict == "no difference found"
    table = verdict_table([c], SCALES)
    assert table is not None
    assert table.columns == ("against forward_kl", "accuracy")
    assert table.rows[0][1].detail == "+0.2 points (-1.8 to 2.2), p 0.8"
    assert c.detectable == pytest.approx(1.68 * 0.0164, rel=0.02)
    row = next(csv.DictReader(io.StringIO(comparison_table([c], SCALES).as_csv())))
    assert row["verdict"] == "no difference found"
    assert float(row["difference low"]) == pytest.approx(c.low)
    assert float(row["difference high"]) == pytest.approx(c.high)
    assert "p over test problems" in row
    assert not warnings_about([c])


def test_many_tests_of_few_seeds_are_called_weak():
    noise = [0.02, -0.01, 0.01, -0.02]
    (warning,) = warnings_about(found(*(comparison(noise, f"m{i}") for i in range(30))))
    assert warning.startswith("Weak tests: corrected for 30 tests, 4 seeds find only differences of 6.")


def test_one_table_holds_every_test():
    methods = [f"m{i}" for i in range(34)]
    tests = found(*(comparison([0.0, 0.1, 0.2, 0.1], m, metric) for metric in BETTER for m in methods))
    table = verdict_table(tests, SCALES)
    assert table is not None
    assert [row[0] for row in table.rows] == methods
    assert all(len(row) == 3 for row in table.rows)
    assert len(comparison_table(tests, SCALES).rows) == 68
    counts = summarize(tests)
    assert counts.startswith("Against forward_kl, 68 tests, Holm's correction:")
    assert verdict_table([], SCALES) is None
    assert summarize([]) == ""


def test_every_method_may_have_a_baseline_of_its_own():
    tests = [comparison([0.1] * 4, "a")._replace(baseline=name) for name in ("hpd, 100", "hpd, 1000")]
    table = verdict_table(tests, SCALES)
    assert table is not None
    assert table.columns[0] == "against its baseline"
