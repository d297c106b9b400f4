"""The fused operator: head products, weights and gradients chunk by chunk, in the forward pass.

Axes: N label positions, C positions of a chunk, D hidden, V vocabulary.

Cost: the student's head is multiplied three times (logits, gradient of the hidden states, gradient of the
    head; two times if
the head is frozen) and the teacher's once: the floor for any method that reads both distributions. Memory:
two chunks of logits, one tile of scratch and the head's gradient; never `[N, V]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.heads import Head, Scores, TeacherScores, TopKScores
from hpd.losses.products import Gradients, accumulate, for_products, project_, wide
from hpd.losses.teacher_side import (
    is_known_by_token,
    log_normaliser,
    mass_outside,
    tail_mass,
    teacher_logits_,
    token_logprobs,
)
from hpd.losses.tile import (
    Sums,
    TileInputs,
    add,
    distribution_metrics,
    read_few_tokens,
    tile_gradient_,
    token_gradient_,
)
from hpd.methods.terms import Term

__all__ = ["Plan", "chunk_rows", "chunked_reweighted_nll", "compiled_reweighted_nll"]


# Scratch per tile on a CPU: small beside a chunk, and large enough to amortise the start of a parallel region
# (measured: a pass over 2 rows of 49,152 costs three times as much per element as one over 32 rows).
_TILE_BYTES = 8 * 2**20


class Plan(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    teacher: TeacherScores
    inputs: TileInputs
    terms: Sequence[Term]
    scale: Tensor | float
    chunk_bytes: int
    metric_stride: int
    vocab: int
    tile_gradient: Callable[..., Tensor] = tile_gradient_
    """What lies between the products, where both distributions are at hand."""


def chunked_reweighted_nll(student: Scores, plan: Plan) -> tuple[Float[Tensor, ""], Sums]:
    """Loss and statistics; see `hpd.losses.reweighted_nll`, whose checks have run."""
    sums: Sums = {}
    tensors = student.hidden, student.head.weight, student.head.bias
    if not torch.is_grad_enabled():
        # Inside a Function the grad mode is off and inputs still ask for gradients: an evaluation would
        # compute them.
        tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    loss = _ReweightedNLL.apply(*tensors, student.head, plan, sums)
    return loss, sums  # type: ignore[return-value]


class _ReweightedNLL(torch.autograd.Function):
    """Gradients are computed in forward, where the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head,
        plan: Plan,
        sums: Sums,
    ):
        gradients = _empty_gradients((hidden, weight, bias), ctx.needs_input_grad, plan.vocab)
        _walk(Scores(hidden, head._replace(weight=weight, bias=bias)), plan, gradients, sums)
        ctx.gradients = [
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        total = (
            sum(term.weight * sums[f"value/{term.name}"] for term in plan.terms)
            if len(hidden)
            else hidden.new_zeros(())
        )
        return (total * plan.scale).to(torch.promote_types(hidden.dtype, torch.float32))  # type: ignore[union-attr]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "reweighted_nll keeps its gradients for one backward pass; compute the loss again instead."
            )
        # A CPU can look for free whether there is anything to scale; elsewhere looking would synchronise the
        # device.
        if grad_output.device.type != "cpu" or grad_output != 1.0:
            # In place: a second [V, D] buffer would double the operator's memory.
            gradients = [None if g is None else g.mul_(grad_output.to(g.dtype)) for g in gradients]
        return *gradients, None, None, None


def _empty_gradients(tensors: Sequence[Tensor | None], needed: Sequence[bool], vocab: int) -> Gradients:
    """Buffers that the walk overwrites; zeros where it only adds, or does not reach (no rows, tokens beyond
    `vocab`)."""
    # float32 accumulation: rounding every chunk's product to bfloat16 would bias the head's gradient.
    hidden, weight, bias = (
        torch.empty(t.shape, dtype=wide(t), device=t.device) if t is not None and need else None
        for t, need in zip(tensors, needed, strict=False)
    )
    if hidden is not None and tensors[1] is None:
        hidden[:, vocab:] = 0.0
    if weight is not None:
        weight[vocab if len(tensors[0]) else 0 :] = 0.0  # type: ignore[arg-type]
    if bias is not None:
        bias.zero_()
    return Gradients(hidden, weight, bias)


# A CPU gives large buffers back to the system when they are freed, and clears the pages again at the next
# call: a tenth of the operator's time. So the two chunks of logits stay.
_cpu_scratch: dict[torch.dtype, Tensor] = {}


def _chunk_buffers(like: Tensor, rows: int, vocab: int, dtype: torch.dtype) -> Float[Tensor, "2 C V"]:
    if like.device.type != "cpu":
        return like.new_empty(2, rows, vocab, dtype=dtype)
    size = 2 * rows * vocab
    if not _cpu_scratch:
        # glibc returns freed memory to the system by a threshold that the largest block freed so far sets;
        # this one raises it above what the tiles use, whose pages would otherwise be cleared anew at every
        # operation.
        torch.empty(31 * 2**20, dtype=torch.uint8)
    if dtype not in _cpu_scratch or _cpu_scratch[dtype].numel() < size:
        _cpu_scratch[dtype] = like.new_empty(size, dtype=dtype)
    return _cpu_scratch[dtype][:size].view(2, rows, vocab)


def chunk_rows(num_tokens: int, row_bytes: int, chunk_bytes: int) -> int:
    """Positions of a chunk: as many as the bytes allow, evened out, for a last chunk of a few rows reads the
    heads in vain."""
    most = max(1, min(num_tokens, chunk_bytes // row_bytes))
    chunks = -(-num_tokens // most)
    return -(-num_tokens // max(chunks, 1)) or 1


def _walk(student: Scores, plan: Plan, gradients: Gradients, sums: Sums) -> None:
    """Chunks of positions: logits of both models, gradient of the student's, products back to hidden and
    head."""
    num_tokens, vocab = len(student.hidden), plan.vocab
    dtype = wide(student.hidden)
    student, ready = for_products(student, vocab), plan.teacher
    if isinstance(ready, Scores):
        ready = for_products(ready, vocab)
    rows = chunk_rows(num_tokens, vocab * dtype.itemsize, plan.chunk_bytes)
    buffers = _chunk_buffers(student.hidden, rows, vocab, dtype)
    # A product of Python numbers is filled in on the device: no copy from the host, no synchronisation.
    scale = torch.ones((), dtype=dtype, device=student.hidden.device) * plan.scale * student.head.scale
    # The slope of a softcap needs the logits beside their gradient: a second chunk, so such heads go tile by
    # tile.
    few = read_few_tokens(plan.terms, plan.inputs.kl_estimator) and student.head.softcap is None
    few = few and (plan.tile_gradient is tile_gradient_ or is_known_by_token(plan.teacher))
    for start in range(0, num_tokens, rows):
        chunk = slice(start, min(start + rows, num_tokens))
        hidden = student.hidden[chunk]
        logits = project_(Scores(hidden, student.head), buffers[0, : len(hidden)])
        part = _Part(
            plan.teacher.at(chunk), ready.at(chunk), plan.inputs.rows(chunk), buffers[1, : len(hidden)]
        )
        if few and is_known_by_token(plan.teacher):
            _gradient_by_token_(logits, part, start, plan, scale, sums)
        else:
            _gradient_of_whole_(logits, part, start, plan, student.head, scale, sums, few)
        add(sums, tokens=torch.ones_like(logits[:, 0]))
        if any(buffer is not None for buffer in gradients):
            accumulate(logits, hidden, student.head.weight, gradients, chunk)


class _Part(NamedTuple):
    """One chunk of what is not the student's."""

    teacher: TeacherScores
    ready: TeacherScores
    """The teacher cut to the common vocabulary, in the dtype of products."""
    inputs: TileInputs
    buffer: Float[Tensor, "C V"]
    """For the teacher's logits."""


def _gradient_by_token_(
    logits: Tensor, part: _Part, first: int, plan: Plan, scale: Tensor, sums: Sums
) -> None:
    """No product with the teacher's head but for the positions that metrics are taken at."""
    teacher, labels = part.teacher, part.inputs.labels
    if plan.metric_stride:
        rows = slice(-first % plan.metric_stride, None, plan.metric_stride)
        chosen = logits[rows]
        _metrics(teacher_logits_(part.ready.at(rows), labels[rows], part.buffer[: len(chosen)]), chosen, sums)
    if teacher.vocab > plan.vocab:
        add(sums, teacher_mass_outside=mass_outside(teacher, labels, plan.vocab, None))
    log_z = log_normaliser(teacher, labels, plan.vocab)
    token_gradient_(
        logits,
        lambda tokens: token_logprobs(teacher, log_z, labels, tokens),
        part.inputs,
        plan.terms,
        sums,
        scale,
    )
    if isinstance(teacher, TopKScores):
        add(sums, teacher_tail_mass=tail_mass(teacher, labels))


def _gradient_of_whole_(
    logits: Tensor, part: _Part, first: int, plan: Plan, head: Head, scale: Tensor, sums: Sums, few: bool
) -> None:
    """With the teacher's logits of the whole vocabulary."""
    teacher, labels = part.teacher, part.inputs.labels
    teacher_logits = teacher_logits_(part.ready, labels, part.buffer)
    if teacher.vocab > plan.vocab:
        add(sums, teacher_mass_outside=mass_outside(teacher, labels, plan.vocab, teacher_logits))
    if isinstance(teacher, TopKScores):
        add(sums, teacher_tail_mass=tail_mass(teacher, labels))
    if plan.metric_stride:
        rows = slice(-first % plan.metric_stride, None, plan.metric_stride)
        _metrics(teacher_logits[rows], logits[rows], sums)
    if few:
        log_p = torch.log_softmax(teacher_logits, -1, out=teacher_logits)
        token_gradient_(logits, lambda tokens: log_p.gather(1, tokens), part.inputs, plan.terms, sums, scale)
        return
    # A product of finite numbers is finite; a bias, or logits from elsewhere, may mask tokens with -inf.
    heads = [head, *([teacher.head] if isinstance(teacher, Scores) else [])]
    finite = all(h.weight is not None and h.bias is None for h in heads)
    for rows in _tiles(logits):
        slope = None
        if head.softcap is not None:
            slope = 1.0 - (logits[rows] / head.softcap).square_()
        gradient = plan.tile_gradient(
            logits[rows], teacher_logits[rows], part.inputs.rows(rows), plan.terms, sums, scale, finite
        )
        if slope is not None:
            gradient.mul_(slope)


def _tiles(logits: Float[Tensor, "C V"]) -> Iterator[slice]:
    """Tile by tile; on devices without a CPU's caches the chunk is one tile."""
    size, vocab = logits.shape
    rows = (
        max(1, _TILE_BYTES // (vocab * logits.element_size()))
        if logits.device.type == "cpu"
        else max(size, 1)
    )
    for start in range(0, size, rows):
        yield slice(start, min(start + rows, size))


def _metrics(teacher_logits: Tensor, logits: Tensor, sums: Sums) -> None:
    """Metrics of the full distributions at the chosen positions of a chunk.

    They are taken together: spread over the chunk's tiles they would be slivers, and starting a parallel
    region for each costs more than the arithmetic.
    """
    for rows in _tiles(logits):
        log_p, log_q = (torch.log_softmax(side[rows], -1) for side in (teacher_logits, logits))
        distribution_metrics(log_p, log_q, sums)


def compiled_reweighted_nll(student: Scores, plan: Plan) -> tuple[Float[Tensor, ""], Sums]:
    """Loss and statistics; see `hpd.losses.reweighted_nll`, whose checks have run.

    The first call with new terms compiles (seconds to a minute); a schedule that changes an objective's
    parameter makes new terms at every step, and is better served by `chunked`.
    """
    return chunked_reweighted_nll(student, plan._replace(tile_gradient=_compiled_tile_gradient_))


def _compiled_tile_gradient_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    inputs: TileInputs,
    terms: Sequence[Term],
    sums: Sums,
    scale: Tensor,
    finite: bool = False,
) -> Tensor:
    gradient, values = _kernel()(student_logits, teacher_logits, inputs, terms, scale, finite)
    student_logits.copy_(gradient)
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value
    return student_logits


@functools.cache
def _kernel() -> Callable[..., Any]:
    """One compiled function for all terms: the compiler keeps a version for each, guarded by what they
    hold."""

    def kernel(
        student_logits: Tensor,
        teacher_logits: Tensor,
        inputs: TileInputs,
        terms: Sequence[Term],
        scale: Tensor,
        finite: bool,
    ) -> tuple[Tensor, Sums]:
        sums: Sums = {}
        gradient = tile_gradient_(
            student_logits.clone(), teacher_logits.clone(), inputs, terms, sums, scale, finite
        )
        return gradient, sums

    return torch.compile(kernel, dynamic=True)
