"""`reweighted_nll`, the front door of the operator, and `loss_by_source`, for terms of one writer's text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.losses.by_source import parts_of, weights_of
from hpd.losses.chunked import OperatorCall, ReweightedNLL, compiled_reweighted_nll
from hpd.losses.heads import Head, Scores, TeacherScores, TopKScores
from hpd.losses.products import for_products, leaves
from hpd.losses.reference import reference_reweighted_nll
from hpd.losses.teacher_side import label_alone
from hpd.losses.tile import Sums, TileInputs
from hpd.methods.drawn import label_is_read
from hpd.methods.terms import Term, num_uniforms

__all__ = [
    "IMPLEMENTATIONS",
    "METRIC_STRIDE",
    "LossOutput",
    "default_chunk_bytes",
    "loss_by_source",
    "reweighted_nll",
]

METRIC_STRIDE = 16
"""In training, metrics of the full distributions are taken at every 16th position where nothing else is
asked for."""

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference_reweighted_nll,
    "chunked": ReweightedNLL.apply,
    "compiled": compiled_reweighted_nll,
}

# Bytes of logits in one chunk, by device. A CPU's products run at full speed from here on; an accelerator
# also adds to the head's gradient once a chunk, so that fewer chunks save traffic of the size of the head.
_CPU_CHUNK_BYTES = 128 * 2**20
_ACCELERATOR_CHUNK_BYTES = 512 * 2**20


def default_chunk_bytes(device: torch.device | str) -> int:
    """Bytes of one chunk of logits (two are kept) where none are asked for."""
    return _CPU_CHUNK_BYTES if torch.device(device).type == "cpu" else _ACCELERATOR_CHUNK_BYTES


class LossOutput(NamedTuple):
    """A loss and what was seen on the way."""

    loss: Float[Tensor, ""]
    stats: dict[str, Float[Tensor, ""]]
    """On the device. Of `reweighted_nll`: sums over positions; divide by `tokens` (or `metric_tokens`) after
    reading them once. Of the functional API: means per token, and these two counts."""


def reweighted_nll(
    student: Scores,
    teacher: TeacherScores,
    labels: Int[Tensor, "N"],
    terms: Sequence[Term],
    *,
    uniforms: Float[Tensor, "N u"] | None = None,
    draws: Int[Tensor, "N n"] | None = None,
    position_weights: Mapping[str, Float[Tensor, "N"]] | None = None,
    scale: Tensor | float = 1.0,
    impl: str = "chunked",
    chunk_bytes: int | None = None,
    metric_stride: int = 1,
    kl_estimator: str = "exact",
    gradient_filter: float = 0.0,
) -> LossOutput:
    r"""The loss of every method: token-level reweighted log-likelihood, and its gradient, without `[N, V]`.

    .. math:: L = s \sum_n \sum_{\text{terms}} \lambda \sum_{v \in S} c_v d_v, \quad \nabla L
              = -s \sum_n \sum_{\text{terms}} \lambda \sum_{v \in S} c_v\, \mathrm{sg}[w_v] \nabla \log q_v

    with s `scale`, λ the term's weight, times the position's where `position_weights` has one, S its support,
    c the support's coefficients, d the objective's value and w its weights: `-w * log q` summed over
    `log_softmax(hidden @ weight.T)` (`impl="reference"`).

    Args:
        student: hidden states and head; gradients flow to both.
        teacher: the same, or its k likeliest tokens; never differentiated. With `log_z`, terms that read few
            tokens cost no product with its head.
        labels: the token that the dataset holds at each position, each below both vocabularies.
        terms: what is learned, checked (`Term.check`).
        uniforms: numbers in [0, 1) for sampled supports, `support.num_uniforms` a position.
        draws: drawn tokens, instead of uniforms (tokens that something else sampled).
        position_weights: by the name of a term, constants that multiply its weights and values
            (`hpd.losses.position_weights`); of every term with a rule over positions.
        scale: multiplies the loss; 1 / (label tokens of the global batch) for a token mean.
        impl: `chunked`; `compiled`, the same through torch.compile; or `reference`.
        chunk_bytes: memory of one chunk of logits, two of which are kept; None: `default_chunk_bytes`.
        metric_stride: full-distribution metrics on every n-th position; 0 for none.
        kl_estimator: one of ESTIMATORS, added to the statistics where it needs draws (not exact).
        gradient_filter: columns of a chunk's gradient with no entry above this share of a position's mean
            absolute sum come back at rank one (`hpd.losses.filtered`); 0: all columns are multiplied.

    Raises:
        ValueError: terms on the label and on the vocabulary, of a teacher known by draws; a label beyond the
            shorter vocabulary (looked for on CPU tensors only); unknown impl; a gradient_filter below 0, or
            with nothing to filter; no terms, or two of one name; a sampled support without uniforms or draws;
            weights by position that a term lacks, or of another shape, or of no term.
    """
    vocab = min(student.vocab, teacher.vocab)
    _check(labels, terms, uniforms, draws, impl, vocab)
    _check_filter(gradient_filter, impl, student.head)
    teacher, ready, known = _teacher_for(teacher, terms, labels, vocab)
    weights = _checked_weights(position_weights or {}, terms, len(labels))
    terms = [term._replace(positions=None) for term in terms] if weights else terms
    inputs = TileInputs(labels, uniforms, draws, kl_estimator, known, weights)
    chunk_bytes = chunk_bytes or default_chunk_bytes(labels.device)
    how = chunk_bytes, metric_stride, vocab, gradient_filter
    call, sums = OperatorCall(teacher, ready, inputs, terms, scale, *how), Sums()
    return LossOutput(IMPLEMENTATIONS[impl](*leaves(student), student.head, call, sums), sums)


def _teacher_for(
    teacher: TeacherScores, terms: Sequence[Term], labels: Tensor, vocab: int
) -> tuple[TeacherScores, TeacherScores, Tensor | None]:
    """The teacher, the same ready for products, and the tokens that it knows; None: all."""
    if isinstance(teacher, TopKScores):
        if teacher.drawn and label_is_read(terms):
            teacher = label_alone(teacher, labels)  # what the draws estimate is not read
        return teacher, teacher, teacher.tokens
    teacher = teacher._replace(hidden=teacher.hidden.detach())
    return teacher, for_products(teacher, vocab), None


def loss_by_source(
    student: Scores,
    teacher: TeacherScores,
    batch: TokenBatch,
    terms: Sequence[Term],
    *,
    uniforms: Float[Tensor, "N u"] | None = None,
    position_weights: Mapping[str, Float[Tensor, "N"]] | None = None,
    scale: Tensor | float = 1.0,
    impl: str = "chunked",
    chunk_bytes: int | None = None,
    metric_stride: int = 1,
    kl_estimator: str = "exact",
    gradient_filter: float = 0.0,
) -> LossOutput:
    """`reweighted_nll`, each term on the positions that it learns from.

    Args:
        student, teacher: at all N positions.
        batch: says who wrote what.
        terms: what is learned.
        uniforms, position_weights, scale, impl, chunk_bytes, metric_stride, kl_estimator, gradient_filter: as
            for `reweighted_nll`.
    """
    total = student.hidden.new_zeros(())
    stats: Sums = {}
    for part in parts_of(batch, terms):
        at = slice(None) if part.positions is None else part.positions
        labels = batch.labels[at]
        loss, sums = reweighted_nll(
            student.at(part.positions),
            teacher.at(part.positions),
            labels,
            part.terms,
            uniforms=None if uniforms is None else uniforms[at],
            draws=labels[:, None] if part.given else None,
            position_weights=weights_of(part, position_weights),
            scale=scale,
            impl=impl,
            chunk_bytes=chunk_bytes,
            metric_stride=metric_stride if part.first else 0,
            kl_estimator=kl_estimator,
            gradient_filter=gradient_filter,
        )
        if not part.first:
            sums = {name: value for name, value in sums.items() if name.startswith("value/")}
        total = total + loss
        for name, value in sums.items():
            stats[name] = stats[name] + value if name in stats else value
    return LossOutput(total, stats)


def _checked_weights(
    given: Mapping[str, Tensor], terms: Sequence[Term], count: int
) -> dict[str, Float[Tensor, "N"]] | None:
    """The weights by position, without gradient; None where no term has any."""
    names = [term.name for term in terms]
    for term in terms:
        if term.positions is not None and term.name not in given:
            raise ValueError(
                f"Term {term.name!r} is weighed {term.positions}, which takes whole rows: a trainer reads "
                "them; here give position_weights, one number for each label."
            )
    for name, weights in given.items():
        if name not in names or weights.shape != (count,):
            raise ValueError(
                f"position_weights has {name!r} of shape {tuple(weights.shape)}: give each of some of the "
                f"terms ({', '.join(names)}) one number for each of the {count} labels."
            )
    return {name: weights.detach() for name, weights in given.items()} or None


def _check(
    labels: Tensor,
    terms: Sequence[Term],
    uniforms: Tensor | None,
    draws: Tensor | None,
    impl: str,
    vocab: int,
) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    if not terms:
        raise ValueError("At least one term is needed.")
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"Terms are told apart by name, got {', '.join(names)}: give each its own.")
    needed = num_uniforms(terms)
    if needed and draws is None and (uniforms is None or uniforms.shape[1] < needed):
        raise ValueError(
            f"The support needs {needed} uniform numbers per position (or the draws themselves)."
        )
    if labels.device.type == "cpu" and len(labels) and int(labels.max()) >= vocab:
        raise ValueError(
            f"Label {int(labels.max())} is outside the {vocab} tokens that both models have. Set such labels "
            "to -100 (vocabulary: shared_prefix does)."
        )


def _check_filter(gradient_filter: float, impl: str, head: Head) -> None:
    if not 0.0 <= gradient_filter < 1.0:
        raise ValueError(f"gradient_filter is a share, in [0, 1), got {gradient_filter}.")
    if gradient_filter and impl == "reference":
        raise ValueError(
            "gradient_filter has no effect on impl: reference, which multiplies whole logits: take chunked."
        )
    if gradient_filter and head.weight is None:
        raise ValueError(
            "gradient_filter has no effect on logits, which no head multiplies: give hidden states and a "
            "head."
        )
