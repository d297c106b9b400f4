"""The operator: chunked against the reference, both against formulas written here, and what it costs.

Axes: N label positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    HIDDEN,
    NUM_TOKENS,
    TERMS,
    Problem,
    Result,
    assert_equal,
    cast,
    compute,
    generator,
    problem,
    random,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpd.losses import Head, Scores, measures, reweighted_nll
from hpd.methods import method_terms, name_terms
from hpd.methods.supports import full, label, sampled, top_k
from hpd.methods.terms import Term
from hpd.objectives import forward_kl, hpd, hpd_expected, nll, reverse_kl, taid
from hpd.objectives.estimators import kl_estimate

# below one block of the inverse CDF, odd, several blocks
VOCABULARIES = [7, pytest.param(255, marks=pytest.mark.slow), 601]
# (positions of a chunk, positions of a tile)
CHUNKINGS = {"one row": (1, 100), "odd": (5, 100), "odd, tiles of two": (5, 2), "one chunk": (100, 100)}


def softmaxes(given: Problem) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities where the heads have no extras."""
    return tuple(
        torch.log_softmax(scores.hidden @ scores.head.weight.t(), -1)  # type: ignore[union-attr]
        for scores in (given.teacher, given.student)
    )  # type: ignore[return-value]


# ---- chunked equals the reference


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_chunked_is_the_reference_whatever_the_chunks(
    terms: tuple[Term, ...], vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(vocab)
    want = compute(given, terms, impl="reference")
    assert want.stats["tokens"] == NUM_TOKENS
    for rows, tile in CHUNKINGS.values():
        monkeypatch.setattr(measures, "_TILE_BYTES", tile * vocab * 8)
        assert_equal(compute(given, terms, rows), want)


@pytest.mark.parametrize(("sharpness", "tolerance"), [(1.0, 1e-5), (12.0, 2e-4)], ids=["flat", "peaky"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_float32_is_float64_to_its_rounding(
    terms: tuple[Term, ...], sharpness: float, tolerance: float
) -> None:
    """Where peaky, logits reach 80, weights 60 nats and hidden states 30: float32 rounds a product of the
    last two by 1e-4.

    Bounded divergences have gradients far below one there, as a difference of terms near one: so the error is
    compared with the larger of the gradient's norm and one. The loss of label_reverse_kl is 1.5e-5 there,
    made of probabilities of exp(-11), whose logarithms float32 rounds by 1e-6.
    """
    given = problem(101, sharpness=sharpness)
    single = given.to(torch.float32)
    want = compute(single.to(torch.float64), terms, impl="reference")
    got = compute(single, terms, 5)
    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6, abs=1e-10)
    for mine, other in zip(got.grads[:2], want.grads[:2], strict=True):
        assert mine is not None
        assert other is not None
        assert (mine - other).norm() <= tolerance * other.norm().clamp_min(1.0)


@pytest.mark.parametrize(
    ("student_head", "teacher_head"),
    [
        ({"bias": True}, {}),
        ({}, {"bias": True}),
        ({"scale": 0.25}, {}),
        ({}, {"scale": 3.0}),
        ({"softcap": 2.0}, {}),
        ({}, {"softcap": 1.5}),
        ({"bias": True, "scale": 0.5, "softcap": 3.0}, {"bias": True, "scale": 2.0, "softcap": 5.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["hpd", "hpd_expected", "reverse_kl", "softened", "top_k bucket", "sum"])
def test_extras_of_a_head(name: str, student_head: dict[str, Any], teacher_head: dict[str, Any]) -> None:
    vocab = 37
    extras = [
        {**head, **({"bias": random(vocab, seed=seed)} if head.get("bias") else {})}
        for seed, head in ((7, student_head), (8, teacher_head))
    ]
    given = problem(vocab, student_head=extras[0], teacher_head=extras[1])
    got = compute(given, TERMS[name], 5)
    assert_equal(got, compute(given, TERMS[name], impl="reference"))
    # The same logits, written out here, through the heads of logits.
    logits = []
    for scores, extra in zip(given[:2], extras, strict=True):
        z = (scores.hidden @ scores.head.weight.t() + extra.get("bias", 0.0)) * extra.get("scale", 1.0)
        cap = extra.get("softcap", math.inf)
        logits.append(cap * torch.tanh(z / cap) if cap < math.inf else z)
    plain = given._replace(student=Scores(logits[0], Head(None)), teacher=Scores(logits[1], Head(None)))
    torch.testing.assert_close(got.loss, compute(plain, TERMS[name]).loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_logits_in_the_place_of_hidden_states(terms: tuple[Term, ...]) -> None:
    given = problem(29)
    whole = compute(given, terms, 5)
    logits = [scores.hidden @ scores.head.weight.t() for scores in given[:2]]  # type: ignore[union-attr]
    direct = given._replace(student=Scores(logits[0], Head(None)), teacher=Scores(logits[1], Head(None)))
    got = compute(direct, terms, 5)
    assert_equal(got, compute(direct, terms, impl="reference"))
    torch.testing.assert_close(got.loss, whole.loss, rtol=1e-12, atol=1e-12)
    grad = got.grads[0]
    assert grad is not None
    torch.testing.assert_close(grad @ given.student.head.weight, whole.grads[0], rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["hpd", "forward_kl", "sum"])
def test_logits_with_extras(name: str) -> None:
    """Bias, scale and cap apply to given logits as they do to computed ones."""
    vocab = 11
    extras = {"bias": random(vocab, seed=7), "scale": 0.5, "softcap": 3.0}
    wide = {"bias": random(vocab + 4, seed=8), "scale": 2.0, "softcap": 4.0}
    given = problem(vocab, student_head=extras)
    direct = given._replace(
        student=Scores(random(NUM_TOKENS, vocab, seed=9), Head(None, **extras)),
        teacher=Scores(random(NUM_TOKENS, vocab + 4, seed=10), Head(None, **wide)),
    )
    assert_equal(compute(direct, TERMS[name], 5), compute(direct, TERMS[name], impl="reference"))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_tied_head_gathers_both_gradients(impl: str) -> None:
    given = problem(31)
    weight = given.student.head.weight
    assert weight is not None
    tokens = torch.randint(0, 31, (NUM_TOKENS,), generator=generator(11))

    def loss(embedding: Tensor, head: Tensor) -> Tensor:
        student = Scores(torch.tanh(embedding[tokens]), Head(head))
        return reweighted_nll(
            student, given.teacher, given.labels, TERMS["forward_kl"], impl=impl, chunk_bytes=1000
        ).loss

    tied = weight.clone().requires_grad_()
    loss(tied, tied).backward()
    apart = [weight.clone().requires_grad_() for _ in range(2)]
    loss(*apart).backward()
    torch.testing.assert_close(tied.grad, apart[0].grad + apart[1].grad, rtol=1e-12, atol=1e-12)  # type: ignore[operator]


# ---- against formulas written here


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_values_are_torch_s_own_losses(impl: str) -> None:
    given = problem(57)
    log_p, log_q = softmaxes(given)
    half = torch.logaddexp(log_p, log_q) - math.log(2.0)
    kl = lambda target, log_input: F.kl_div(log_input, target, log_target=True, reduction="sum")  # noqa: E731
    softer = [torch.log_softmax(x / 2.5, -1) for x in (log_p, log_q)]
    expected = {
        "sft": F.cross_entropy(log_q, given.labels, reduction="sum"),
        "forward_kl": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "generalized_jsd": 0.5 * kl(log_p, half) + 0.5 * kl(log_q, half),
        "total_variation": 0.5 * (log_p.exp() - log_q.exp()).abs().sum(),
        "softened": kl(*softer),
    }
    for name, value in expected.items():
        got = compute(given, TERMS[name], 5, impl=impl)
        assert got.loss.item() == pytest.approx(value.item(), rel=1e-12), name


# Values whose derivative is the gradient: nothing in them is held constant and nothing is drawn.
DIFFERENTIABLE = [
    "sft",
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "generalized_jsd",
    "js",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "abkd",
    "softened",
    "softened top_k",
    "top_k bucket",
    "top_k renormalize",
    "top_k drop",
    "student's top_k and label",
    "top_k and label, renormalize",
    "top_k beyond the vocabulary",
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_the_derivative_of_the_loss(name: str) -> None:
    extras = {"bias": random(23, seed=7), "scale": 0.5, "softcap": 3.0}
    given = problem(23, student_head=extras)
    grads = compute(given, TERMS[name], 5).grads
    tensors = [given.student.hidden, given.student.head.weight, given.student.head.bias]
    step = 1e-5
    for place, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        assert tensor is not None
        assert grad is not None
        for seed in range(3):
            direction = random(*tensor.shape, seed=100 + seed)
            losses = []
            for sign in (1, -1):
                hidden, weight, bias = [
                    x + sign * step * direction if i == place else x  # type: ignore[operator]
                    for i, x in enumerate(tensors)
                ]
                student = Scores(hidden, given.student.head._replace(weight=weight, bias=bias))  # type: ignore[arg-type]
                losses.append(reweighted_nll(student, given.teacher, given.labels, TERMS[name]).loss.item())
            slope = (losses[0] - losses[1]) / (2 * step)
            assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_terms_add_up_with_their_weights(impl: str) -> None:
    given, terms = problem(41), TERMS["sum"]
    together = compute(given, terms, 5, impl=impl)
    parts = [compute(given, [term._replace(weight=1.0)], 5, impl=impl) for term in terms]
    loss = sum(term.weight * part.loss for term, part in zip(terms, parts, strict=True))
    torch.testing.assert_close(together.loss, loss, rtol=1e-12, atol=1e-12)
    for place in (0, 1):
        grad = sum(term.weight * part.grads[place] for term, part in zip(terms, parts, strict=True))
        torch.testing.assert_close(together.grads[place], grad, rtol=1e-12, atol=1e-12)
    for term, part in zip(terms, parts, strict=True):
        name = f"value/{term.name}"
        torch.testing.assert_close(together.stats[name], part.stats[name], rtol=1e-12, atol=1e-12)
        assert together.stats[name].item() == pytest.approx(part.loss.item(), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_draws_come_from_the_whole_distribution_of_their_position(rows: int) -> None:
    given, (term,) = problem(601), TERMS["hpd"]
    log_q = softmaxes(given)[1]
    draws = term.support.draw(log_q, log_q.exp(), given.labels, given.uniforms).tokens
    assert_equal(compute(given, [term], rows), compute(given, [term], rows, uniforms=None, draws=draws))
    other = compute(given, [term], rows, uniforms=given.uniforms.flip(0))
    assert other.loss != compute(given, [term], rows).loss


# ---- vocabularies of unequal size


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(19, 23), (23, 19)])
@pytest.mark.parametrize("as_logits", [False, True])
@pytest.mark.parametrize("name", ["hpd", "reverse_kl", "sampled", "top_k bucket", "sum"])
def test_unequal_vocabularies_are_cut_to_the_shared_prefix(
    name: str, vocab: int, teacher_vocab: int, as_logits: bool, impl: str
) -> None:
    bias = {"bias": random(vocab, seed=7)}
    given = problem(vocab, teacher_vocab=teacher_vocab, student_head=bias)
    if as_logits:
        logits = [scores.hidden @ scores.head.weight.t() for scores in given[:2]]  # type: ignore[union-attr]
        given = given._replace(
            student=Scores(logits[0], Head(None, **bias)), teacher=Scores(logits[1], Head(None))
        )
    cut = given._replace(student=prefix(given.student, 19), teacher=prefix(given.teacher, 19))
    got, want = compute(given, TERMS[name], 5, impl=impl), compute(cut, TERMS[name], 5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    for mine, other, whole in zip(
        got.grads, want.grads, (given.student.hidden, *given.student.head[:2]), strict=True
    ):
        if mine is None or other is None or whole is None:
            continue
        assert mine.shape == whole.shape
        kept = tuple(slice(0, size) for size in other.shape)
        torch.testing.assert_close(mine[kept], other, rtol=1e-12, atol=1e-12)
        assert mine.count_nonzero() == mine[kept].count_nonzero()  # nothing flows to what was cut
    if teacher_vocab < vocab:
        assert "teacher_mass_outside" not in got.stats
        return
    teacher = given.teacher.hidden if as_logits else given.teacher.hidden @ given.teacher.head.weight.t()  # type: ignore[union-attr]
    outside = torch.softmax(teacher, -1)[:, 19:].sum()
    torch.testing.assert_close(got.stats["teacher_mass_outside"], outside, rtol=1e-12, atol=1e-12)


def prefix(scores: Scores, vocab: int) -> Scores:
    """The model as if it had been built with fewer tokens."""
    weight, bias = (None if x is None else x[:vocab].clone() for x in scores.head[:2])
    hidden = scores.hidden[:, :vocab].clone() if weight is None else scores.hidden
    return Scores(hidden, scores.head._replace(weight=weight, bias=bias))


# ---- cost


class Recorder(TorchDispatchMode):
    """Matrix products that ran, and the shapes of the tensors that were allocated (no views, nothing in
    place)."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.shapes: set[tuple[int, ...]] = set()

    @property
    def largest(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
        )
        given, new = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out)
        )
        old = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.shapes |= {
            tuple(tensor.shape) for tensor in new if tensor.untyped_storage().data_ptr() not in old
        }
        return out


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_no_tensor_is_ever_as_large_as_all_logits(terms: tuple[Term, ...]) -> None:
    num_tokens, vocab, rows = 64, 601, 4
    given = problem(vocab, num_tokens=num_tokens)
    with Recorder() as seen:
        compute(given, terms, rows)
    # Two chunks of logits (one column more where the label has one of its own), or the head's gradient.
    assert seen.largest <= max(2 * rows * (vocab + 1), vocab * HIDDEN)
    assert seen.largest * 8 <= num_tokens * vocab
    with Recorder() as seen:
        compute(given, terms, impl="reference")
    assert seen.largest >= num_tokens * vocab


def test_products_per_chunk_and_what_is_frozen() -> None:
    vocab, num_tokens, chunks = 50, 12, 3
    given = problem(vocab, num_tokens=num_tokens)
    whole = compute(given, TERMS["hpd"])
    cases = {(True, True): 4, (True, False): 3, (False, True): 3, (False, False): 2}
    for (train_hidden, train_head), products in cases.items():
        hidden = given.student.hidden.clone().requires_grad_(train_hidden)
        weight = given.student.head.weight.clone().requires_grad_(train_head)  # type: ignore[union-attr]
        with Recorder() as seen:
            loss = reweighted_nll(
                Scores(hidden, Head(weight)),
                given.teacher,
                given.labels,
                TERMS["hpd"],
                uniforms=given.uniforms,
                chunk_bytes=num_tokens // chunks * vocab * 8,
            ).loss
            assert seen.products == chunks * products
            assert ((vocab, HIDDEN) in seen.shapes) == train_head  # the head's gradient
            assert loss.requires_grad == (train_hidden or train_head)
            if loss.requires_grad:
                loss.backward()
            assert seen.products == chunks * products  # backward only scales
        torch.testing.assert_close(loss.detach(), whole.loss, rtol=1e-12, atol=1e-12)
        for tensor, trained, grad in (
            (hidden, train_hidden, whole.grads[0]),
            (weight, train_head, whole.grads[1]),
        ):
            assert (tensor.grad is not None) == trained
            if tensor.grad is not None:
                torch.testing.assert_close(tensor.grad, grad, rtol=1e-12, atol=1e-12)


def test_likelihood_of_the_label_multiplies_the_teachers_head_for_metrics_alone() -> None:
    vocab, num_tokens = 50, 12
    given = problem(vocab, num_tokens=num_tokens)
    for stride, products in ((0, 3), (5, 4)):
        with Recorder() as seen:
            got = compute(given, TERMS["sft"], metric_stride=stride)
        assert seen.products == products
        assert_equal(got, compute(given, TERMS["sft"], impl="reference", metric_stride=stride))
    # A longer teacher's mass on what the student does not have is measured at every position.
    longer = problem(vocab, teacher_vocab=60, num_tokens=num_tokens)
    assert "teacher_mass_outside" in compute(longer, TERMS["sft"], metric_stride=0).stats


def test_an_evaluation_computes_no_gradient() -> None:
    given = problem(50)
    hidden, weight = given.student.hidden.requires_grad_(), given.student.head.weight.requires_grad_()  # type: ignore[union-attr]
    with torch.no_grad(), Recorder() as seen:
        loss = reweighted_nll(
            Scores(hidden, Head(weight)), given.teacher, given.labels, TERMS["forward_kl"]
        ).loss
    assert seen.products == 2
    assert not loss.requires_grad


def test_the_teacher_is_never_differentiated() -> None:
    given = problem(20)
    hidden, weight = given.teacher.hidden.requires_grad_(), given.teacher.head.weight.requires_grad_()  # type: ignore[union-attr]
    for impl in ("chunked", "reference"):
        compute(given._replace(teacher=Scores(hidden, Head(weight))), TERMS["sum"], impl=impl)
        assert hidden.grad is None
        assert weight.grad is None


# ---- edges


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_no_positions_give_zero_and_gradients_of_zeros(terms: tuple[Term, ...], impl: str) -> None:
    given = problem(17, teacher_vocab=20, student_head={"bias": random(17, seed=7)})
    empty = given._replace(
        student=given.student._replace(hidden=given.student.hidden[:0]),
        teacher=given.teacher._replace(hidden=given.teacher.hidden[:0]),
        labels=given.labels[:0],
        uniforms=given.uniforms[:0],
    )
    got = compute(empty, terms, impl=impl)
    assert got.loss == 0.0
    for grad, shape in zip(got.grads, ((0, HIDDEN), (17, HIDDEN), (17,)), strict=True):
        assert grad is not None
        assert grad.shape == shape
        assert grad.count_nonzero() == 0
    assert all(value == 0.0 for value in got.stats.values())


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_scale_multiplies_loss_and_gradients(impl: str) -> None:
    given = problem(33)
    one = compute(given, TERMS["sum"], impl=impl)
    for scale in (0.125, torch.tensor(0.125), torch.tensor(0.125, dtype=torch.float64)):
        got = compute(given, TERMS["sum"], 5, impl=impl, scale=scale)
        assert got.loss.dtype == torch.float64
        torch.testing.assert_close(got.loss, one.loss * 0.125, rtol=1e-12, atol=1e-12)
        for mine, other in zip(got.grads[:2], one.grads[:2], strict=True):
            torch.testing.assert_close(mine, other * 0.125, rtol=1e-12, atol=1e-12)  # type: ignore[operator]
        assert_equal(got._replace(loss=one.loss, grads=one.grads), one)  # statistics are not scaled


def test_what_follows_the_loss_scales_the_gradient() -> None:
    given = problem(33)
    hidden = given.student.hidden.clone().requires_grad_()
    loss = reweighted_nll(
        given.student._replace(hidden=hidden), given.teacher, given.labels, TERMS["forward_kl"]
    ).loss
    (loss * 3.0 + 1.0).backward()
    want = compute(given, TERMS["forward_kl"]).grads[0]
    torch.testing.assert_close(hidden.grad, want * 3.0, rtol=1e-12, atol=1e-12)  # type: ignore[operator]


def test_a_second_backward_is_refused() -> None:
    given = problem(10)
    hidden = given.student.hidden.clone().requires_grad_()
    loss = reweighted_nll(
        given.student._replace(hidden=hidden), given.teacher, given.labels, TERMS["sft"]
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def is_finite(result: Result) -> bool:
    tensors = [result.loss, *(grad for grad in result.grads if grad is not None), *result.stats.values()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", ["student", "teacher", "both", "opposite"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_impossible_tokens_keep_everything_finite(
    terms: tuple[Term, ...], side: str, dtype: torch.dtype, impl: str
) -> None:
    vocab = 21
    masks = [torch.zeros(vocab, dtype=torch.float64) for _ in range(2)]
    masks[0][:8] = -math.inf
    masks[1][-8 if side == "opposite" else 0 :][:8] = -math.inf
    given = problem(
        vocab,
        student_head={"bias": masks[0]} if side != "teacher" else {},
        teacher_head={"bias": masks[1]} if side != "student" else {},
    ).to(dtype)
    assert set(given.labels.tolist()) & set(range(8))  # some labels are impossible themselves
    got = compute(given, terms, 5, impl=impl)
    assert is_finite(got)
    if side == "teacher" and dtype == torch.float64:
        assert_equal(got, compute(given, terms, impl="reference"), atol=1e-9)  # a gap counts 1e5 nats


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_huge_logits_keep_everything_finite(terms: tuple[Term, ...], dtype: torch.dtype, impl: str) -> None:
    signs = [torch.sign(random(NUM_TOKENS, 21, seed=seed)).to(dtype) * 1e4 for seed in (1, 2)]
    given = problem(21)._replace(student=Scores(signs[0], Head(None)), teacher=Scores(signs[1], Head(None)))
    got = compute(given, terms, 5, impl=impl)
    assert is_finite(got)
    if dtype == torch.float64:
        assert_equal(got, compute(given, terms, impl="reference"), atol=1e-9)


# ---- low precision


def naive_loss(name: str, student: Scores, teacher: Scores, labels: Tensor) -> Tensor:
    """What a training script writes, in the dtype of its inputs."""
    log_q = torch.log_softmax(student.hidden @ student.head.weight.t(), -1)  # type: ignore[union-attr]
    log_p = torch.log_softmax(teacher.hidden @ teacher.head.weight.t(), -1)  # type: ignore[union-attr]
    if name == "sft":
        return F.nll_loss(log_q, labels, reduction="sum")
    if name == "forward_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return F.kl_div(log_p, log_q, log_target=True, reduction="sum")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sft", "forward_kl", "reverse_kl"])
def test_low_precision_is_not_worse_than_naive(name: str, dtype: torch.dtype, device: str) -> None:
    given = problem(151).to(dtype).on(device)
    exact = given.to(torch.float32)

    def naive(case: Problem) -> list[Tensor]:
        hidden, weight = (x.clone().requires_grad_() for x in (case.student.hidden, case.student.head.weight))  # type: ignore[union-attr]
        loss = naive_loss(name, Scores(hidden, Head(weight)), case.teacher, case.labels)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    got = compute(given, TERMS[name], 5)
    assert got.loss.dtype == torch.float32
    mine = [got.loss, *got.grads[:2]]
    for truth, fused, plain in zip(naive(exact), mine, naive(given), strict=True):
        assert fused is not None
        rounding = torch.finfo(dtype).eps / 2 * truth.norm() if truth.dim() else 1e-5 * truth.abs()
        assert (truth - fused.float()).norm() <= (truth - plain.float()).norm() + 1e-6
        if device == "cpu":  # where operands are raised, so the result is rounded once, at its end
            assert (truth - fused.float()).norm() <= rounding


@pytest.mark.gpu
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_a_gpu_computes_what_a_cpu_does(terms: tuple[Term, ...]) -> None:
    given = problem(255)
    want = compute(given, terms, 5)
    got = compute(given.on("cuda"), terms, 5)
    grads = [None if x is None else x.cpu() for x in got.grads]
    stats = {name: value.cpu() for name, value in got.stats.items()}
    assert_equal(Result(got.loss.cpu(), grads, stats), want, rtol=1e-9, atol=1e-9)


def test_each_operand_may_have_its_own_precision() -> None:
    given = problem(40)
    rounded = given.to(torch.bfloat16)
    want = compute(rounded.to(torch.float32), TERMS["forward_kl"], 5)
    for student, teacher in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ):
        mixed = rounded._replace(
            student=cast(rounded.student, student), teacher=cast(rounded.teacher, teacher)
        )
        got = compute(mixed, TERMS["forward_kl"], 5)
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    double = compute(rounded._replace(student=cast(rounded.student, torch.float64)), TERMS["forward_kl"], 5)
    assert double.loss.dtype == torch.float64
    assert double.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


def test_autocast_on_a_cpu_rounds_the_gradient_products_and_nothing_else() -> None:
    given = problem(40).to(torch.float32)
    want = compute(given, TERMS["sum"], 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = compute(given, TERMS["sum"], 5)
    assert_equal(got._replace(grads=[]), want._replace(grads=[]), rtol=1e-6, atol=1e-6)
    for found, expected in zip(got.grads, want.grads, strict=True):
        if found is None or expected is None:
            assert found is expected
            continue
        # Two factors and the product, each rounded to eight bits.
        assert 0.0 <= (found - expected).norm() <= 3 * 2**-9 * expected.norm()


# ---- statistics


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("stride", [1, 3, 4, 100])
@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_metrics_are_of_every_nth_position(
    impl: str, stride: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 43
    given = problem(vocab)
    monkeypatch.setattr(measures, "_TILE_BYTES", 2 * vocab * 8)
    log_p, log_q = (x[::stride] for x in softmaxes(given))
    p, q = log_p.exp(), log_q.exp()
    expected = {
        "forward_kl": (p * (p / q).log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "teacher_entropy": torch.special.entr(p).sum(),
        "student_entropy": torch.special.entr(q).sum(),
        "acceptance": 1.0 * len(p) - 0.5 * (p - q).abs().sum(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().sum(),
        "mean_token_accuracy": (q.argmax(-1) == given.labels[::stride]).double().sum(),
        "metric_tokens": torch.tensor(float(len(p)), dtype=torch.float64),
        "tokens": torch.tensor(float(NUM_TOKENS), dtype=torch.float64),
    }
    stats = compute(given, TERMS["forward_kl"], rows, impl=impl, metric_stride=stride).stats
    assert len(p) == math.ceil(NUM_TOKENS / stride)
    for name, value in expected.items():
        assert stats[name].dtype == torch.float64
        torch.testing.assert_close(
            stats[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert stats.keys() == expected.keys() | {"value/forward_kl"}


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_without_metrics_the_loss_is_the_same(impl: str) -> None:
    given = problem(43)
    bare = compute(given, TERMS["forward_kl"], 5, impl=impl, metric_stride=0)
    assert bare.stats.keys() == {"tokens", "value/forward_kl"}
    whole = compute(given, TERMS["forward_kl"], 5, impl=impl)
    assert_equal(bare, whole, stats=False)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "rao_blackwell"])
def test_reverse_kl_is_estimated_at_the_draws_that_are_made_anyway(estimator: str, impl: str) -> None:
    given = problem(601)
    log_p, log_q = softmaxes(given)
    support = label() + sampled(3)
    draws = support.draw(log_q, log_q.exp(), given.labels, given.uniforms).tokens
    expected = kl_estimate(estimator, log_p, log_q, draws).sum()
    stats = compute(given, [Term("t", reverse_kl(), support)], 5, impl=impl, kl_estimator=estimator).stats
    torch.testing.assert_close(stats[f"reverse_kl_{estimator}"], expected, rtol=1e-12, atol=1e-12)
    # Where draws do not follow the student, there is nothing to estimate with.
    stats = compute(given, TERMS["every switch of the draw"], 5, impl=impl, kl_estimator=estimator).stats
    assert f"reverse_kl_{estimator}" not in stats


# ---- what is refused


def call(given: Problem, terms: Sequence[Term], **options: Any) -> None:
    reweighted_nll(given.student, given.teacher, given.labels, terms, **options)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda g: call(g, TERMS["sft"], impl="fast"), "impl must be one of reference, chunked"),
        (lambda g: call(g, ()), "At least one term"),
        (lambda g: call(g, TERMS["sft"] + name_terms(method_terms("sft", {}))), "give each its own"),
        (lambda g: call(g, TERMS["hpd"]), "needs 1 uniform numbers"),
        (
            lambda g: call(g, TERMS["every switch of the draw"], uniforms=g.uniforms[:, :2]),
            "needs 3 uniform numbers",
        ),
        (lambda g: call(g._replace(labels=g.labels + 20), TERMS["sft"]), "outside the 20 tokens"),
        (lambda g: call(g._replace(student=prefix(g.student, 10)), TERMS["sft"]), "outside the 10 tokens"),
    ],
)
def test_calls_that_cannot_work_are_refused(build: Callable[[Problem], None], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(problem(20))


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        (Term("t", forward_kl(), full(), temperature=0.0), "temperature must be > 0, got 0.0"),
        (Term("t", nll(), full()), "reads the label as its first column"),
        (Term("t", hpd(), sampled(1)), "reads the label as its first column"),
        (Term("t", hpd(), label() + full()), "reads the label as its first column"),
        (Term("t", hpd(), label() + top_k(2)), "reads the label as its first column"),
        (Term("t", hpd_expected(), full()), "label\\+full"),
        (Term("t", hpd_expected(), label() + sampled(1)), "label\\+full"),
        (Term("t", taid(0.5), label() + sampled(1)), "needs a whole distribution"),
        (Term("t", taid(0.5), top_k(2, tail="drop")), "needs a whole distribution"),
        (Term("t", reverse_kl(), label()), "is not a divergence"),
        (Term("t", reverse_kl(), top_k(2, tail="drop")), "is not a divergence"),
    ],
)
def test_objectives_on_supports_where_they_do_not_exist_are_refused(term: Term, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        term.check()


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_every_term_of_these_tests_is_legal(terms: tuple[Term, ...]) -> None:
    for term in terms:
        assert term.check() is term


def test_shapes_are_checked_in_tests() -> None:
    given = problem(20)
    with pytest.raises(jaxtyping.TypeCheckError, match="labels"):
        call(given._replace(labels=given.labels[:, None]), TERMS["sft"])
