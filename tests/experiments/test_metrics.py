"""How the figures of a report are named and written."""

import math

import pytest

from hpd.experiments.metrics import PLAIN, Scale, higher_is_better, is_entropy, scale_of

SHARE = Scale(0.0, 1.0, percent=True)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("accuracy", True),
        ("sampled_accuracy", True),
        ("own_reverse_kl", False),
        ("loss", False),
        ("student_entropy", None),
        ("clipped_share", None),
        ("forward_kl_high_entropy", False),
        ("validation_forward_kl", False),
    ],
)
def test_direction_of_metrics(metric, better):
    assert higher_is_better(metric) is better


def test_a_kl_where_the_teacher_is_sure_is_no_entropy():
    assert is_entropy("own_entropy")
    assert not is_entropy("forward_kl_low_entropy")


def test_accuracy_is_in_percent_and_stays_between_0_and_100():
    assert scale_of("sampled_accuracy") == scale_of("gsm8k", graded=True) == SHARE
    assert scale_of("gsm8k") == PLAIN
    spread = SHARE.spread([0.0, 0.01, 0.11])
    assert (spread.low, SHARE.value(spread.mean), SHARE.about(spread)) == (0.0, "4.0%", "0.0 to 19.1")
    assert SHARE.spread([1.0, 0.99, 0.9]).high == 1.0
    assert SHARE.difference(-0.0355) == "-3.5 points"
    assert SHARE.bounds(-0.0001, 0.25) == "0.0 to 25.0"  # no "-0.0"


def test_two_seeds_show_what_they_are_and_no_interval():
    """Their interval would be 0.04 ± 0.51."""
    spread = SHARE.spread([0.0, 0.08])
    assert not spread.is_interval
    assert SHARE.about(spread) == "2 seeds: 0.0 to 8.0"
    assert SHARE.about(SHARE.spread([0.3])) == "1 seed"
    assert SHARE.about(SHARE.spread([1.0, 1.0, 1.0])) == "all 3 seeds"  # not "± 0"


def test_a_kl_has_no_negative_interval():
    scale = scale_of("reverse_kl")
    spread = scale.spread([0.01, 0.02, 0.3])
    assert (spread.low, spread.high > 0.3) == (0.0, True)
    assert scale.value(0.029862) == "0.0299"
    assert scale.difference(0.01664) == "+0.0166"
    assert scale.value(math.nan) == scale.bounds(math.nan, math.nan) == scale.difference(math.nan) == ""


def test_differences_keep_to_twice_the_range():
    assert SHARE.change.spread([-1.0, 0.9, -0.9])[1:3] == (-1.0, 1.0)
    assert scale_of("forward_kl").change.low == -math.inf
