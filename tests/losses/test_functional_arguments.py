"""Every argument of the functional API changes the result or is refused by name, as settings are."""

import inspect
from dataclasses import fields

import pytest
import torch

import hpd
from hpd import TermConfig
from hpd.methods.terms import SUPPORTS

V = 37
OTHER = {
    "weight": 2.0,
    "temperature": 2.0,
    "on": "dataset",
    "cap": 0.01,
    "support": "label",
    "draws": "exact",
    "num_samples": 3,
    "sample_fraction": 0.5,
    "draw_temperature": 3.0,
    "exclude_label": True,
    "importance": True,
    "draws_of": "teacher",
    "top_k": 3,
    "top_k_of": "student",
    "tail": "renormalize",
    "kwargs": {"mu": 0.9},
    "reduction": "sum",
    "generator": torch.Generator().manual_seed(2),
}
"""Of each argument another value than its default."""
INPUTS = {"student_logits", "teacher_logits", "labels", "objective", "params"}
POLICIES = {"vocabulary", "ignore_index"}
"""What is done with inputs that are not in these: tests/losses/test_functional.py."""


def loss(objective, **arguments):
    """Loss and gradient at the same logits, with the same generator where none is given."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, V, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(V, (2, 6), generator=generator)
    student.requires_grad_()
    torch.manual_seed(1)
    output = hpd.distillation_loss(student, teacher, labels, objective, **arguments)
    (gradient,) = torch.autograd.grad(output.loss, student)
    return output.loss.detach(), gradient


def test_every_argument_is_enumerated():
    named = set(inspect.signature(hpd.distillation_loss).parameters) - INPUTS - POLICIES
    assert named | {f.name for f in fields(TermConfig)} - {"objective"} == OTHER.keys()


@pytest.mark.parametrize("given", [False, True], ids=["drawn here", "given draws"])
@pytest.mark.parametrize("support", [None, *SUPPORTS])
@pytest.mark.parametrize("objective", ["hpd", "forward_kl", "nll", "hpd_expected", "akl"])
def test_an_argument_without_effect_is_refused(objective, support, given):
    base = {"support": support, "top_k": 5 if support and "top_k" in support else None}
    base = {name: value for name, value in base.items() if value is not None}
    if given:
        base["draws"] = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(4))
    if support == "rollout":
        base["on"] = "student"
    before = loss_or_none(objective, **base)
    if before is None:
        return
    if given:
        without = {name: value for name, value in base.items() if name != "draws"}
        assert not equal(before, loss_or_none(objective, **without))
    unchanged = [
        name
        for name, value in [*OTHER.items(), ("importance", False)]
        if name not in base and equal(before, loss_or_none(objective, **{**base, name: value}))
    ]
    # One of its two values is the objective's own, and so may be the support.
    assert unchanged.count("importance") <= 1
    assert not set(unchanged) - {"importance", "support"}


def loss_or_none(objective, **arguments):
    try:
        return loss(objective, **arguments)
    except ValueError:
        return None


def equal(one, other):
    return other is not None and torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"draws": torch.zeros(2, 5, dtype=torch.long)},
            "draws has no effect: the support full draws no tokens",
        ),
        ({"generator": torch.Generator()}, "generator has no effect"),
        (
            {"support": "sampled", "draws": torch.zeros(2, 5, dtype=torch.long), "draw_temperature": 3.0},
            "draw_temperature has no effect: the tokens were drawn already",
        ),
        ({"support": "rollout", "on": "student"}, "the tokens that the student wrote: give them as draws"),
        ({"on": "student"}, "on has no effect: it tells whose rows"),
    ],
)
def test_the_refusal_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        loss("forward_kl", **arguments)
