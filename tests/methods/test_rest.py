"""Losses that a student which equals its teacher has nothing to learn from, against autograd."""

import pytest
import torch

from hpd import distillation_loss
from hpd.methods import METHODS, method_terms
from hpd.methods.rest import rests_where_equal
from hpd.methods.schedules import Schedule
from hpd.methods.terms import TermConfig

FOLLOW_LABELS = {"sft", "seqkd", "psft", "label_forward_kl", "uld"}


@pytest.mark.parametrize("method", METHODS)
def test_methods_rest_at_the_teacher_unless_they_follow_labels(method):
    assert rests_where_equal(method_terms(method, {})) == (method not in FOLLOW_LABELS)


@pytest.mark.parametrize(
    ("method", "kwargs", "rests"),
    [
        ("hpd", {"mask": False}, False),
        ("hpd", {"mask": False, "forward": 0.0}, True),
        ("hpd_expected", {"mask": False}, False),
        ("hpd", {"num_samples": 3, "sample_fraction": 0.5}, True),
        ("hpd", {"exclude_label": True, "draw_temperature": 2.0}, True),
        ("reverse_kl", {"support": "top_k", "top_k": 2}, True),
        ("forward_kl", {"temperature": 2.0}, True),
    ],
)
def test_switches_of_a_method(method, kwargs, rests):
    assert rests_where_equal(method_terms(method, kwargs)) == rests


def test_one_term_with_a_weight_at_any_time_is_enough():
    rest = TermConfig(objective="reverse_kl", support="rollout", on="student")
    assert rests_where_equal([rest])
    assert rests_where_equal([rest, TermConfig(objective="nll", weight=0.0)])
    later = TermConfig(objective="nll", weight=Schedule(schedule="linear", start=0.0, end=1.0))
    assert not rests_where_equal([rest, later])


@pytest.mark.parametrize(
    "method", ["forward_kl", "akl", "todi", "abkd", "hpd_expected", "sft", "label_forward_kl"]
)
def test_autograd_agrees(method):
    """The gradient of the loss itself, on other distributions than the four tokens that are looked at."""
    logits = torch.randn(1, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student = logits.clone().requires_grad_()
    labels = torch.randint(9, (1, 6), generator=torch.Generator().manual_seed(1))
    (term,) = method_terms(method, {})
    distillation_loss(student, logits, labels, term.objective, **term.kwargs).loss.backward()
    assert student.grad is not None
    assert (student.grad.abs().max() < 1e-9) == (method not in FOLLOW_LABELS)
