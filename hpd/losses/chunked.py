"""The fused operator: head products, weights and gradients chunk by chunk, in the forward pass.

Axes: N label positions, C positions of a chunk, D hidden, V vocabulary.

Cost: the student's head is multiplied three times (logits, gradient of the hidden states, gradient of the
head; two times if the head is frozen) and the teacher's once: the floor for any method that reads both
distributions. Memory: two chunks of logits, one tile of scratch and the head's gradient; never `[N, V]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.filtered import GradientFilter
from hpd.losses.heads import Head, Scores, TeacherScores, TopKScores
from hpd.losses.measures import chunk_metrics, tile_values_, tiles
from hpd.losses.products import (
    Gradients,
    accumulate,
    chunk_rows,
    chunks,
    empty_gradients,
    for_gradients,
    for_products,
    project_,
    wide,
)
from hpd.losses.softmax import (
    BlockSoftmax,
    InPlaceSoftmax,
    StudentSoftmax,
    compiled,
    log_normalizer_by_blocks,
)
from hpd.losses.teacher_side import (
    is_known_by_token,
    known_metrics,
    log_normalizer,
    mass_outside,
    tail_mass,
    teacher_logits_,
    token_logprobs,
)
from hpd.losses.tile import (
    Sums,
    TeacherAt,
    TileInputs,
    add,
    merge,
    normalized_gradient_,
    read_few_tokens,
    tile_gradient_,
    token_gradient,
)
from hpd.methods.terms import Term, reads_teacher

__all__ = ["OperatorCall", "ReweightedNLL", "compiled_reweighted_nll", "finish"]


class OperatorCall(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    teacher: TeacherScores
    ready: TeacherScores
    """The teacher cut to the common vocabulary, in the dtype of products."""
    inputs: TileInputs
    terms: Sequence[Term]
    scale: Tensor | float
    chunk_bytes: int
    metric_stride: int
    vocab: int
    gradient_filter: float = 0.0
    """Share of a position's mean absolute gradient that an entry of a column must exceed; 0: no filter."""
    compiled: bool = False
    """The passes between the products through torch.compile."""

    def at(self, chunk: slice) -> OperatorCall:
        """The call at some of the positions."""
        return self._replace(
            teacher=self.teacher.at(chunk), ready=self.ready.at(chunk), inputs=self.inputs.rows(chunk)
        )


class ReweightedNLL(torch.autograd.Function):
    """Gradients are computed in forward, where the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"] | None,
        bias: Float[Tensor, "V"] | None,
        head: Head,
        call: OperatorCall,
        sums: Sums,
    ) -> Float[Tensor, ""]:
        """Loss; `sums` gains the statistics. See `hpd.losses.reweighted_nll`, whose checks have run."""
        dtype, terms = wide(hidden), call.terms
        gradients = empty_gradients((hidden, weight, bias), ctx.needs_input_grad, call.vocab)
        student = for_products(Scores(hidden, head._replace(weight=weight, bias=bias)), call.vocab)
        low = for_gradients(student) if any(buffer is not None for buffer in gradients) else student
        row_bytes = call.vocab * dtype.itemsize
        rows = chunk_rows(len(hidden), row_bytes, call.chunk_bytes)
        buffers = _chunk_buffers(hidden, rows, call.vocab, dtype)
        # A product of Python numbers is filled in on the device: no copy from the host, no synchronization.
        scale = torch.ones((), dtype=dtype, device=hidden.device) * call.scale * head.scale
        few = _reads_few_tokens(call, head)
        by_token = few and (is_known_by_token(call.teacher) or _leaves_teacher(call))
        tile_gradient = _tile_gradient(call, student.head, dtype)
        columns = None
        if call.gradient_filter:
            columns = GradientFilter(call.gradient_filter, buffers[1], sums)
        add_gradient = accumulate if columns is None else columns.accumulate
        for chunk in chunks(len(hidden), row_bytes, rows * row_bytes):
            part, scores = call.at(chunk), student.at(chunk)
            logits = project_(scores, buffers[0, : len(scores.hidden)])
            if _reads_all_without_gradient(call, gradients):
                _evaluate(part, logits, buffers[1, : len(logits)], sums)
                continue
            teacher_logits = _observe(part, logits, buffers[1, : len(logits)], chunk.start, by_token, sums)
            if few:
                softmax = _softmax(part, logits, student.head)
                teacher_at = _look_up(part, teacher_logits)
                gradient = token_gradient(softmax, teacher_at, part.inputs, terms, sums, scale)
            else:
                assert teacher_logits is not None
                parts = [
                    tile_gradient(logits[at], teacher_logits[at], part.inputs.rows(at), terms, sums, scale)
                    for at in tiles(logits, call.compiled)
                ]
                gradient = parts[0] if call.compiled else logits
            add(sums, tokens=torch.ones_like(logits[:, 0]))
            if any(buffer is not None for buffer in gradients):
                add_gradient(gradient, low.hidden[chunk], low.head.weight, gradients, chunk)
        if columns is not None:
            columns.finish(gradients)
        return finish(ctx, gradients, (hidden, weight, bias), call, sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "reweighted_nll keeps its gradients for one backward pass; compute the loss again instead."
            )
        # A CPU can look for free whether there is anything to scale; elsewhere looking would synchronize the
        # device.
        if grad_output.device.type != "cpu" or grad_output != 1.0:
            # In place: a second [V, D] buffer would double the operator's memory.
            gradients = [None if g is None else g.mul_(grad_output.to(g.dtype)) for g in gradients]
        return *gradients, None, None, None


# A CPU gives large buffers back to the system when they are freed, and clears the pages again at the next
# call: a tenth of the operator's time. So the two chunks of logits stay.
_cpu_scratch: dict[torch.dtype, Tensor] = {}


def _chunk_buffers(like: Tensor, rows: int, vocab: int, dtype: torch.dtype) -> Float[Tensor, "2 C V"]:
    if like.device.type != "cpu":
        return like.new_empty(2, rows, vocab, dtype=dtype)
    size = 2 * rows * vocab
    if not _cpu_scratch:
        # glibc returns freed memory to the system by a threshold that the largest block freed so far sets;
        # this one raises it above what the tiles use, whose pages would otherwise be cleared again at every
        # operation.
        torch.empty(31 * 2**20, dtype=torch.uint8)
    if dtype not in _cpu_scratch or _cpu_scratch[dtype].numel() < size:
        _cpu_scratch[dtype] = like.new_empty(size, dtype=dtype)
    return _cpu_scratch[dtype][:size].view(2, rows, vocab)


def _reads_few_tokens(call: OperatorCall, head: Head) -> bool:
    """True if the terms are served by single log-probabilities of both models."""
    # The slope of a softcap needs the logits beside their gradient: a second chunk, so such heads go tile by
    # tile.
    return head.softcap is None and read_few_tokens(call.terms, call.inputs.kl_estimator)


def _reads_all_without_gradient(call: OperatorCall, gradients: Gradients) -> bool:
    """True where metrics of every position normalize both distributions, and nothing is learned."""
    taken = call.metric_stride == 1 and isinstance(call.teacher, Scores) and not call.compiled
    return taken and all(buffer is None for buffer in gradients)


def _evaluate(part: OperatorCall, logits: Tensor, buffer: Tensor, sums: Sums) -> None:
    """Add the values of the terms and the metrics of a chunk.

    Args:
        part: the call at the chunk.
        logits: the student's; used up.
        buffer: for the teacher's.
        sums: gain them.
    """
    teacher_logits = _observe(part._replace(metric_stride=0), logits, buffer, 0, False, sums)
    assert teacher_logits is not None
    for at in tiles(logits):
        tile_values_(logits[at], teacher_logits[at], part.inputs.rows(at), part.terms, sums)
    add(sums, tokens=torch.ones_like(logits[:, 0]))


def _leaves_teacher(call: OperatorCall) -> bool:
    """True if no term reads the teacher, nor is its mass outside the common vocabulary measured."""
    return not reads_teacher(call.terms) and call.teacher.vocab <= call.vocab


def finish(
    ctx: Any, gradients: Gradients, leaves: Sequence[Tensor | None], call: Any, sums: Sums
) -> Float[Tensor, ""]:
    """Keep the gradients for the backward pass, in the leaves' dtypes; the loss, out of the terms' values.

    Args:
        ctx: of the autograd function.
        gradients: as they were accumulated.
        leaves: hidden states, weight and bias.
        call: has the `terms` and the `scale`.
        sums: have the value of each term; none where there is no position.
    """
    ctx.gradients = [
        None if gradient is None or leaf is None else gradient.to(leaf.dtype)
        for gradient, leaf in zip(gradients, leaves, strict=True)
    ]
    hidden = leaves[0]
    assert hidden is not None
    total = hidden.new_zeros(())
    for term in call.terms if len(hidden) else ():
        total = total + term.weight * sums[f"value/{term.name}"]
    return (total * call.scale).to(wide(hidden))


def _softmax(part: OperatorCall, logits: Float[Tensor, "C V"], head: Head) -> StudentSoftmax:
    labels, draws = part.inputs.labels, part.inputs.draws
    if part.compiled:
        return BlockSoftmax(logits, labels, draws, _gradient_dtype(head, logits.dtype))
    return InPlaceSoftmax(logits, labels, draws)


def _tile_gradient(call: OperatorCall, head: Head, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The arithmetic between the products, where both distributions are at hand.

    In place, one tile after the other, or compiled: then a new tensor, for a whole chunk.
    """
    finite = _has_finite_logits(call, head)
    if call.compiled:
        # The slope of a softcap still multiplies it.
        given = dtype if head.softcap is not None else _gradient_dtype(head, dtype)
        function = functools.partial(_compiled_gradient, finite=finite, dtype=given)
    else:
        function = functools.partial(tile_gradient_, finite=finite)
    if head.softcap is None:
        return function
    return functools.partial(_gradient_through_softcap_, function, head.softcap)


def _gradient_dtype(head: Head, logits: torch.dtype) -> torch.dtype:
    """The dtype that the products read the gradient in."""
    return logits if head.weight is None else head.weight.dtype


def _has_finite_logits(call: OperatorCall, head: Head) -> bool:
    """True if no logit of either model is -inf."""
    # A product of finite numbers is finite; a bias, or logits from elsewhere, may mask tokens with -inf.
    heads = [head, *([call.teacher.head] if isinstance(call.teacher, Scores) else [])]
    return all(h.weight is not None and h.bias is None for h in heads)


def _observe(
    part: OperatorCall, logits: Tensor, buffer: Tensor, first: int, by_token: bool, sums: Sums
) -> Float[Tensor, "C V"] | None:
    """Add the metrics of a chunk, and return the teacher's logits.

    Args:
        part: the call at the chunk.
        logits: the student's.
        buffer: for the teacher's.
        first: place of the chunk's first position among all.
        by_token: single tokens of the teacher will do, or none: no product with its head but for the
            metrics; the result is None.
    """
    teacher, labels = part.teacher, part.inputs.labels
    teacher_logits = None if by_token else teacher_logits_(part.ready, labels, buffer)
    if teacher.vocab > part.vocab:
        add(sums, teacher_mass_outside=mass_outside(teacher, labels, part.vocab, teacher_logits))
    if isinstance(teacher, TopKScores) and not teacher.drawn:
        add(sums, teacher_tail_mass=tail_mass(teacher, labels))
    if part.metric_stride:
        rows = slice(-first % part.metric_stride, None, part.metric_stride)
        labels = labels[rows]
        if teacher_logits is not None:
            found = teacher_logits[rows]
        else:
            found = teacher_logits_(part.ready.at(rows), labels, buffer[: len(labels)])
        more: Sums = {}
        chunk_metrics(found, logits[rows], labels, more, part.compiled)
        merge(sums, known_metrics(teacher, more))
    return teacher_logits


def _look_up(part: OperatorCall, teacher_logits: Float[Tensor, "C V"] | None) -> TeacherAt:
    """The teacher's log-probabilities of given tokens; its logits may be overwritten."""
    if teacher_logits is not None:
        if part.compiled:
            log_z = log_normalizer_by_blocks(teacher_logits)
            return lambda tokens: teacher_logits.gather(1, tokens) - log_z
        log_p = torch.log_softmax(teacher_logits, -1, out=teacher_logits)
        return lambda tokens: log_p.gather(1, tokens)
    if _leaves_teacher(part):
        return lambda tokens: torch.zeros(tokens.shape, device=tokens.device)
    labels = part.inputs.labels
    log_z = log_normalizer(part.teacher, labels, part.vocab)
    return lambda tokens: token_logprobs(part.teacher, log_z, labels, tokens)


def _gradient_through_softcap_(
    tile_gradient: Callable[..., Tensor], softcap: float, logits: Tensor, *rest: Any
) -> Tensor:
    """`tile_gradient`, times the slope of the cap at the logits."""
    slope = 1.0 - (logits / softcap).square_()
    return tile_gradient(logits, *rest).mul_(slope)


def compiled_reweighted_nll(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    head: Head,
    call: OperatorCall,
    sums: Sums,
) -> Float[Tensor, ""]:
    """`ReweightedNLL` with the passes between the products through torch.compile.

    The first call with new terms compiles (seconds to a minute); a schedule that changes an objective's
    parameter makes new terms at every step, and is better served by `chunked`.
    """
    call = call._replace(compiled=True)
    return ReweightedNLL.apply(hidden, weight, bias, head, call, sums)  # type: ignore[return-value]


def _compiled_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    inputs: TileInputs,
    terms: Sequence[Term],
    sums: Sums,
    scale: Tensor,
    *,
    finite: bool,
    dtype: torch.dtype,
) -> Tensor:
    log_z = [log_normalizer_by_blocks(logits) for logits in (student_logits, teacher_logits)]
    pair = student_logits, teacher_logits
    gradient, values = compiled(_gradient_of_logits)(*pair, *log_z, inputs, terms, scale, finite, dtype)
    merge(sums, values)
    return gradient


def _gradient_of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_log_z: Tensor,
    teacher_log_z: Tensor,
    inputs: TileInputs,
    terms: Sequence[Term],
    scale: Tensor,
    finite: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Sums]:
    sums: Sums = {}
    log_q, log_p = student_logits - student_log_z, teacher_logits - teacher_log_z
    gradient = normalized_gradient_(log_q, log_p, inputs, terms, sums, scale, finite)
    return gradient.to(dtype), sums
