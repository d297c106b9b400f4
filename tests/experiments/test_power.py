"""Power against simulation, and what it lets a report say."""

import math

import numpy as np
import pytest
from scipy import stats

from hpd.experiments.power import MIN_SEEDS, can_decide, needed_effect


@pytest.mark.parametrize(("num_seeds", "level"), [(3, 0.05), (4, 0.05), (8, 0.05), (8, 0.05 / 40)])
def test_the_needed_effect_is_found_in_four_of_five_repeats(num_seeds, level):
    effect = needed_effect(num_seeds, level)
    d = np.random.default_rng(num_seeds).normal(effect, 1.0, (4000, num_seeds))
    found = (stats.ttest_1samp(d, 0.0, axis=1).pvalue < level).mean()  # type: ignore[attr-defined]
    assert found == pytest.approx(0.8, abs=0.025)


def test_more_seeds_need_less_and_more_tests_need_more():
    assert needed_effect(2) > needed_effect(3) > needed_effect(5) > needed_effect(8)
    assert needed_effect(5, 0.05 / 20) > needed_effect(5)
    assert needed_effect(1) == math.inf


def test_four_seeds_decide_and_three_do_not():
    assert [can_decide(n) for n in (1, 2, 3, 4, 8)] == [False, False, False, True, True]
    assert MIN_SEEDS == 3
