"""Supports: the draw itself, and what a sum over columns is worth in expectation.

Axes: N label positions, K columns, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from torch import Tensor

from hpd.methods.sampling import inverse_cdf
from hpd.methods.supports import Columns, Draws, Support, full, label, sampled, top_k
from hpd.objectives import OBJECTIVES, Objective

BELOW_ONE = 1.0 - 2.0**-53
VOCABULARIES = [1, 7, 255, 256, 257, 1000, 5000]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_distribution(num_rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    logits = 2.0 * torch.randn(num_rows, vocab, generator=generator(seed), dtype=torch.float64)
    return torch.log_softmax(logits, -1).to(dtype)


def uniform_numbers(num_rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.rand(num_rows, count, generator=generator(seed), dtype=torch.float64)


# ---- inverse CDF


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_inverse_cdf_is_the_first_token_whose_cumulative_mass_exceeds_the_number(vocab: int) -> None:
    probs, numbers = log_distribution(20, vocab, 1).exp(), uniform_numbers(20, 9)
    exceeds = probs.cumsum(-1)[:, None, :] > (numbers * probs.sum(-1, keepdim=True))[..., None]  # [N, n, V]
    assert torch.equal(inverse_cdf(probs, numbers), exceeds.int().argmax(-1))


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_inverse_cdf_in_float32_errs_by_rounding_only(vocab: int) -> None:
    probs, numbers = log_distribution(20, vocab, 2, torch.float32).exp(), uniform_numbers(20, 9)
    tokens = inverse_cdf(probs, numbers)
    ends = probs.double().cumsum(-1) / probs.double().sum(-1, keepdim=True)
    starts = ends - probs.double()
    assert (numbers >= starts.gather(1, tokens) - 1e-6).all()
    assert (numbers <= ends.gather(1, tokens) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_inverse_cdf_of_a_one_hot_row_is_its_token(vocab: int, dtype: torch.dtype) -> None:
    hot = torch.tensor(sorted({0, vocab // 2, vocab - 1}))
    probs = torch.nn.functional.one_hot(hot, vocab).to(dtype)
    numbers = torch.tensor([0.0, 1e-300, 0.3, BELOW_ONE], dtype=torch.float64).expand(len(hot), 4)
    assert torch.equal(inverse_cdf(probs, numbers), hot[:, None].expand(-1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", VOCABULARIES[1:])
def test_inverse_cdf_never_gives_a_token_without_mass(vocab: int, dtype: torch.dtype) -> None:
    probs = log_distribution(40, vocab, 3, dtype).exp()
    keep = torch.rand(40, vocab, generator=generator(4)) < 0.3
    keep[:, vocab // 2] = True
    keep[:10, : vocab // 2] = False  # zero mass in front
    keep[10:20, vocab // 2 + 1 :] = False  # and at the end
    probs = probs * keep
    edges = torch.tensor([0.0, 5e-324, 2.0**-53, 0.5, 1 - 2.0**-24, BELOW_ONE], dtype=torch.float64)
    # The edges of the row's own cumulative masses, where rounding could go either way.
    own = (probs.double().cumsum(-1) / probs.double().sum(-1, keepdim=True)).clamp_max(BELOW_ONE)
    numbers = torch.cat(
        [edges.expand(40, -1), uniform_numbers(40, 50), own[:, :: max(vocab // 50, 1)]], dim=1
    )
    tokens = inverse_cdf(probs, numbers)
    assert (probs.gather(1, tokens) > 0).all()
    mass = torch.where(probs > 0, 1, 0)
    assert torch.equal(tokens[:, 0], mass.argmax(-1))
    assert torch.equal(tokens[:, 5], vocab - 1 - mass.flip(-1).argmax(-1))


def test_inverse_cdf_reaches_tokens_rarer_than_a_float32_step() -> None:
    probs = torch.tensor([[1.0, 1e-9]])
    assert inverse_cdf(probs, torch.tensor([[0.5, 1 - 1e-10]], dtype=torch.float64)).tolist() == [[0, 1]]


def test_inverse_cdf_does_not_ask_for_normalized_rows_or_any_mass() -> None:
    probs, numbers = log_distribution(5, 300, 5).exp(), uniform_numbers(5, 4)
    assert torch.equal(inverse_cdf(probs * 8.0, numbers), inverse_cdf(probs, numbers))
    assert inverse_cdf(torch.zeros(2, 300), uniform_numbers(2, 3)).tolist() == [[0] * 3] * 2


# ---- draws


def draw(support: Support, log_q: Tensor, labels: Tensor, numbers: Tensor) -> Draws:
    return support.draw(log_q, log_q.exp(), labels, numbers)


def expected_probabilities(support: Support, log_q: Tensor, labels: Tensor) -> Tensor:
    """Probability of each token, given that there is a draw; by loops over the definition."""
    rows = []
    for row, y in zip(log_q.tolist(), labels.tolist(), strict=True):
        mass = [math.exp(x / support.temperature) for x in row]
        if support.exclude_label:
            mass[y] = 0.0
        rows.append([m / sum(mass) for m in mass])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "support",
    [
        sampled(1),
        sampled(1, temperature=0.6),
        sampled(1, temperature=1.7),
        Support(label=True, draws=1, exclude_label=True),
        Support(label=True, draws=1, exclude_label=True, temperature=1.4),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(support: Support) -> None:
    num_draws, vocab = 40_000, 300
    log_q = log_distribution(1, vocab, 6)
    labels = log_q.argmax(-1)  # the exclusion removes as much as it can
    expected = expected_probabilities(support, log_q, labels)[0] * num_draws
    draws = draw(replace(support, draws=num_draws), log_q, labels, uniform_numbers(1, num_draws, 7))
    counts = torch.bincount(draws.tokens[0], minlength=vocab).double()
    common = expected >= 5  # chi-square's approximation needs a handful per cell: the rest is one cell
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    statistic, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert abs(statistic - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "support",
    [
        sampled(3),
        sampled(2, temperature=0.5),
        Support(label=True, draws=2, exclude_label=True, temperature=2.0),
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_the_draw(support: Support) -> None:
    log_q, labels = log_distribution(30, 11, 8), torch.arange(30) % 11
    draws = draw(support, log_q, labels, uniform_numbers(30, support.num_uniforms))
    expected = expected_probabilities(support, log_q, labels).log().gather(1, draws.tokens)
    torch.testing.assert_close(draws.logprobs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_do_not_depend_on_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    support = Support(label=True, draws=3, share=0.7, exclude_label=True, temperature=1.3)
    log_q, labels, numbers = log_distribution(23, 601, 9, dtype), torch.arange(23), uniform_numbers(23, 4)
    together = draw(support, log_q, labels, numbers)
    order = torch.randperm(23, generator=generator(10))
    for rows in (torch.tensor([5]), torch.arange(4, 11), order):
        alone = draw(support, log_q[rows], labels[rows], numbers[rows])
        assert torch.equal(alone.tokens, together.tokens[rows])
        assert torch.equal(alone.logprobs, together.logprobs[rows])


def test_the_excluded_label_is_never_drawn() -> None:
    support = Support(label=True, draws=4, exclude_label=True)
    log_q = log_distribution(200, 5, 11)
    labels = log_q.argmax(-1)
    draws = draw(support, log_q, labels, uniform_numbers(200, 4))
    assert (draws.tokens != labels[:, None]).all()


def test_a_position_with_nothing_but_the_label_to_draw_repeats_it() -> None:
    support = Support(label=True, draws=2, exclude_label=True)
    log_q = torch.tensor([[-math.inf, 0.0, -math.inf]])
    draws = draw(support, log_q, torch.tensor([1]), uniform_numbers(1, 2))
    assert draws.tokens.tolist() == [[1, 1]]
    columns = support.columns(log_q, log_q, torch.tensor([1]), draws)
    assert columns.coefficients is not None
    assert columns.coefficients.tolist() == [[1.0, 0.0, 0.0]]


def test_share_leaves_the_label_where_no_draw_is_made() -> None:
    num_rows = 5_000
    everywhere = Support(label=True, draws=2)
    log_q = log_distribution(1, 8, 12).expand(num_rows, -1)
    labels, numbers = torch.full((num_rows,), 3), uniform_numbers(num_rows, 3)
    whole = draw(everywhere, log_q, labels, numbers)
    for share in (0.0, 0.3, 1.0):
        support = replace(everywhere, share=share)
        assert support.num_uniforms == (3 if share < 1 else 2)
        draws = draw(support, log_q, labels, numbers)
        drawn = numbers[:, 2] < share
        assert abs(drawn.double().mean() - share) < 4 * math.sqrt(share * (1 - share) / num_rows) + 1e-12
        # The coin is a number of its own: what is drawn is what would have been drawn anyway.
        assert torch.equal(draws.tokens[drawn], whole.tokens[drawn])
        assert (draws.tokens[~drawn] == 3).all()
        coefficients = support.columns(log_q, log_q, labels, draws).coefficients
        assert coefficients is not None
        assert (coefficients[~drawn] == torch.tensor([1.0, 0.0, 0.0])).all()


# ---- expectation over the draw


class Outcomes(NamedTuple):
    """Every outcome of the draw at one position: numbers that lead to it, its tokens, and its probability."""

    uniforms: Tensor  # [N, u]
    tokens: Tensor  # [N, n]
    probabilities: Tensor  # [N]


def outcomes(support: Support, logprobs: Tensor, y: int) -> Outcomes:
    """All n-tuples of tokens, times the coin where there is one. Axes: N outcomes."""
    probs = expected_probabilities(support, logprobs[None], torch.tensor([y]))[0].tolist()
    middles = [sum(probs[:v]) + probs[v] / 2 for v in range(len(probs))]
    numbers, tokens, chances = [], [], []
    for draws in itertools.product([v for v in range(len(probs)) if probs[v] > 0], repeat=support.draws):
        chance = math.prod(probs[v] for v in draws)
        own = [middles[v] for v in draws]
        if support.share == 1.0:
            numbers, tokens, chances = [*numbers, own], [*tokens, draws], [*chances, chance]
            continue
        numbers += [[*own, support.share / 2], [*own, (1 + support.share) / 2]]
        tokens += [draws, (y,) * support.draws]
        chances += [chance * support.share, chance * (1 - support.share)]
    as_tensor = lambda rows: torch.tensor(rows, dtype=torch.float64)  # noqa: E731
    return Outcomes(as_tensor(numbers), torch.tensor(tokens), as_tensor(chances))


def gradient(
    objective: Objective, support: Support, log_p: Tensor, log_q: Tensor, y: Tensor, draws: Draws | None
) -> Tensor:
    """Gradient of the logits by autograd on `-sum_k c_k w_k log q_k`. Axes: N positions."""
    logits = log_q.clone().requires_grad_()
    columns = support.columns(log_p, torch.log_softmax(logits, -1), y, draws)
    with torch.no_grad():
        weights = objective.weights(columns.teacher_logprobs, columns.student_logprobs)
        if columns.coefficients is not None:
            weights = weights * columns.coefficients
    (grad,) = torch.autograd.grad(-(weights * columns.student_logprobs).sum(), logits)
    return grad


def value(
    objective: Objective, support: Support, log_p: Tensor, log_q: Tensor, y: Tensor, draws: Draws | None
) -> Tensor:
    columns = support.columns(log_p, log_q, y, draws)
    values = objective.value(columns.teacher_logprobs, columns.student_logprobs)
    return (values if columns.coefficients is None else values * columns.coefficients).sum(-1)  # [N]


def token_objectives() -> Iterator[tuple[str, Objective]]:
    params = {
        "js": {"lam": 0.3},
        "abkd": {"alpha": 0.2, "beta": 0.7},
        "taid": {"t": 0.5},
        "f_divergence": {"f": lambda r: (r - 1) ** 2, "df": lambda r: 2 * (r - 1)},
    }
    for name, factory in OBJECTIVES.items():
        objective = factory(**params.get(name, {}))
        if objective.domain == "token":
            yield name, objective


UNBIASED = [
    sampled(1),
    sampled(2),
    sampled(1, temperature=1.6),
    sampled(2, of="teacher"),
    Support(label=True, draws=1, draws_of="teacher", exclude_label=True, temperature=0.7),
    Support(label=True, draws=1),
    Support(label=True, draws=3),
    Support(label=True, draws=2, temperature=0.7),
    Support(label=True, draws=1, exclude_label=True),
    Support(label=True, draws=2, exclude_label=True, temperature=1.5),
    Support(label=True, draws=1, share=0.25),
    Support(label=True, draws=2, share=0.6, exclude_label=True, temperature=0.8),
]


@pytest.mark.parametrize(
    "support", UNBIASED, ids=lambda s: f"{s},T{s.temperature},share{s.share},{s.exclude_label=}"
)
def test_the_expectation_over_the_draw_is_the_whole_vocabulary(support: Support) -> None:
    vocab, y = 5, 3
    log_p, log_q = log_distribution(1, vocab, 13), log_distribution(1, vocab, 14)
    drawn_from = log_p if support.draws_of == "teacher" else log_q
    cases = outcomes(support, drawn_from[0], y)
    assert cases.probabilities.sum().item() == pytest.approx(1.0, abs=1e-12)
    num = len(cases.probabilities)
    rows, labels = (log_p.expand(num, -1), log_q.expand(num, -1)), torch.full((num,), y)
    draws = draw(support, drawn_from.expand(num, -1), labels, cases.uniforms)
    assert torch.equal(draws.tokens, cases.tokens)
    for name, objective in token_objectives():
        exact = gradient(objective, full(), log_p, log_q, labels[:1], None)[0]
        mean = cases.probabilities @ gradient(objective, support, *rows, labels, draws)
        torch.testing.assert_close(
            mean, exact, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
        exact_value = value(objective, full(), log_p, log_q, labels[:1], None)
        mean_value = cases.probabilities @ value(objective, support, *rows, labels, draws)
        assert mean_value.item() == pytest.approx(exact_value.item(), abs=1e-12), name


def test_without_importance_a_draw_counts_as_it_is() -> None:
    support = Support(label=True, draws=3, importance=False)
    log_p, log_q = log_distribution(1, 6, 15), log_distribution(1, 6, 16)
    draws = Draws(torch.tensor([[4, 2, 4]]), log_q.gather(1, torch.tensor([[4, 2, 4]])))
    columns = support.columns(log_p, log_q, torch.tensor([2]), draws)
    assert columns.tokens is not None
    assert columns.coefficients is not None
    assert columns.tokens.tolist() == [[2, 4, 2, 4]]
    assert columns.coefficients.tolist() == [[1.0, 1.0, 0.0, 1.0]]  # the label counts once
    assert torch.equal(columns.teacher_logprobs, log_p[:, [2, 4, 2, 4]])
    assert torch.equal(columns.student_logprobs, log_q[:, [2, 4, 2, 4]])


@pytest.mark.parametrize("y", range(5))
@pytest.mark.parametrize("switches", [{}, {"reverse": 0.3}, {"mask": False}, {"reinforce": False}], ids=str)
def test_hpd_expected_is_the_expectation_of_hpd(y: int, switches: dict[str, float]) -> None:
    support = Support(label=True, draws=1, importance=False)
    log_p, log_q = log_distribution(1, 5, 17), log_distribution(1, 5, 18)
    cases = outcomes(support, log_q[0], y)
    num = len(cases.probabilities)
    rows, labels = (log_p.expand(num, -1), log_q.expand(num, -1)), torch.full((num,), y)
    draws = draw(support, rows[1], labels, cases.uniforms)
    for function in (gradient, value):
        sample = function(OBJECTIVES["hpd"](**switches), support, *rows, labels, draws)
        exact = function(
            OBJECTIVES["hpd_expected"](**switches), label() + full(), log_p, log_q, labels[:1], None
        )
        torch.testing.assert_close(cases.probabilities @ sample, exact[0], rtol=0, atol=1e-12)


# ---- top-k and its tail


def top_columns(support: Support, log_p: Tensor, log_q: Tensor, labels: Tensor) -> Columns:
    columns = support.columns(log_p, log_q, labels)
    assert columns.tokens is not None
    return columns


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("with_label", [False, True])
@pytest.mark.parametrize("tail", ["drop", "bucket", "renormalize"])
def test_top_k_columns(tail: str, with_label: bool, side: str) -> None:
    log_p, log_q, k = log_distribution(40, 12, 25), log_distribution(40, 12, 26), 3
    labels = torch.arange(40) % 12
    support = top_k(k, of=side, tail=tail) + label() if with_label else top_k(k, of=side, tail=tail)
    columns = top_columns(support, log_p, log_q, labels)
    seen = set()
    for row, (p, q, y) in enumerate(
        zip(log_p.exp().tolist(), log_q.exp().tolist(), labels.tolist(), strict=True)
    ):
        ranked = p if side == "teacher" else q
        chosen = set(sorted(range(12), key=lambda v: -ranked[v])[:k]) | ({y} if with_label else set())
        seen.add(len(chosen))
        # A column that counts, and no token twice.
        counts = [1.0] * columns.student_logprobs.shape[1]
        if columns.coefficients is not None:
            counts = columns.coefficients[row].tolist()
        tokens = [v for v, c in zip(columns.tokens[row].tolist(), counts, strict=False) if c]
        assert sorted(tokens) == sorted(chosen)
        for probs, logprobs in ((p, columns.teacher_logprobs), (q, columns.student_logprobs)):
            mass = sum(probs[v] for v in chosen) if tail == "renormalize" else 1.0
            expected = [probs[v] / mass for v in tokens]
            if tail == "bucket":
                expected.append(sum(probs[v] for v in range(12) if v not in chosen))
            got = [x for x, c in zip(logprobs[row].exp().tolist(), counts, strict=True) if c]
            assert got == pytest.approx(expected, rel=1e-12)
            assert tail == "drop" or sum(got) == pytest.approx(1.0, rel=1e-12)
    assert seen == ({k, k + 1} if with_label else {k})


@pytest.mark.parametrize("tail", ["drop", "bucket", "renormalize"])
def test_the_gradient_of_a_tail_is_its_own(tail: str) -> None:
    log_p, log_q, labels = log_distribution(9, 12, 27), log_distribution(9, 12, 28), torch.arange(9)
    for support in (top_k(4, tail=tail), label() + top_k(2, of="student", tail=tail)):
        for name, objective in token_objectives():
            expected = gradient(objective, support, log_p, log_q, labels, None)
            columns = support.columns(log_p, log_q, labels)
            weights = objective.weights(columns.teacher_logprobs, columns.student_logprobs)
            if columns.coefficients is not None:
                weights = weights * columns.coefficients
            got = assembled(columns, weights, log_q)
            torch.testing.assert_close(
                got, expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
            if tail == "renormalize":  # the rest of the vocabulary does not move
                outside = torch.ones_like(got).scatter(1, columns.tokens, 0.0)  # type: ignore[arg-type]
                assert (got * outside == 0).all()


def assembled(columns: Columns, weights: Tensor, log_q: Tensor) -> Tensor:
    """Gradient of the logits from the parts that the operator adds up."""
    mass, at_tokens, beside = columns.logit_gradient(weights, log_q)
    result = (log_q.exp() * mass).scatter_add(1, columns.tokens, at_tokens)  # type: ignore[arg-type]
    return result if beside is None else result + beside


@pytest.mark.parametrize("student_tail", [1e-4, 1e-9, 1e-20])
def test_a_tail_below_the_rounding_of_one_keeps_its_gradient(student_tail: float) -> None:
    vocab, objective = 8, OBJECTIVES["forward_kl"]()
    log_p = torch.log_softmax(
        torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64), -1
    )
    z = torch.full((1, vocab), math.log(student_tail), dtype=torch.float64)
    z[:, :2] = torch.tensor([1.0, 1.2])
    log_q = torch.log_softmax(z, -1)
    results = []
    for dtype in (torch.float64, torch.float32):
        columns = top_columns(top_k(2), log_p.to(dtype), log_q.to(dtype), torch.tensor([0]))
        bucket = columns.student_logprobs[0, -1].item()
        assert bucket == pytest.approx(torch.logsumexp(log_q[0, 2:], -1).item(), rel=1e-6)
        weights = objective.weights(columns.teacher_logprobs, columns.student_logprobs)
        results.append(assembled(columns, weights, log_q.to(dtype)).double())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        results[0], gradient(objective, top_k(2), log_p, log_q, torch.tensor([0]), None), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"])
def test_a_bucket_never_adds_divergence(name: str) -> None:
    """Merging tokens cannot raise an f-divergence, more tokens cannot lower it, and all of them give the
    divergence."""
    log_p, log_q, labels = log_distribution(30, 10, 29), log_distribution(30, 10, 30), torch.arange(30) % 10
    objective = OBJECTIVES[name]()
    by_k = torch.stack([value(objective, top_k(k), log_p, log_q, labels, None) for k in range(1, 11)])
    assert (by_k >= 0).all()
    assert (by_k.diff(dim=0) >= -1e-12).all()
    whole = value(objective, full(), log_p, log_q, labels, None)
    torch.testing.assert_close(by_k[-1], whole, rtol=1e-12, atol=1e-12)
    for support in (top_k(50), label() + top_k(10), label() + top_k(9)):
        torch.testing.assert_close(
            value(objective, support, log_p, log_q, labels, None), whole, rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            gradient(objective, support, log_p, log_q, labels, None),
            gradient(objective, full(), log_p, log_q, labels, None),
            rtol=0,
            atol=1e-12,
        )


# ---- columns and unions


def test_full_is_the_vocabulary_itself() -> None:
    log_p, log_q = log_distribution(3, 9, 19), log_distribution(3, 9, 20)
    columns = full().columns(log_p, log_q, torch.tensor([0, 4, 8]))
    assert columns.teacher_logprobs is log_p
    assert columns.student_logprobs is log_q
    assert columns.tokens is None
    assert columns.coefficients is None


def test_label_and_full_count_the_label_once() -> None:
    log_p, log_q, labels = log_distribution(2, 4, 21), log_distribution(2, 4, 22), torch.tensor([3, 0])
    columns = (label() + full()).columns(log_p, log_q, labels)
    assert columns.tokens is not None
    assert columns.coefficients is not None
    assert columns.tokens.tolist() == [[3, 0, 1, 2, 3], [0, 0, 1, 2, 3]]
    assert columns.coefficients.tolist() == [[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]


def test_label_alone_is_one_column() -> None:
    log_p, log_q, labels = log_distribution(2, 4, 23), log_distribution(2, 4, 24), torch.tensor([3, 0])
    columns = label().columns(log_p, log_q, labels)
    assert columns.tokens is not None
    assert columns.tokens.tolist() == [[3], [0]]
    assert columns.coefficients is None
    assert columns.student_logprobs[:, 0].tolist() == [log_q[0, 3], log_q[1, 0]]


def test_unions() -> None:
    switches = {"importance": False, "temperature": 0.5}
    joined = Support(label=True, draws=2, **switches)
    assert label() + sampled(2, **switches) == joined
    assert sampled(2, **switches) + label() == joined
    assert label() + label() == label()
    assert str(joined) == "label + sampled(2)"
    assert str(label() + full()) == "label + full"
    assert label() + top_k(3, of="student", tail="drop") == Support(
        label=True, top_k=3, top_k_of="student", tail="drop"
    )
    assert [s.is_distribution for s in (full(), label() + full(), joined, label())] == [
        True,
        False,
        False,
        False,
    ]
    assert [top_k(3, tail=tail).is_distribution for tail in ("bucket", "renormalize", "drop")] == [
        True,
        True,
        False,
    ]
    assert full().num_uniforms == label().num_uniforms == 0
    assert joined.num_uniforms == 2


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: full() + sampled(1), "already holds every token"),
        (lambda: sampled(1) + sampled(1), "cannot be joined"),
        (lambda: Support(), "empty support"),
        (lambda: full() + top_k(3), "only the label joins"),
        (lambda: sampled(1) + top_k(3), "only the label joins"),
        (lambda: Support(whole=True, draws=1), "already holds every token"),
        (lambda: Support(whole=True, top_k=1), "already holds every token"),
        (lambda: Support(draws=1, top_k=1), "would count twice"),
        (lambda: sampled(0), "n >= 1, got 0"),
        (lambda: top_k(0), "k >= 1, got 0"),
        (lambda: Support(label=True, top_k=-2), ">= 1, got -2"),
        (lambda: Support(label=True, draws=-1), "n >= 1, got -1"),
        (lambda: Support(label=True, draws=1, share=1.5), r"in \[0, 1\], got 1.5"),
        (lambda: Support(label=True, draws=1, share=-0.1), r"in \[0, 1\], got -0.1"),
        (lambda: sampled(1, share=0.5), "speak of the label"),
        (lambda: sampled(1, exclude_label=True), "speak of the label"),
        (lambda: sampled(1, temperature=0.0), "must be > 0, got 0.0"),
        (lambda: Support(label=True, share=0.5), "speak of draws"),
        (lambda: Support(label=True, exclude_label=True), "speak of draws"),
        (lambda: Support(whole=True, temperature=2.0), "speak of draws"),
    ],
)
def test_what_does_not_fit_together_is_refused(build, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build()


@pytest.mark.parametrize("name", ["draws_of", "top_k_of", "tail"])
def test_a_word_that_is_none_of_the_allowed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Outside of tests nothing checks the types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'nobody'"):
        Support(label=True, **{name: "nobody"})
