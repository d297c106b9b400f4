"""Statistics against known values, against scipy, and against what they promise in simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from hpd.experiments.statistics import (
    cliffs_delta,
    cohen_dz,
    compare_variants,
    correct,
    holm,
    mean_interval,
    paired_interval,
    sign_flip_test,
    stability,
    steps_to,
)

# Differences in hours of sleep under two drugs (Student 1908, Cushny and Peebles' data).
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_interval_is_students():
    interval = mean_interval(SLEEP)
    expected = stats.t.interval(0.95, 9, loc=np.mean(SLEEP), scale=stats.sem(SLEEP))
    assert interval[1:3] == pytest.approx(expected)
    assert (round(interval.mean, 2), round(interval.low, 4), round(interval.high, 4)) == (
        1.58,
        0.7001,
        2.4599,
    )
    alone = mean_interval([3.0])
    assert alone.mean == 3.0
    assert math.isnan(alone.low)


def test_paired_t_of_the_sleep_data():
    comparison = compare_variants(dict(enumerate(SLEEP)), dict.fromkeys(range(10), 0.0))
    assert comparison.p_seeds == pytest.approx(0.002833, abs=1e-6)
    assert comparison.d_z == pytest.approx(4.0621 / math.sqrt(10), abs=1e-4)


def test_sign_flips_are_exact_and_agree_with_scipy():
    ours = sign_flip_test(SLEEP)
    theirs = stats.permutation_test(
        (np.array(SLEEP), np.zeros(10)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert ours == pytest.approx(theirs)
    # Five seeds that all agree cannot say more than this.
    assert sign_flip_test([1, 2, 3, 4, 5]) == 2 / 32
    assert sign_flip_test([1.0, -1.0]) == 1.0
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1.0
    assert math.isnan(sign_flip_test([1.0]))


def test_sampled_sign_flips_are_near_the_exact_answer():
    d = np.random.default_rng(3).normal(0.4, 1.0, 16)
    exact = sign_flip_test(d)
    # One zero more changes no sum, but makes the number of pairs too large to enumerate.
    assert sign_flip_test([*d, 0.0]) == pytest.approx(exact, abs=0.015)


def test_holm_of_a_textbook_example_and_with_gaps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    gaps = holm([0.02, math.nan, 0.01])
    assert gaps[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(gaps[1])


def test_effect_sizes():
    assert cliffs_delta([2, 3, 4], [0, 1]) == 1.0
    assert cliffs_delta([1, 2], [1, 2]) == 0.0
    assert cohen_dz([1.0, 2.0, 3.0]) == 2.0
    assert cohen_dz([0.5, 0.5]) == math.inf
    assert math.isnan(cohen_dz([1.0]))


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_the_interval_over_seeds_covers_what_it_promises(num_seeds):
    """600 simulated experiments: how often the 95 % interval holds the true difference (a bootstrap: 74 % of
    them at 3 seeds); three standard errors are 0.027."""
    rng = np.random.default_rng(num_seeds)
    draws = rng.normal(0.3, 1.0, (600, num_seeds))
    hits = [low <= 0.3 <= high for low, high in map(paired_interval, draws)]
    assert 0.92 <= np.mean(hits) <= 0.98
    low, high = paired_interval(draws[0])
    assert (low, high) == pytest.approx(mean_interval(draws[0].tolist())[1:3])


def test_the_interval_covers_chance_of_seeds_and_of_examples():
    """Grades of 60 examples by 5 seeds per side, with effects of seeds and of examples: both must be in the
    interval."""
    rng = np.random.default_rng(0)
    hits, narrow, num_experiments = 0, 0, 1000
    for _ in range(num_experiments):
        d = 0.1 + rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 0.4, (1, 60)) + rng.normal(0, 0.3, (5, 60))
        low, high = paired_interval(d)
        hits += low <= 0.1 <= high
        low, high = paired_interval(d.mean(1))
        narrow += low <= 0.1 <= high
    assert hits / num_experiments >= 0.93
    assert narrow < hits  # seeds alone leave the choice of test problems out


def test_no_win_is_found_where_there_is_none():
    """Twenty equal methods against a baseline, 100 times: some false verdict in at most about 5 % of the
    tables."""
    rng = np.random.default_rng(1)
    tables = 0
    for _ in range(100):
        runs = rng.normal(0.8, 0.02, (21, 5))
        comparisons = [
            compare_variants(
                dict(enumerate(row)), dict(enumerate(runs[0])), names=(str(i), "base", "accuracy")
            )._replace(low=1e-9)
            for i, row in enumerate(runs[1:])
        ]
        tables += any(c.verdict != "no difference found" for c in correct(comparisons, {"accuracy": True}))
    assert tables / 100 <= 0.1


def test_verdicts_follow_the_direction_of_the_metric():
    better, base = {s: 0.9 + s / 1000 for s in range(5)}, {s: 0.8 - s / 1000 for s in range(5)}
    higher, lower = (
        compare_variants(better, base, names=("a", "b", metric)) for metric in ("accuracy", "forward_kl")
    )
    found = correct([higher, lower], {"accuracy": True, "forward_kl": False})
    assert [c.verdict for c in found] == ["win", "loss"]
    assert found[0].p_holm == pytest.approx(2 * found[0].p_seeds)
    few = compare_variants({0: 0.9, 1: 0.9}, {0: 0.8, 1: 0.8}, names=("a", "b", "accuracy"))
    assert correct([few], {"accuracy": True})[0].verdict == "too few seeds"


def test_pairs_are_the_common_seeds_and_records_must_match():
    a, b = {0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0}
    assert compare_variants(a, b).num_seeds == 2
    records = {s: {"x": 1.0, "y": 0.0} for s in (0, 1)}, {s: {"x": 0.0, "y": 0.0} for s in (0, 1)}
    assert compare_variants(a, b, records=records).num_examples == 2
    records[1][1]["z"] = 1.0
    assert compare_variants(a, b, records=records).num_examples == 0


def test_stability_sees_noise_spikes_and_collapse():
    rng = np.random.default_rng(0)
    steps = range(0, 400, 4)
    entropy = np.linspace(3.0, 0.5, 100)
    calm = [
        {
            "step": s,
            "loss": 2 - s / 400 + rng.normal(0, 0.01),
            "grad_norm": 1 + rng.normal(0, 0.05),
            "student_entropy": e,
        }
        for s, e in zip(steps, entropy, strict=True)
    ]
    rough = [dict(log, loss=log["loss"] + rng.normal(0, 0.2)) for log in calm]
    rough[50]["grad_norm"] = rough[80]["grad_norm"] = 30.0
    quiet, noisy = stability(calm), stability(rough)
    assert quiet.loss_std == pytest.approx(0.01, rel=0.3)  # the trend is no noise
    assert noisy.loss_std == pytest.approx(0.2, rel=0.3)
    assert (quiet.spikes, noisy.spikes) == (0, 2)
    assert (quiet.entropy_start, quiet.entropy_low, quiet.entropy_end) == (3.0, 0.5, 0.5)
    assert math.isnan(stability([]).loss_std)


def test_steps_to_a_level_must_last():
    logs = [
        {"step": s, "loss": 1.0, "forward_kl": kl}
        for s, kl in [(10, 0.9), (20, 0.2), (30, 0.4), (40, 0.25), (50, 0.1)]
    ]
    assert steps_to(logs, "forward_kl", 0.3) == 40  # 20 was a dip
    assert steps_to(logs, "forward_kl", 0.1) == 50
    assert steps_to(logs, "forward_kl", 0.01) is None
    assert steps_to(logs, "forward_kl", 0.8, "max") is None
