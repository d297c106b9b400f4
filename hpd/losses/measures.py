"""What is measured of both distributions beside the loss, and evaluations, where nothing else is asked for.

Axes: C positions of a chunk, R positions of a tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.losses.products import chunks
from hpd.losses.softmax import compiled
from hpd.losses.tile import (
    Sums,
    TileInputs,
    add,
    is_on_whole_vocabulary,
    merge,
    softened,
    weigh,
    weigh_whole,
)
from hpd.methods.sampling import block_tokens
from hpd.methods.supports import LOGPROB_FLOOR, raise_excluded_
from hpd.methods.terms import Term
from hpd.objectives.fused import Whole

__all__ = ["chunk_metrics", "distribution_metrics", "tile_values_", "tiles"]

# Scratch per tile on a CPU: small beside a chunk, and large enough to amortize the start of a parallel region
# (measured: a pass over 2 rows of 49,152 costs three times as much per element as one over 32 rows).
_TILE_BYTES = 8 * 2**20


def tiles(logits: Float[Tensor, "C V"], whole: bool = False) -> Iterator[slice]:
    """Tile by tile; on devices without a CPU's caches, or where it is to be `whole`, the chunk is one."""
    size, vocab = logits.shape
    row_bytes = vocab * logits.element_size()
    whole = whole or logits.device.type != "cpu"
    return chunks(size, row_bytes, size * row_bytes if whole else _TILE_BYTES)


def chunk_metrics(
    teacher_logits: Tensor, logits: Tensor, labels: Tensor, sums: Sums, is_compiled: bool
) -> None:
    """Metrics of the full distributions at the chosen positions of a chunk.

    They are taken together: spread over the chunk's tiles they would be slivers, and starting a parallel
    region for each costs more than the arithmetic.
    """
    if is_compiled:
        merge(sums, compiled(_metric_sums)(teacher_logits, logits, labels))
        return
    for rows in tiles(logits):
        merge(sums, _metric_sums(teacher_logits[rows], logits[rows], labels[rows]))


def _metric_sums(teacher_logits: Tensor, logits: Tensor, labels: Tensor) -> Sums:
    sums: Sums = {}
    log_p, log_q = (torch.log_softmax(side, -1) for side in (teacher_logits, logits))
    distribution_metrics(log_p, log_q, labels, sums)
    return sums


def tile_values_(
    student_logits: Float[Tensor, "R V"],
    teacher_logits: Float[Tensor, "R V"],
    inputs: TileInputs,
    terms: Sequence[Term],
    sums: Sums,
) -> None:
    """Add what `tile_gradient_` adds to `sums`, and the metrics of every position: an evaluation, whose
    softmaxes serve both.

    Both logits are used up; the other arguments are as there.
    """
    log_q = torch.log_softmax(student_logits, -1, out=student_logits)
    log_p = torch.log_softmax(teacher_logits, -1, out=teacher_logits)
    if any(term.support.whole for term in terms):
        log_q.clamp_(min=LOGPROB_FLOOR)
        raise_excluded_(log_p)
    q = torch.exp(log_q)
    if len(terms) == 1 and is_on_whole_vocabulary(terms[0]):
        # First the metrics: the other form uses the logarithms up.
        distribution_metrics(log_p, log_q, inputs.labels, sums, q)
        weigh_whole(terms[0], Whole(log_p, log_q, q, inputs.labels), inputs.weight_of(terms[0]), sums)
        return
    for term in terms:
        if term.temperature == 1.0:
            weigh(term, log_p, log_q, q, inputs, sums)
        else:
            weigh(term, *softened(term, log_p, log_q), inputs, sums)
    # Last: it raises what a teacher excludes, which a temperature must see.
    distribution_metrics(log_p, log_q, inputs.labels, sums, q)


def distribution_metrics(
    log_p: Tensor, log_q: Tensor, labels: Tensor, sums: Sums, q: Tensor | None = None
) -> None:
    """Both KLs, both entropies (nats), acceptance, top-1 agreement and the student's accuracy, summed over
    the rows.

    Of both log-probabilities nothing changes but what lies below the floors.

    Args:
        log_p, log_q, labels: of the rows.
        sums: gains the sums.
        q: the student's probabilities, where they are known already; left as they are.
    """
    if not len(log_p):
        return
    raise_excluded_(log_p)
    log_q.clamp_(min=LOGPROB_FLOOR)
    # The student agrees where its likeliest token is the teacher's.
    chosen = log_q.gather(1, _likeliest(log_p))[:, 0]
    likeliest = log_q.amax(-1)
    agreement = (chosen == likeliest).to(log_p.dtype)
    accuracy = (log_q.gather(1, labels[:, None])[:, 0] == likeliest).to(log_p.dtype)
    p, q = log_p.exp(), log_q.exp() if q is None else q
    product = torch.empty_like(p)

    def expected(probs: Tensor, logs: Tensor) -> Tensor:
        return torch.mul(probs, logs, out=product).sum(-1)

    teacher_entropy, student_entropy = -expected(p, log_p), -expected(q, log_q)
    acceptance = torch.minimum(p, q, out=product).sum(-1)
    # From here on the scratch holds log p - log q, and p the products with it.
    gap = torch.sub(log_p, log_q, out=product)
    forward_kl = p.mul_(gap).sum(-1)
    add(
        sums,
        forward_kl=forward_kl,
        reverse_kl=-torch.mul(q, gap, out=p).sum(-1),
        teacher_entropy=teacher_entropy,
        student_entropy=student_entropy,
        acceptance=acceptance,
        top1_agreement=agreement,
        mean_token_accuracy=accuracy,
        metric_tokens=torch.ones_like(agreement),
    )


def _likeliest(logprobs: Float[Tensor, "R V"]) -> Int[Tensor, "R 1"]:
    """The likeliest token of each row, of equal ones the first. By blocks: on a CPU a search for an index
    takes twenty times as long as one for a maximum."""
    vocab = logprobs.shape[1]
    size = block_tokens(vocab)
    whole = vocab - vocab % size
    tops = logprobs[:, :whole].unflatten(1, (-1, size)).amax(-1)
    if whole < vocab:
        tops = torch.cat([tops, logprobs[:, whole:].amax(-1, keepdim=True)], 1)
    block = tops.argmax(-1, keepdim=True)
    tokens = (block * size + torch.arange(size, device=logprobs.device)).clamp_max(vocab - 1)
    return tokens.gather(1, logprobs.gather(1, tokens).argmax(-1, keepdim=True))
