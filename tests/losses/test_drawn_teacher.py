"""A teacher known by draws: loss and gradient of the forward KL, unbiased; the label, exact."""

from __future__ import annotations

import pytest
import torch

from hpd.losses import Head, Scores, TopKScores, reweighted_nll
from hpd.methods import method_terms, name_terms
from hpd.methods.systematic import systematic_draws

GRID, VOCAB, N = 4000, 11, 3


@pytest.fixture(scope="module")
def case():
    """One student and one teacher at as many positions as there are uniforms."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(1, VOCAB, generator=generator, dtype=torch.float64) * 2
    return hidden, weight, torch.log_softmax(teacher, -1)


def run(case, scores, method, impl, labels):
    hidden, weight, _ = case
    weight = weight.clone().requires_grad_()
    student = Scores(hidden.expand(len(labels), -1).contiguous(), Head(weight))
    terms = name_terms(method_terms(method, {}))
    out = reweighted_nll(student, scores, labels, terms, impl=impl, scale=1.0 / len(labels), metric_stride=1)
    out.loss.backward()
    return out, weight.grad


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_the_mean_gradient_is_the_exact_one(case, impl):
    log_p = case[2]
    labels = torch.full((GRID,), 5)
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    drawn = systematic_draws(log_p.expand(GRID, -1), uniforms, N)
    estimate = TopKScores(drawn.tokens, drawn.logprobs, log_p[0, labels], VOCAB, drawn=True)
    exact = Scores(log_p.expand(GRID, -1).contiguous(), Head(None))
    found, gradient = run(case, estimate, "forward_kl", impl, labels)
    wanted, exact_gradient = run(case, exact, "forward_kl", impl, labels)
    torch.testing.assert_close(gradient, exact_gradient, rtol=0, atol=20 / GRID)
    assert (gradient[5] - exact_gradient[5]).abs().max() < 20 / GRID  # the label is a token like others
    # Values differ by the entropies, which say nothing about the student.
    entropy = -(log_p.exp() * log_p).sum()
    own = -(drawn.logprobs.exp() * drawn.logprobs).sum(-1).mean()
    assert float(found.loss.detach() + own) == pytest.approx(
        float(wanted.loss.detach() + entropy), abs=20 / GRID
    )
    # No number about the teacher's distribution that draws do not give; the student's own is there.
    assert {"forward_kl", "reverse_kl", "teacher_entropy", "top1_agreement"}.isdisjoint(found.stats)
    assert "teacher_tail_mass" not in found.stats
    torch.testing.assert_close(found.stats["student_entropy"], wanted.stats["student_entropy"])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("method", ["sft", "label_forward_kl", "label_reverse_kl", "label_jsd"])
def test_label_methods_read_the_labels_own_probability(case, method, impl):
    log_p = case[2]
    labels = torch.arange(VOCAB)
    drawn = systematic_draws(log_p.expand(VOCAB, -1), torch.full((VOCAB,), 0.3).double(), N)
    estimate = TopKScores(drawn.tokens, drawn.logprobs, log_p[0, labels], VOCAB, drawn=True)
    exact = Scores(log_p.expand(VOCAB, -1).contiguous(), Head(None))
    found, gradient = run(case, estimate, method, impl, labels)
    wanted, exact_gradient = run(case, exact, method, impl, labels)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(gradient, exact_gradient)


def test_terms_on_the_label_and_on_the_vocabulary_are_refused_together(case):
    log_p, labels = case[2], torch.arange(2)
    estimate = TopKScores(torch.tensor([[0], [1]]), torch.zeros(2, 1), log_p[0, labels], VOCAB, drawn=True)
    terms = [*name_terms(method_terms("label_reverse_kl", {})), *name_terms(method_terms("forward_kl", {}))]
    student = Scores(case[0].expand(2, -1), Head(case[1]))
    with pytest.raises(ValueError, match="and not both at once"):
        reweighted_nll(student, estimate, labels, terms)
