"""An evaluation, which learns nothing, says what the step of a training says."""

import math

import pytest
import torch
from helpers.problems import TERMS, Problem, compute, problem, random

from hpd.losses import measures, reweighted_nll
from hpd.losses.measures import distribution_metrics


def evaluated(given: Problem, terms, **options):
    """Loss and statistics where no gradient is asked for, in chunks of twelve positions."""
    ruled = {
        term.name: random(len(given.labels), seed=9).abs() for term in terms if term.positions is not None
    }
    row = 8 * min(given.student.vocab, given.teacher.vocab)
    options = {"uniforms": given.uniforms, "position_weights": ruled, "chunk_bytes": 12 * row, **options}
    with torch.no_grad():
        return reweighted_nll(given.student, given.teacher, given.labels, terms, **options)


def with_normalizer(given: Problem) -> Problem:
    """As a hidden cache answers."""
    logits = given.teacher.hidden @ given.teacher.head.weight.t()
    return given._replace(teacher=given.teacher._replace(log_z=torch.logsumexp(logits, -1)))


def masked(vocab: int) -> torch.Tensor:
    """A bias that excludes every fifth token."""
    return torch.where(torch.arange(vocab) % 5 == 4, -math.inf, random(vocab, seed=3))


PROBLEMS = {
    "plain": lambda: problem(300),
    "longer teacher": lambda: problem(37, teacher_vocab=51),
    "heads with extras": lambda: problem(
        37, student_head={"bias": random(37, seed=7), "softcap": 3.0}, teacher_head={"scale": 0.5}
    ),
    "cached": lambda: with_normalizer(problem(37, teacher_vocab=51)),
    "a teacher that excludes tokens": lambda: problem(37, teacher_head={"bias": masked(37)}),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_an_evaluation_has_the_values_and_metrics_of_a_step(case, monkeypatch):
    given = PROBLEMS[case]()
    monkeypatch.setattr(measures, "_TILE_BYTES", 7 * 8 * min(given.student.vocab, given.teacher.vocab))
    for name, terms in TERMS.items():
        want, (loss, stats) = compute(given, terms), evaluated(given, terms)
        assert stats.keys() == want.stats.keys(), name
        torch.testing.assert_close(loss, want.loss, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        for key, value in stats.items():
            torch.testing.assert_close(
                value, want.stats[key], rtol=1e-10, atol=1e-10, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


def test_an_evaluation_normalizes_each_model_once(monkeypatch):
    """With the softmaxes of the metrics apart from those of the terms it took four."""
    calls, normalize = [], torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda *a, **k: calls.append(1) or normalize(*a, **k))
    for name in ("hpd", "forward_kl"):
        calls.clear()
        evaluated(problem(37), TERMS[name], chunk_bytes=2**20)
        assert len(calls) == 2, name


@pytest.mark.parametrize("vocab", [5, 256, 257, 700])
def test_of_equal_tokens_the_first_is_the_likeliest(vocab):
    """The teacher finds four tokens alike; the student agrees only if it prefers the first of them."""
    first = vocab // 3
    teacher = torch.full((2, vocab), -9.0)
    teacher[:, [first, first + 1, vocab - 2, vocab - 1]] = -1.0
    student = torch.zeros(2, vocab)
    student[0, first], student[1, vocab - 1] = 1.0, 1.0
    sums = {}
    labels = torch.tensor([first, 0])
    distribution_metrics(teacher.log_softmax(-1), student.log_softmax(-1), labels, sums)
    assert (sums["top1_agreement"], sums["mean_token_accuracy"]) == (1.0, 1.0)
