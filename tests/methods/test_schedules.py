"""Schedules and TAID's adaptive position."""

import math

import pytest

from hpd.methods.schedules import Schedule, TaidPosition, as_schedule, value_at
from hpd.methods.terms import TermConfig


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "constant", "start": 2.0}, [2.0, 2.0, 2.0]),
        ({"schedule": "linear", "start": 0.0, "end": 1.0}, [0.0, 0.5, 1.0]),
        ({"schedule": "linear", "start": 1.0, "end": 0.0, "over": 0.5}, [1.0, 0.0, 0.0]),
        ({"schedule": "cosine", "start": 0.0, "end": 1.0}, [0.0, 0.5, 1.0]),
        ({"schedule": "step", "start": 3.0, "end": 5.0, "over": 0.5}, [3.0, 5.0, 5.0]),
    ],
)
def test_shapes(schedule, expected):
    assert [value_at(schedule, x) for x in (0.0, 0.5, 1.0)] == pytest.approx(expected)


def test_cosine_starts_flat():
    cosine = Schedule(schedule="cosine", start=0.0, end=1.0)
    assert cosine.at(0.25) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_plain_values_pass_through():
    assert value_at(0.3, 0.5) == 0.3
    assert value_at({"a": 1}, 0.5) == {"a": 1}
    assert as_schedule(0.3) is None


@pytest.mark.parametrize("bad", [{"over": 0.0}, {"over": 1.5}, {"end": None}])
def test_mistakes(bad):
    with pytest.raises(ValueError, match="schedule"):
        Schedule(**{"schedule": "linear", "start": 0.0, "end": 1.0, **bad})


def test_terms_take_schedules_anywhere_a_number_stands():
    ramp = {"schedule": "linear", "start": 0.0, "end": 1.0}
    term = TermConfig(objective="symmetric_kl", weight=Schedule(**ramp), kwargs={"lam": ramp})
    assert term.scheduled
    assert not TermConfig(objective="symmetric_kl").scheduled
    middle = term.at(0.5)
    assert (middle.weight, middle.kwargs["lam"]) == (0.5, 0.5)


def test_taid_moves_with_progress_and_faster_while_the_loss_falls():
    falling, flat = TaidPosition(0.4, 1.0, step_size=0.1), TaidPosition(0.4, 1.0, step_size=0.1)
    for step in range(1, 11):
        falling.update(2.0**-step, step / 1000)
        flat.update(1.0, step / 1000)
    assert 0.4 < flat.t < falling.t < 1.0
    ramp = TaidPosition(0.4, 1.0, step_size=0.0)
    ramp.update(1.0, 0.1)
    assert ramp.update(1.0, 0.5) == pytest.approx(0.7)
    assert ramp.update(1.0, 1.0) == 1.0


def test_taid_state_round_trip():
    position = TaidPosition(0.4, 1.0)
    for step in range(5):
        position.update(3.0 - step / 10, step / 100)
    other = TaidPosition(0.4, 1.0)
    other.load_state_dict(position.state_dict())
    assert other.update(2.0, 0.1) == position.update(2.0, 0.1)


def test_skew_shrinks_where_the_gap_shrinks_below_its_mean_and_is_resumed():
    from hpd.methods.schedules import SkewPosition

    skew = SkewPosition(0.1, 0.01)
    assert skew.update(0.4) == pytest.approx(0.1)
    assert skew.update(0.8) == pytest.approx(0.1)  # further apart than the mean of 0.6: the most skew
    assert skew.update(0.57) == pytest.approx(1 - 0.9 * 0.59 / 0.57)
    assert skew.update(0.1) == 0.01
    other = SkewPosition(0.1, 0.01)
    other.load_state_dict(skew.state_dict())
    assert other.update(0.5) == skew.update(0.5)
