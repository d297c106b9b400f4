"""A cap on each token's part of a divergence: the closed form, by autograd in float64."""

import math

import pytest
import torch

from hpd.losses import Head, Scores
from hpd.losses.operator import reweighted_nll
from hpd.methods.terms import TermConfig
from hpd.objectives import capped, forward_kl

DIVERGENCES = (
    "forward_kl", "reverse_kl", "symmetric_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl",
    "total_variation", "abkd", "akl", "todi", "hpd_full",
)  # fmt: skip


def sides(cap, seed=0, size=40, vocab=17):
    """Logits of both, some of whose parts of the forward KL lie on each side of the cap."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (2 * torch.randn(size, vocab, generator=generator, dtype=torch.float64) for _ in "pq")
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    share = float((log_p.exp() * (log_p - log_q) > cap).double().mean())
    assert 0.02 < share < 0.5
    return log_p, student


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("support", ["full", "top_k"])
def test_gradient_is_that_of_the_capped_sum(name, support):
    """Whatever the operator computes from weights, autograd gives for the sum of min(part, cap)."""
    cap = 0.05
    log_p, logits = sides(cap)
    logits.requires_grad_()
    more: dict = {"top_k": 6} if support == "top_k" else {}
    if name == "abkd":
        more["kwargs"] = {"alpha": 0.2, "beta": 0.7}
    term = TermConfig(objective=name, support=support, cap=cap, **more).build()
    labels = torch.zeros(len(log_p), dtype=torch.int64)
    found = reweighted_nll(Scores(logits, Head(None)), Scores(log_p, Head(None)), labels, [term])
    found.loss.backward()
    again = logits.detach().requires_grad_()
    columns = term.support.columns(log_p.clone(), again.log_softmax(-1), labels)
    plain = TermConfig(objective=name, support=support, **more).build().objective
    parts = plain.value(columns.teacher_logprobs, columns.student_logprobs)
    assert (parts > cap).any()
    expected = parts.clamp_max(cap).sum()
    expected.backward()
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-8, atol=1e-11)


def test_closed_form_on_two_tokens():
    """p = (0.9, 0.1), q = (1/2, 1/2): the parts are 0.9 log 1.8 and 0.1 log 0.2, and the cap takes the first
    off; the gradient of the second is 0.1 (q - e_2)."""
    log_p, logits = torch.tensor([[0.9, 0.1]]).log(), torch.zeros(1, 2, requires_grad=True)
    term = TermConfig(objective="forward_kl", cap=0.05).build()
    found = reweighted_nll(
        Scores(logits, Head(None)), Scores(log_p, Head(None)), torch.tensor([0]), [term]
    ).loss
    found.backward()
    assert float(found.detach()) == pytest.approx(0.05 + 0.1 * math.log(0.2), rel=1e-6)
    assert logits.grad.tolist() == [pytest.approx([0.05, -0.05], rel=1e-6)]


def test_a_cap_that_nothing_reaches_changes_nothing():
    log_p, logits = sides(0.05)
    pair = log_p, logits.log_softmax(-1)
    most = float(forward_kl().value(*pair).max())
    free = capped(forward_kl(), most * 1.01)
    assert torch.equal(free.weights(*pair), forward_kl().weights(*pair))
    assert torch.equal(free.value(*pair), forward_kl().value(*pair))
    assert not torch.equal(capped(forward_kl(), most * 0.99).value(*pair), forward_kl().value(*pair))


@pytest.mark.parametrize("given", [{"objective": "hpd"}, {"objective": "nll"}, {
    "objective": "forward_kl", "support": "sampled",
}, {"objective": "forward_kl", "support": "top_k", "top_k": 3, "tail": "drop"}])  # fmt: skip
def test_what_has_no_parts_to_cap_is_refused(given):
    with pytest.raises(ValueError, match="cap bounds what each token adds"):
        TermConfig(**given, cap=0.05).build()


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan])
def test_a_cap_is_a_number_above_zero(cap):
    with pytest.raises(ValueError, match=r"cap = .* is not allowed"):
        TermConfig(objective="forward_kl", cap=cap).build()
