"""Weights by position: each rule's closed form in float64, and what the operator makes of the weights.

Axes: N label positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from helpers.problems import NUM_TOKENS, TERMS, compute, problem, random
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores, TopKScores
from hpd.losses.functional import distillation_loss
from hpd.losses.operator import loss_by_source
from hpd.losses.policy_gradient import policy_gradient_nll
from hpd.losses.position_weights import (
    drift_weights,
    first_positions,
    highest_positions,
    position_weights,
    step_weights,
)
from hpd.methods.position_rules import PositionRule
from hpd.methods.strategy import StrategyConfig
from hpd.methods.supports import full, label, sampled
from hpd.methods.terms import Term
from hpd.objectives import forward_kl, nll, reverse_kl

LENGTHS = (4, 1, 6, 2)  # of four rows, NUM_TOKENS in all
ROWS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
STEPS = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 6])
VOCAB = 17


def plain(terms: tuple[Term, ...]) -> list[Term]:
    return [term._replace(positions=None) for term in terms]


def batch_of(labels: Tensor) -> TokenBatch:
    everything = torch.arange(len(labels))
    return TokenBatch(
        everything, labels, everything, torch.tensor(0), ROWS, torch.tensor(LENGTHS), everything,
        everything[:0], steps=STEPS, position_weights=random(len(labels), seed=11).abs(),
    )  # fmt: skip


# ---- what a weight is to the loss


FORMS = ["hpd", "hpd_expected", "forward_kl", "abkd", "softened", "top_k bucket", "sum"]


@pytest.mark.parametrize("name", FORMS)
def test_weights_of_one_change_no_bit(name: str) -> None:
    given, terms_ = problem(VOCAB), plain(TERMS[name])
    ones = {term.name: torch.ones(NUM_TOKENS, dtype=torch.float64) for term in terms_}
    for impl in ("chunked", "reference"):
        today = compute(given, terms_, 5, position_weights=None, impl=impl)
        weighed = compute(given, terms_, 5, position_weights=ones, impl=impl)
        assert torch.equal(today.loss, weighed.loss)
        for grad, other in zip(today.grads, weighed.grads, strict=True):
            assert grad is other is None or torch.equal(grad, other)  # type: ignore[arg-type]
        assert all(torch.equal(value, weighed.stats[name]) for name, value in today.stats.items())


@pytest.mark.parametrize(
    "name", ["hpd", "hpd_expected", "forward_kl", "abkd", "softened", "top_k bucket", "sum"]
)
def test_weights_of_zero_and_one_are_masked_labels_over_all_label_tokens(name: str) -> None:
    given, terms = problem(VOCAB), plain(TERMS[name])
    keep = random(NUM_TOKENS, seed=12) > 0
    assert 0 < int(keep.sum()) < NUM_TOKENS
    weights = {term.name: keep.double() for term in terms}
    weighed = compute(given, terms, 5, position_weights=weights, scale=1 / NUM_TOKENS)
    some = given._replace(
        student=given.student.at(keep), teacher=given.teacher.at(keep), labels=given.labels[keep],
        uniforms=given.uniforms[keep],
    )  # fmt: skip
    # The denominator stays that of all labels.
    masked = compute(some, terms, 5, position_weights=None, scale=1 / NUM_TOKENS)
    torch.testing.assert_close(weighed.loss, masked.loss, rtol=1e-12, atol=1e-13)
    assert weighed.grads[0] is not None
    assert not weighed.grads[0][~keep].any()
    torch.testing.assert_close(weighed.grads[0][keep], masked.grads[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weighed.grads[1], masked.grads[1], rtol=1e-12, atol=1e-13)


def test_a_weight_multiplies_its_own_term_and_is_a_constant() -> None:
    given = problem(VOCAB)
    terms = (Term("a", forward_kl(), full(), weight=0.5), Term("b", reverse_kl(), full(), temperature=2.0))
    weights = {"a": random(NUM_TOKENS, seed=13).abs().requires_grad_()}
    got = compute(given, terms, 5, position_weights=weights)
    assert weights["a"].grad is None
    parts = [compute(given, (term,), 5, position_weights={}) for term in terms]
    rows = []
    for n in torch.arange(NUM_TOKENS).split(1):
        one = given._replace(student=given.student.at(n), teacher=given.teacher.at(n), labels=given.labels[n])
        rows.append(compute(one, terms[:1], uniforms=None).loss)
    expected = (torch.stack(rows) * weights["a"].detach()).sum() + parts[1].loss
    torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=1e-12)


def test_weights_are_advantages_of_the_clipped_policy_gradient() -> None:
    """At the first update the ratio is one, and its gradient that of the direct strategy."""
    given = problem(VOCAB)
    terms = [Term("a", reverse_kl(), label() + sampled(1)), Term("b", forward_kl(), full())]
    weights = {term.name: random(NUM_TOKENS, seed=i).abs() for i, term in enumerate(terms)}
    found = []
    for clipped in (False, True):
        hidden = given.student.hidden.clone().requires_grad_()
        student, batch = given.student._replace(hidden=hidden), batch_of(given.labels)
        common = {"uniforms": given.uniforms, "position_weights": weights, "scale": 0.125, "chunk_bytes": 400}
        if clipped:
            strategy = StrategyConfig(type="policy_gradient")
            output, _ = policy_gradient_nll(
                student, given.teacher, batch, terms, strategy, frozen=None, row_scale=1.0, **common
            )
        else:
            output = loss_by_source(student, given.teacher, batch, terms, **common)
        output.loss.backward()
        found.append((output.loss.detach(), hidden.grad))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6)


def test_terms_of_one_writer_get_the_weights_of_their_positions() -> None:
    given = problem(VOCAB)
    odd = torch.arange(1, NUM_TOKENS, 2)
    batch = batch_of(given.labels)._replace(by_dataset=torch.arange(0, NUM_TOKENS, 2), by_student=odd)
    weights = random(NUM_TOKENS, seed=14).abs()
    term = Term("a", forward_kl(), full(), on="student")
    got = loss_by_source(given.student, given.teacher, batch, [term], position_weights={"a": weights})
    some = given._replace(
        student=given.student.at(odd), teacher=given.teacher.at(odd), labels=given.labels[odd]
    )
    want = compute(some, (term,), uniforms=None, position_weights={"a": weights[odd]})
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "a trainer reads them"),
        ({"b": torch.ones(NUM_TOKENS)}, "a trainer reads them"),
        ({"a": torch.ones(NUM_TOKENS), "c": torch.ones(NUM_TOKENS)}, "'c' of shape"),
    ],
    ids=["none", "of another", "of no term"],
)
def test_weights_that_are_missing_or_too_many_are_refused(weights, said) -> None:
    term = Term("a", forward_kl(), full(), positions=PositionRule(rule="drift"))
    with pytest.raises(ValueError, match=said):
        compute(problem(VOCAB), (term,), position_weights=weights)


def test_the_functional_loss_refuses_a_rule() -> None:
    logits = torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match="reads rows as a trainer lays them out"):
        distillation_loss(logits, logits, torch.ones(1, 3, dtype=torch.long), "nll", weight={"rule": "drift"})


# ---- closed forms, row by row, in float64


def by_row(values: Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.split(LENGTHS)]


def test_first_share_is_the_rounded_up_share_of_each_row() -> None:
    for share, counts in ((0.3, (2, 1, 2, 1)), (0.5, (2, 1, 3, 1)), (1.0, LENGTHS), (1e-6, (1, 1, 1, 1))):
        found = first_positions(ROWS, torch.tensor(LENGTHS), share)
        expected = [[i < count for i in range(n)] for n, count in zip(LENGTHS, counts, strict=True)]
        assert by_row(found) == expected, share
    for share in range(1, 10):  # 0.7 * 10 is above 7 in floating point
        one = first_positions(torch.zeros(10, dtype=torch.long), torch.tensor([10]), share / 10)
        assert int(one.sum()) == share


def test_highest_share_takes_each_rows_greatest() -> None:
    values = random(NUM_TOKENS, seed=15)
    for share, counts in ((0.5, (2, 1, 3, 1)), (0.2, (1, 1, 2, 1))):
        found = by_row(highest_positions(values, ROWS, share))
        for row, chosen, count in zip(by_row(values), found, counts, strict=True):
            assert chosen == [value in sorted(row)[-count:] for value in row]


def test_drift_is_the_gap_still_to_come() -> None:
    gaps = random(NUM_TOKENS, seed=16)
    for gain in (1.0, 0.25):
        for row, found in zip(by_row(gaps), by_row(drift_weights(gaps, ROWS, gain)), strict=True):
            sizes = [abs(gap) for gap in row]
            expected = [1 + gain * (1 - sum(sizes[:t]) / sum(sizes)) for t in range(len(sizes))]
            assert found == pytest.approx(expected, rel=1e-13)
            assert found[0] == 1 + gain
    assert drift_weights(torch.zeros(3), torch.tensor([0, 0, 1]), 0.5).tolist() == [1.5] * 3


def test_steps_are_weighed_by_how_much_nearer_the_first_was() -> None:
    gaps = random(NUM_TOKENS, seed=17)
    found = step_weights(gaps, ROWS, STEPS, 1e-3, 1.5)
    for row in range(len(LENGTHS)):
        of_row = row == ROWS
        means = {int(k): float(gaps[k == STEPS].abs().mean()) for k in STEPS[of_row].unique()}
        first = means[min(means)]
        for n in of_row.nonzero().flatten().tolist():
            expected = min((first + 1e-3) / (means[int(STEPS[n])] + 1e-3), 1.5)
            assert float(found[n]) == pytest.approx(expected, rel=1e-12)
    assert float(found.max()) == 1.5
    assert bool((found < 1).any())


@pytest.mark.parametrize("rule", ["entropy", "drift", "steps"])
@pytest.mark.parametrize("kind", ["model", "hidden", "top_k", "routed"])
def test_rules_read_both_models_whatever_the_teacher_and_the_chunks(rule: str, kind: str) -> None:
    given = problem(VOCAB)
    log_q, log_p = (
        torch.log_softmax(side.hidden @ side.head.weight.t(), -1)  # type: ignore[union-attr]
        for side in (given.student, given.teacher)
    )
    at = given.labels[:, None]
    gaps = (log_p.gather(1, at) - log_q.gather(1, at))[:, 0]
    entropy = -(log_q.exp() * log_q).sum(-1)
    expected = {
        "entropy": highest_positions(entropy, ROWS, 0.5).double(),
        "drift": drift_weights(gaps, ROWS, 1.0),
        "steps": step_weights(gaps, ROWS, STEPS, 1e-3, 1.5),
    }[rule]
    whole = given.teacher
    if kind == "hidden":
        whole = whole._replace(log_z=torch.logsumexp(whole.hidden @ whole.head.weight.t(), -1))  # type: ignore[union-attr]
    if kind == "top_k":
        top = log_p.topk(3)
        whole = TopKScores(top.indices, top.values, log_p.gather(1, at)[:, 0], VOCAB)
    parts = [(None, whole)]
    if kind == "routed":
        order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(0))
        parts = [(some, whole.at(some)) for some in (order[:6], order[6:])]
    share = 0.5 if rule == "entropy" else None
    term = Term("a", nll(), label(), positions=PositionRule(rule=rule, share=share))  # type: ignore[arg-type]
    for rows in (2, 100):
        found = position_weights([term], batch_of(given.labels), given.student, parts, rows * 4 * VOCAB)
        torch.testing.assert_close(found["a"], expected, rtol=1e-11, atol=1e-12)


def test_a_column_that_the_rows_lack_is_named_and_terms_without_a_rule_have_no_weights() -> None:
    given = problem(VOCAB)
    term = Term("a", nll(), label(), positions=PositionRule(rule="column", column="merit"))
    batch = batch_of(given.labels)
    both = [term, Term("b", nll(), label())]
    found = position_weights(both, batch, given.student, [(None, given.teacher)])
    assert found.keys() == {"a"}
    assert torch.equal(found["a"], batch.position_weights)
    with pytest.raises(ValueError, match="the column merit"):
        position_weights(
            [term], batch._replace(position_weights=None), given.student, [(None, given.teacher)]
        )


def test_no_positions_have_no_weights() -> None:
    none = torch.zeros(0, dtype=torch.long)
    batch = TokenBatch(none, none, none, torch.tensor(0), none, none, none, none, steps=none)
    scores = Scores(torch.zeros(0, 3), Head(torch.zeros(5, 3)))
    for rule, share in (("first", 0.5), ("entropy", 0.5), ("drift", None), ("steps", None)):
        term = Term("a", nll(), label(), positions=PositionRule(rule=rule, share=share))  # type: ignore[arg-type]
        assert position_weights([term], batch, scores, [(None, scores)])["a"].shape == (0,)
