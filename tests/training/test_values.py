"""The parts of a trainer that need no trainer: sums, the decision about a step, terms that move."""

import pytest
import torch
from accelerate import Accelerator

from hpd.methods.terms import TermConfig
from hpd.training.metrics import MetricSums
from hpd.training.nonfinite import NonFiniteFinding, NonFiniteWatch
from hpd.training.scheduled import ScheduledTerms

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
ONE, NAN = torch.tensor(1.0), torch.tensor(float("nan"))


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_sums_add_up_read_once_and_go_on(accelerator):
    sums, other = MetricSums(accelerator), MetricSums(accelerator)
    sums.add({"tokens": ONE, "a": 2 * ONE})
    state = sums.state_dict()
    sums.add({"tokens": ONE})
    other.load_state_dict(state)
    assert sums.totals(["tokens", "absent"]) == {"tokens": 2.0, "absent": 0.0}
    assert sums.read() == {"tokens": 2.0, "a": 2.0}
    assert sums.read() == {}
    assert other.read() == {"tokens": 1.0, "a": 2.0}


@pytest.mark.parametrize(
    ("losses", "norm", "teacher", "found"),
    [
        ([ONE, ONE], ONE, [TRUE, TRUE], None),
        ([ONE], NAN, [TRUE], (True, False, False)),
        ([ONE, NAN], ONE, [TRUE, TRUE], (False, True, False)),
        ([NAN, ONE], NAN, [TRUE, FALSE], (True, True, True)),
    ],
)
def test_the_decision_about_a_step(accelerator, losses, norm, teacher, found):
    for policy in ("stop", "skip"):
        finding = NonFiniteWatch(policy, 3, accelerator).check(losses, norm, teacher)
        skip = policy == "skip"
        assert finding == (None if found is None else NonFiniteFinding(*found, skip, int(skip)))


def test_steps_left_out_are_limited_and_counted_on(accelerator):
    watch, other = (NonFiniteWatch("skip", 2, accelerator) for _ in range(2))
    watch.skipped_steps = 1
    assert watch.check([NAN], ONE, [TRUE])[3:] == (True, 2)
    other.load_state_dict({"skipped_steps": 2})
    assert other.check([NAN], ONE, [TRUE])[3:] == (False, 2)


def test_terms_move_by_progress_and_by_what_is_observed():
    ramp = {"schedule": "adaptive", "start": 0.4, "end": 1.0}
    terms = ScheduledTerms([TermConfig(objective="taid", kwargs={"t": ramp})])
    assert terms.moves
    assert terms.positions["taid.t"].t == 0.4
    for loss, progress in ((2.0, 0.25), (1.0, 0.5)):
        terms.observe({"value/taid": 3 * loss, "tokens": 3.0}, progress)
    assert terms.positions["taid.t"].t == pytest.approx(0.7)
    other = ScheduledTerms([TermConfig(objective="taid", kwargs={"t": ramp})])
    other.load_state_dict(terms.state_dict())
    assert other.state_dict() == terms.state_dict()
    still = ScheduledTerms([TermConfig(objective="forward_kl")])
    assert (still.moves, still.observed, still.at(0.5)[0].name) == (False, [], "forward_kl")
