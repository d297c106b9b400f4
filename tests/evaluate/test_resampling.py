"""The one bootstrap: against scipy's, and what its callers rely on."""

import numpy as np
import pytest
from scipy import stats

from hpd.evaluate.statistics import estimate, ratio, resample


def test_quantiles_are_scipys_within_the_error_of_resampling():
    values = np.random.default_rng(0).exponential(size=80)
    drawn = resample(ratio(values), 80, count=20_000)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile")
    spread = values.std() / np.sqrt(80)
    assert estimate(ratio(values), 80).value == pytest.approx(values.mean())
    assert drawn.std() == pytest.approx(spread, rel=0.03)
    bounds = tuple(expected.confidence_interval)
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(bounds, abs=0.1 * spread)


def test_one_seed_draws_the_same_rows_for_every_figure():
    first, second = np.random.default_rng(1).normal(size=(2, 30))
    apart = resample(ratio(first), 30, count=500, seed=3) - resample(ratio(second), 30, count=500, seed=3)
    together = resample(ratio(first - second), 30, count=500, seed=3)
    assert apart == pytest.approx(together)
    assert not np.array_equal(together, resample(ratio(first - second), 30, count=500, seed=4))


def test_several_sizes_are_drawn_independently():
    """Rows and columns of a table: the variance of the mean is the sum of both parts."""
    generator = np.random.default_rng(2)
    rows, columns = generator.normal(size=40), generator.normal(size=50)
    table = rows[:, None] + columns
    means = resample(lambda r, c: ((c @ table.T) * r).sum(1) / table.size, 40, 50, count=4000)
    assert means.var() == pytest.approx(rows.var() / 40 + columns.var() / 50, rel=0.1)


def test_a_single_row_has_no_spread():
    assert estimate(ratio(np.array([2.0])), 1) == (2.0, 2.0, 2.0)
