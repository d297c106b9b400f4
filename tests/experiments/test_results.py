"""What the runs of a grid are paired by, and which of them is compared with which."""

from pathlib import Path

import pytest

from hpd.experiments.grid import group_key
from hpd.experiments.report import _compare
from hpd.experiments.results import Results, Run

AXES = ("variant", "data.limit")


def _run(variant, rows, student, seed, value):
    labels = {"variant": variant, "data.limit": rows}
    empty = {"recipe": {}, "logs": [], "records": {}, "answers": {}, "environment": {}, "cost": {}}
    return Run(
        folder=Path("unused"),
        axes=labels,
        group=group_key(labels, AXES),
        seed=seed,
        paired=(student,),
        figures={"accuracy": value},
        teacher={},
        **empty,
    )


@pytest.fixture
def results():
    """Two methods at two numbers of rows, on two students with two seeds each."""
    level = {("hpd", "100"): 0.1, ("sft", "100"): 0.2, ("hpd", "300"): 0.5, ("sft", "300"): 0.8}
    runs = [
        _run(variant, rows, student, seed, value + 0.01 * seed + bonus * (1 + (variant == "sft") * 0.1))
        for (variant, rows), value in level.items()
        for student, bonus in (("s0", 0.0), ("s1", 0.05))
        for seed in (0, 1)
    ]
    return Results(title="t", runs=runs, axes=AXES)


def test_runs_of_one_seed_and_several_initializations_are_all_kept(results):
    found = results.values("hpd, limit=100", "accuracy")
    assert found == pytest.approx(
        {"s0, seed 0": 0.1, "s0, seed 1": 0.11, "s1, seed 0": 0.15, "s1, seed 1": 0.16}
    )


def test_a_baseline_of_labels_compares_what_is_otherwise_equal(results):
    found = _compare(results, {"variant": "hpd"})
    assert [(c.variant, c.baseline, c.num_seeds) for c in found] == [
        ("sft, limit=100", "hpd, limit=100", 4),
        ("sft, limit=300", "hpd, limit=300", 4),
    ]
    # Differences of pairs: 0.1 and 0.105 on the two students, twice each.
    assert [c.difference for c in found] == pytest.approx([0.1025, 0.3025])
    assert [c.baseline for c in _compare(results, "hpd, limit=100")] == ["hpd, limit=100"] * 3
