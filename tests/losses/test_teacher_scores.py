"""Teachers that are known by their normalizer or at their likeliest tokens, against the whole
distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.problems import NUM_TOKENS, TERMS, Problem, assert_equal, compute, problem
from torch import Tensor

from hpd.losses import Scores, TopKScores, reweighted_nll
from hpd.losses import teacher_side as side
from hpd.losses.products import logits
from hpd.methods.supports import label, top_k
from hpd.methods.terms import Term
from hpd.objectives import acceptance, nll

TERM_CASES = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
EXTRAS = {"plain": {}, "bias and scale": {"scale": 0.5}, "softcap": {"softcap": 3.0, "scale": 1.5}}


def with_log_z(given: Problem) -> Problem:
    return given._replace(teacher=given.teacher._replace(log_z=torch.logsumexp(logits(given.teacher), -1)))


def top_k_of(given: Problem, k: int) -> Any:
    logprobs = torch.log_softmax(logits(given.teacher), -1)
    values, tokens = logprobs.topk(k, -1)
    label = logprobs.gather(1, given.labels[:, None])[:, 0]
    return given._replace(teacher=TopKScores(tokens, values, label, given.teacher.vocab))


@TERM_CASES
@pytest.mark.parametrize(
    "teacher_vocab", [290, *(pytest.param(size, marks=pytest.mark.slow) for size in (255, 200))]
)
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_a_known_normalizer_changes_nothing(terms: Any, teacher_vocab: int, extras: dict[str, Any]) -> None:
    bias = torch.linspace(-1, 1, teacher_vocab, dtype=torch.float64) if extras else None
    given = problem(255, teacher_vocab=teacher_vocab, teacher_head={"bias": bias, **extras})
    assert_equal(
        compute(with_log_z(given), terms, rows=5, metric_stride=2),
        compute(given, terms, rows=5, metric_stride=2),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_known_normalizer_saves_the_teacher_s_product(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(601)
    rows: list[int] = []
    project = side.project_
    monkeypatch.setattr(side, "project_", lambda scores, out: rows.append(len(out)) or project(scores, out))
    compute(with_log_z(given), TERMS["hpd"], metric_stride=0)
    assert sum(rows) == 0
    compute(with_log_z(given), TERMS["hpd"], metric_stride=4)
    assert sum(rows) == len(range(0, NUM_TOKENS, 4))
    compute(with_log_z(given), TERMS["forward_kl"], metric_stride=0)
    assert sum(rows) == len(range(0, NUM_TOKENS, 4)) + NUM_TOKENS


@TERM_CASES
@pytest.mark.parametrize("teacher_vocab", [255, 290])
def test_all_tokens_known_are_the_whole_distribution(terms: Any, teacher_vocab: int) -> None:
    given = problem(255, teacher_vocab=teacher_vocab)
    known = compute(top_k_of(given, teacher_vocab), terms, rows=5)
    assert float(known.stats.pop("teacher_tail_mass")) == pytest.approx(0.0, abs=1e-9)
    assert float(known.stats.pop("draws_off_top_k", torch.zeros(()))) == 0.0
    assert_equal(known, compute(given, terms, rows=5), rtol=1e-7, atol=1e-7)


@TERM_CASES
@pytest.mark.parametrize("teacher_vocab", [255, 290, 200])
def test_few_tokens_known_are_the_same_in_both_implementations(terms: Any, teacher_vocab: int) -> None:
    given = top_k_of(problem(255, teacher_vocab=teacher_vocab), 9)
    assert_equal(compute(given, terms, rows=5), compute(given, terms, impl="reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_tail_is_shared_evenly_and_stays_below_the_known_tokens(k: int) -> None:
    given = problem(255, sharpness=2.0)
    teacher = top_k_of(given, k).teacher
    everything = torch.arange(255).expand(NUM_TOKENS, -1)
    logprobs = side.token_logprobs(
        teacher, torch.zeros(NUM_TOKENS, dtype=torch.float64), given.labels, everything
    )
    exact = torch.log_softmax(logits(given.teacher), -1)
    known = (
        torch.zeros_like(exact, dtype=torch.bool)
        .scatter(1, teacher.tokens, True)
        .scatter(1, given.labels[:, None], True)
    )
    torch.testing.assert_close(logprobs[known], exact[known], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        logprobs.exp().sum(-1), torch.ones(NUM_TOKENS, dtype=torch.float64), rtol=0, atol=1e-9
    )
    for row in range(NUM_TOKENS):
        tail: Tensor = logprobs[row][~known[row]]
        assert float(tail.max() - tail.min()) == 0.0
        assert float(tail.max()) <= float(teacher.logprobs[row].min())
    dense = side.teacher_logits_(teacher, given.labels, torch.empty(NUM_TOKENS, 255, dtype=torch.float64))
    torch.testing.assert_close(dense, logprobs, rtol=0, atol=0)


def test_tail_mass_is_what_lies_outside() -> None:
    given = problem(255)
    known = top_k_of(given, 9)
    exact = torch.softmax(logits(given.teacher), -1)
    exact.scatter_(1, known.teacher.tokens, 0.0).scatter_(1, given.labels[:, None], 0.0)
    stats = compute(known, TERMS["hpd"]).stats
    assert float(stats["teacher_tail_mass"]) == pytest.approx(float(exact.sum()), rel=1e-9)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_draws_that_a_top_k_teacher_can_only_bound_are_counted(impl: str) -> None:
    given = problem(255)
    known = top_k_of(given, 9)
    draws = torch.randint(0, 255, (NUM_TOKENS, 1), generator=torch.Generator().manual_seed(3))
    draws[::2] = known.teacher.tokens[::2, :1]
    draws[1] = given.labels[1]
    stats = compute(known, TERMS["hpd"], impl=impl, draws=draws).stats
    off = [
        int(token) not in {*map(int, known.teacher.tokens[i]), int(given.labels[i])}
        for i, token in enumerate(draws)
    ]
    assert 0 < sum(off) < NUM_TOKENS
    assert float(stats["draws_off_top_k"]) == pytest.approx(sum(off))
    assert "draws_off_top_k" not in compute(given, TERMS["hpd"], impl=impl, draws=draws).stats


def test_low_precision_rows_are_read_in_full_precision() -> None:
    given = problem(255)
    weight = given.teacher.head.weight
    assert weight is not None
    head = given.teacher.head._replace(weight=weight.bfloat16())
    teacher = Scores(given.teacher.hidden.bfloat16(), head)
    known = teacher._replace(log_z=torch.logsumexp(logits(teacher), -1))
    single = given.to(torch.float32)
    assert_equal(
        compute(single._replace(teacher=known), TERMS["hpd"], metric_stride=0),
        compute(single._replace(teacher=teacher), TERMS["hpd"], metric_stride=0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_acceptance_of_a_top_k_teacher_is_off_by_its_tail_at_most() -> None:
    """And with a bucket for the tail it is an upper bound."""
    given = problem(41, sharpness=0.7)
    log_q, log_p = (
        torch.log_softmax(side.hidden @ side.head.weight.t(), -1)  # type: ignore[union-attr]
        for side in (given.student, given.teacher)
    )
    exact = torch.minimum(log_p, log_q).exp().sum(-1)
    top, at = log_p.topk(5), given.labels[:, None]
    known = TopKScores(top.indices, top.values, log_p.gather(1, at)[:, 0], 41)
    stats = reweighted_nll(given.student, known, given.labels, [Term("a", nll(), label())]).stats
    error = (stats["acceptance"] - exact.sum()).abs()
    assert 0 < float(error) <= float(stats["teacher_tail_mass"])
    bucket = Term("a", acceptance(), top_k(5))
    bound = reweighted_nll(given.student, given.teacher, given.labels, [bucket]).stats["value/a"]
    assert float(bound) < float(-exact.log().sum())
