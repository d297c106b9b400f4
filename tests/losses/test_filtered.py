"""The gradient filter against the exact gradient: live columns, what comes back at rank one, the bound."""

from __future__ import annotations

import pytest
import torch

from hpd.batch import uniforms
from hpd.losses import Head, Scores, reweighted_nll
from hpd.methods import method_terms, name_terms

N, D, V = 48, 12, 400
METHODS = ("hpd", "sft", "forward_kl", "reverse_kl", "js", "akl")


def _scores(seed: int, dtype: torch.dtype = torch.float64, bias: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    # A few likely tokens and a long tail, as language has it.
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    weight *= torch.linspace(2.0, 0.2, V, dtype=dtype)[:, None]
    hidden = torch.randn(N, D, generator=generator, dtype=dtype)
    extra = torch.randn(V, generator=generator, dtype=dtype).requires_grad_() if bias else None
    return Scores(hidden.requires_grad_(), Head(weight.requires_grad_(), extra))


def _gradients(method: str, eps: float, bias: bool = False, impl: str = "chunked", rows: int = 16, **others):
    student, teacher = _scores(0, bias=bias), _scores(1)
    leaves = [x for x in (student.hidden, student.head.weight, student.head.bias) if x is not None]
    output = reweighted_nll(
        student,
        Scores(teacher.hidden.detach(), Head(teacher.head.weight.detach())),
        torch.arange(N) * 7 % V,
        name_terms(method_terms(method, {})),
        uniforms=uniforms(torch.arange(N), seed=0, step=0, count=1),
        chunk_bytes=rows * V * 8,
        gradient_filter=eps,
        impl=impl,
        **{"scale": 1 / N, **others},
    )
    output.loss.backward()
    return output, [leaf.grad for leaf in leaves]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", METHODS)
def test_a_filter_that_nothing_falls_below_changes_nothing_but_rounding(method):
    exact, filtered = _gradients(method, 0.0), _gradients(method, 1e-300)
    for found, expected in zip(filtered[1], exact[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(filtered[0].loss, exact[0].loss, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_the_formula_column_by_column(method, bias):
    """Against live columns, parts and rank-one terms written out over the whole matrix of each chunk."""
    eps, rows = 2e-3, 16
    (_, exact), (output, found) = _gradients(method, 0.0, bias), _gradients(method, eps, bias)
    student, teacher = _scores(0, bias=bias), _scores(1)
    logits = (student.hidden @ student.head.weight.T + (student.head.bias if bias else 0.0)).detach()
    logits.requires_grad_()
    reweighted_nll(
        Scores(logits, Head(None)),
        Scores((teacher.hidden @ teacher.head.weight.T).detach(), Head(None)),
        torch.arange(N) * 7 % V,
        name_terms(method_terms(method, {})),
        uniforms=uniforms(torch.arange(N), seed=0, step=0, count=1),
        scale=1 / N,
    ).loss.backward()
    grad, hidden, weight = logits.grad, student.hidden.detach(), student.head.weight.detach()
    approximate, live_share, bound = torch.zeros_like(grad), 0.0, torch.zeros(N, dtype=grad.dtype)
    for start in range(0, N, rows):
        part = grad[start : start + rows]
        live = part.abs().amax(0) > eps * part.abs().sum() / len(part)
        live_share += float(live.double().mean()) * rows / N
        approximate[start : start + rows][:, live] = part[:, live]
        rest = part * ~live
        for side in (rest.clamp(min=0), rest.clamp(max=0)):
            if side.any():
                approximate[start : start + rows] += side.sum(1, True) * side.sum(0, True) / side.sum()
            bound[start : start + rows] += 2 * side.sum(1).abs()
    assert 0.01 < live_share < 0.75, "the case shows nothing"
    torch.testing.assert_close(found[0], approximate @ weight, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found[1], approximate.T @ hidden, rtol=1e-9, atol=1e-13)
    if bias:
        torch.testing.assert_close(found[2], exact[2], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(float(output.stats["gradient_live"]) / N, live_share)
    # The bound of the docstring, about the mean row of the head.
    farthest = (weight - weight.mean(0)).norm(dim=1).max()
    assert ((found[0] - exact[0]).norm(dim=1) <= bound * farthest + 1e-15).all()
    # Rank one is worth its two products: without it the error is larger.
    without = torch.where(approximate.abs() >= 0, grad * 0, grad)
    for start in range(0, N, rows):
        part = grad[start : start + rows]
        without[start : start + rows] = part * (part.abs().amax(0) > eps * part.abs().sum() / len(part))
    assert _error(found[0], exact[0]) < _error(without @ weight, exact[0])


def test_the_error_falls_with_the_threshold():
    _, exact = _gradients("forward_kl", 0.0)
    errors = [_error(_gradients("forward_kl", eps)[1][0], exact[0]) for eps in (1e-2, 1e-3, 1e-4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_the_columns_do_not_depend_on_the_scale_of_the_loss():
    """A thousand times the loss: the same columns are live, and the gradient is a thousand times as large."""
    (one, expected), (other, found) = (_gradients("hpd", 2e-3, scale=scale) for scale in (1 / N, 1000 / N))
    assert float(one.stats["gradient_live"]) == float(other.stats["gradient_live"])
    torch.testing.assert_close(found[0], 1000 * expected[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_alone(frozen):
    student, teacher = _scores(0), _scores(1)
    leaf = student.hidden if frozen == "hidden" else student.head.weight
    leaf.requires_grad_(False)
    reweighted_nll(
        student,
        Scores(teacher.hidden.detach(), Head(teacher.head.weight.detach())),
        torch.arange(N) * 7 % V,
        name_terms(method_terms("hpd", {})),
        uniforms=uniforms(torch.arange(N), seed=0, step=0, count=1),
        scale=1 / N,
        chunk_bytes=16 * V * 8,
        gradient_filter=2e-3,
    ).loss.backward()
    _, both = _gradients("hpd", 2e-3)
    found, expected = (
        (student.head.weight.grad, both[1]) if frozen == "hidden" else (student.hidden.grad, both[0])
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert leaf.grad is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gradient_filter": -1.0}, "a share"),
        ({"gradient_filter": float("nan")}, "a share"),
        ({"gradient_filter": 1.0}, "a share"),
        ({"gradient_filter": 1e-5, "impl": "reference"}, "no effect on impl: reference"),
    ],
    ids=["below zero", "not a number", "all of it", "reference"],
)
def test_refused(given, said):
    student, teacher = _scores(0), _scores(1)
    with pytest.raises(ValueError, match=said):
        reweighted_nll(student, teacher, torch.arange(N), name_terms(method_terms("sft", {})), **given)


def test_logits_are_refused():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="no effect on logits"):
        reweighted_nll(
            Scores(logits, Head(None)),
            Scores(logits, Head(None)),
            torch.arange(2),
            name_terms(method_terms("sft", {})),
            gradient_filter=1e-5,
        )


def test_a_gradient_of_zeros_is_zeros():
    """Student and teacher are equal, so forward KL has no gradient, and no share of it is a number."""
    scores = _scores(0)
    output = reweighted_nll(
        scores,
        Scores(scores.hidden.detach().clone(), Head(scores.head.weight.detach().clone())),
        torch.arange(N) * 7 % V,
        name_terms(method_terms("forward_kl", {})),
        scale=0.0,
        chunk_bytes=16 * V * 8,
        gradient_filter=1e-3,
    )
    output.loss.backward()
    assert torch.count_nonzero(scores.hidden.grad) == 0
    assert float(output.stats["gradient_returned"]) == 0.0
