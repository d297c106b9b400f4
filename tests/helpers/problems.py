"""Problems for the operator: hidden states, heads, labels and draws, and how two answers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpd.losses import Head, Scores, reweighted_nll
from hpd.methods import METHODS, method_terms, name_terms
from hpd.methods.supports import Support, full, label, sampled, top_k
from hpd.methods.terms import Term
from hpd.objectives import forward_kl, generalized_jsd, hpd, nll, reverse_kl

NUM_TOKENS, HIDDEN = 13, 6


TERMS: dict[str, tuple[Term, ...]] = {
    # Those on pairs of two vocabularies are in tests/losses/test_byte_pairs.py.
    **{name: name_terms(method_terms(name, {})) for name in METHODS if name not in ("gold", "uld")},
    "softened": (Term("forward_kl", forward_kl(), full(), temperature=2.5),),
    "softened draws": (Term("reverse_kl", reverse_kl(), label() + sampled(2), temperature=0.6),),
    "softened top_k": (Term("reverse_kl", reverse_kl(), top_k(3), temperature=1.5),),
    "sampled": (Term("reverse_kl", reverse_kl(), sampled(3)),),
    "teacher's draws": (Term("forward_kl", forward_kl(), sampled(2, of="teacher", temperature=1.4)),),
    "every switch of the draw": (
        Term(
            "jsd",
            generalized_jsd(0.3),
            Support(label=True, draws=2, share=0.6, exclude_label=True, temperature=1.3),
        ),
    ),
    "top_k bucket": (Term("forward_kl", forward_kl(), top_k(4)),),
    "top_k renormalize": (Term("reverse_kl", reverse_kl(), top_k(4, tail="renormalize")),),
    "top_k drop": (Term("forward_kl", forward_kl(), top_k(4, tail="drop")),),
    "student's top_k and label": (Term("reverse_kl", reverse_kl(), label() + top_k(2, of="student")),),
    "top_k and label, renormalize": (
        Term("reverse_kl", reverse_kl(), label() + top_k(2, tail="renormalize")),
    ),
    "top_k beyond the vocabulary": (Term("reverse_kl", reverse_kl(), label() + top_k(9999)),),
    "sum": (
        Term("sft", nll(), label(), weight=0.3),
        Term("kl", forward_kl(), full(), weight=2.0, temperature=2.0),
        Term("rkl", reverse_kl(), full(), weight=0.7),
        Term("hpd", hpd(), label() + sampled(1, importance=False), weight=1.5),
        Term("top", reverse_kl(), top_k(3), weight=0.2),
    ),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


class Problem(NamedTuple):
    student: Scores
    teacher: Scores
    labels: Tensor
    uniforms: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return self._replace(student=cast(self.student, dtype), teacher=cast(self.teacher, dtype))

    def on(self, device: str) -> Problem:
        return Problem(
            cast(self.student, device),
            cast(self.teacher, device),
            self.labels.to(device),
            self.uniforms.to(device),
        )


def cast(scores: Scores, dtype: torch.dtype | str) -> Scores:
    """Scores in another dtype, or on another device."""
    weight, bias = (None if x is None else x.to(dtype) for x in scores.head[:2])
    return Scores(scores.hidden.to(dtype), scores.head._replace(weight=weight, bias=bias))


def problem(
    vocab: int,
    *,
    teacher_vocab: int | None = None,
    num_tokens: int = NUM_TOKENS,
    sharpness: float = 1.0,
    student_head: dict[str, Any] | None = None,
    teacher_head: dict[str, Any] | None = None,
) -> Problem:
    """Both models with hidden states, the teacher's of another size; `*_head` are the extras of `Head`."""
    teacher_vocab = teacher_vocab or vocab
    student = Scores(
        random(num_tokens, HIDDEN, seed=1) * sharpness,
        Head(random(vocab, HIDDEN, seed=2), **(student_head or {})),
    )
    teacher = Scores(
        random(num_tokens, HIDDEN + 2, seed=3) * sharpness,
        Head(random(teacher_vocab, HIDDEN + 2, seed=4), **(teacher_head or {})),
    )
    labels = torch.randint(0, min(vocab, teacher_vocab), (num_tokens,), generator=generator(5))
    uniforms = torch.rand(num_tokens, 4, generator=generator(6), dtype=torch.float64)
    return Problem(student, teacher, labels, uniforms)


class Result(NamedTuple):
    loss: Tensor
    grads: list[Tensor | None]
    """Of hidden states, weight and bias."""
    stats: dict[str, Tensor]


def compute(given: Problem, terms: Sequence[Term], rows: int | None = None, **options: Any) -> Result:
    """Loss, gradients and statistics of fresh leaves; `rows` is the size of a chunk."""
    hidden, weight, bias = (
        None if x is None else x.detach().clone().requires_grad_()
        for x in (given.student.hidden, *given.student.head[:2])
    )
    assert hidden is not None
    student = Scores(hidden, given.student.head._replace(weight=weight, bias=bias))
    if rows is not None:
        vocab = min(student.vocab, given.teacher.vocab)
        options["chunk_bytes"] = rows * vocab * torch.promote_types(hidden.dtype, torch.float32).itemsize
    ruled = {term.name: random(len(hidden), seed=9).abs() for term in terms if term.positions is not None}
    options = {"uniforms": given.uniforms, "position_weights": ruled, **options}
    loss, stats = reweighted_nll(student, given.teacher, given.labels, terms, **options)
    loss.backward()
    return Result(loss.detach(), [None if x is None else x.grad for x in (hidden, weight, bias)], stats)


def assert_equal(
    got: Result, want: Result, *, rtol: float = 1e-12, atol: float = 1e-12, stats: bool = True
) -> None:
    torch.testing.assert_close(got.loss, want.loss, rtol=rtol, atol=atol)
    for mine, other in zip(got.grads, want.grads, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)
    if stats:
        assert got.stats.keys() == want.stats.keys()
        for name, value in got.stats.items():
            torch.testing.assert_close(
                value, want.stats[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )
