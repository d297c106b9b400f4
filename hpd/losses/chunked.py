"""The fused operator: head products, weights and gradients chunk by chunk, in the forward pass.

Axes: N label positions, C positions of a chunk, D hidden, V vocabulary.

Cost: the student's head is multiplied three times (logits, gradient of the hidden states, gradient of the head; two times if
the head is frozen) and the teacher's once: the floor for any method that reads both distributions. Memory: two chunks of
logits, one tile of scratch and the head's gradient; never `[N, V]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.heads import Head, Scores
from hpd.losses.tile import Sums, TileInputs, add, distribution_metrics, tile_gradient_
from hpd.terms import Term

__all__ = ["Plan", "chunked_reweighted_nll"]

# Scratch per tile on a CPU: small beside a chunk, and large enough to amortise the start of a parallel region (measured: a pass
# over 2 rows of 49,152 costs three times as much per element as one over 32 rows).
_TILE_BYTES = 8 * 2**20


class Plan(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    teacher: Scores
    inputs: TileInputs
    terms: Sequence[Term]
    scale: Tensor | float
    chunk_bytes: int
    metric_stride: int
    vocab: int


def chunked_reweighted_nll(student: Scores, plan: Plan) -> tuple[Float[Tensor, ""], Sums]:
    """Loss and statistics; see `hpd.losses.reweighted_nll`, whose checks have run."""
    sums: Sums = {}
    tensors = student.hidden, student.head.weight, student.head.bias
    if not torch.is_grad_enabled():
        # Inside a Function the grad mode is off and inputs still ask for gradients: an evaluation would compute them.
        tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    loss = _ReweightedNLL.apply(*tensors, student.head, plan, sums)
    return loss, sums  # type: ignore[return-value]


class _ReweightedNLL(torch.autograd.Function):
    """Gradients are computed in forward, where the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, head: Head, plan: Plan, sums: Sums):
        gradients = _Gradients.empty((hidden, weight, bias), ctx.needs_input_grad, plan.vocab)
        _walk(Scores(hidden, head._replace(weight=weight, bias=bias)), plan, gradients, sums)
        ctx.gradients = [
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        total = sum(term.weight * sums[f"value/{term.name}"] for term in plan.terms) if len(hidden) else hidden.new_zeros(())
        return (total * plan.scale).to(torch.promote_types(hidden.dtype, torch.float32))  # type: ignore[union-attr]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("reweighted_nll keeps its gradients for one backward pass; compute the loss again instead.")
        # A CPU can look for free whether there is anything to scale; elsewhere looking would synchronise the device.
        if grad_output.device.type != "cpu" or grad_output != 1.0:
            # In place: a second [V, D] buffer would double the operator's memory.
            gradients = [None if g is None else g.mul_(grad_output.to(g.dtype)) for g in gradients]
        return *gradients, None, None, None


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, tensors: Sequence[Tensor | None], needed: Sequence[bool], vocab: int) -> _Gradients:
        """Buffers that the walk overwrites; zeros where it only adds, or does not reach (no rows, tokens beyond `vocab`)."""
        # float32 accumulation: rounding every chunk's product to bfloat16 would bias the head's gradient.
        hidden, weight, bias = (
            torch.empty(t.shape, dtype=_wide(t), device=t.device) if t is not None and need else None
            for t, need in zip(tensors, needed, strict=False)
        )
        if hidden is not None and tensors[1] is None:
            hidden[:, vocab:] = 0.0
        if weight is not None:
            weight[vocab if len(tensors[0]) else 0 :] = 0.0  # type: ignore[arg-type]
        if bias is not None:
            bias.zero_()
        return cls(hidden, weight, bias)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# A CPU gives large buffers back to the system when they are freed, and clears the pages again at the next call: a tenth of
# the operator's time. So the two chunks of logits stay.
_cpu_scratch: dict[torch.dtype, Tensor] = {}


def _chunk_buffers(like: Tensor, rows: int, vocab: int, dtype: torch.dtype) -> Float[Tensor, "2 C V"]:
    if like.device.type != "cpu":
        return like.new_empty(2, rows, vocab, dtype=dtype)
    size = 2 * rows * vocab
    if not _cpu_scratch:
        # glibc returns freed memory to the system by a threshold that the largest block freed so far sets; this one raises it
        # above what the tiles use, whose pages would otherwise be cleared anew at every operation.
        torch.empty(31 * 2**20, dtype=torch.uint8)
    if dtype not in _cpu_scratch or _cpu_scratch[dtype].numel() < size:
        _cpu_scratch[dtype] = like.new_empty(size, dtype=dtype)
    return _cpu_scratch[dtype][:size].view(2, rows, vocab)


def _walk(student: Scores, plan: Plan, gradients: _Gradients, sums: Sums) -> None:
    """Chunks of positions: logits of both models, gradient of the student's, products back to hidden and head."""
    num_tokens, vocab = len(student.hidden), plan.vocab
    dtype = torch.promote_types(student.hidden.dtype, torch.float32)
    student, teacher = _for_products(student, vocab), _for_products(plan.teacher, vocab)
    rows = max(1, min(num_tokens, plan.chunk_bytes // (vocab * dtype.itemsize)))
    buffers = _chunk_buffers(student.hidden, rows, vocab, dtype)
    # A product of Python numbers is filled in on the device: no copy from the host, no synchronisation.
    scale = torch.ones((), dtype=dtype, device=student.hidden.device) * plan.scale * student.head.scale
    for start in range(0, num_tokens, rows):
        chunk = slice(start, min(start + rows, num_tokens))
        size = chunk.stop - chunk.start
        logits = project_(Scores(student.hidden[chunk], student.head), buffers[0, :size])
        teacher_logits = project_(Scores(teacher.hidden[chunk], teacher.head), buffers[1, :size])
        _outside_mass(teacher_logits, Scores(plan.teacher.hidden[chunk], plan.teacher.head), vocab, sums)
        gradient = _chunk_gradient_(logits, teacher_logits, chunk, student.head, plan, scale, sums)
        if gradients.hidden is None and gradients.weight is None and gradients.bias is None:
            continue
        _accumulate(gradient, student.hidden[chunk], student.head.weight, gradients, chunk)


def _chunk_gradient_(
    logits: Tensor, teacher_logits: Tensor, chunk: slice, head: Head, plan: Plan, scale: Tensor, sums: Sums
) -> Float[Tensor, "C V"]:
    """Tile by tile; on devices without a CPU's caches the chunk is one tile."""
    size, vocab = logits.shape
    # A product of finite numbers is finite; a bias, or logits from elsewhere, may mask tokens with -inf.
    finite = all(h.weight is not None and h.bias is None for h in (head, plan.teacher.head))
    rows = max(1, _TILE_BYTES // (vocab * logits.element_size())) if logits.device.type == "cpu" else size
    _chunk_metrics(logits, teacher_logits, chunk.start, rows, plan.metric_stride, sums)
    for start in range(0, size, rows):
        tile = slice(start, min(start + rows, size))
        first = chunk.start + start
        inputs = plan.inputs.rows(slice(first, chunk.start + tile.stop))
        slope = None
        if head.softcap is not None:
            slope = 1.0 - (logits[tile] / head.softcap).square_()
        gradient = tile_gradient_(logits[tile], teacher_logits[tile], inputs, plan.terms, sums, scale, finite)
        if slope is not None:
            gradient.mul_(slope)
    add(sums, "tokens", torch.ones_like(logits[:, 0]))
    return logits


def _chunk_metrics(logits: Tensor, teacher_logits: Tensor, first: int, tile_rows: int, stride: int, sums: Sums) -> None:
    """Metrics of the full distributions at every `stride`-th position, counted over the whole batch.

    The chosen rows of a chunk are taken together: spread over its tiles they would be slivers, and starting a parallel
    region for each costs more than the arithmetic.
    """
    if not stride:
        return
    chosen = range(-first % stride, len(logits), stride)
    for start in range(0, len(chosen), tile_rows):
        part = chosen[start : start + tile_rows]
        rows = slice(part.start, part.stop, stride)
        log_p, log_q = (torch.log_softmax(side[rows], -1) for side in (teacher_logits, logits))
        distribution_metrics(log_p, log_q, sums)


def project_(scores: Scores, out: Float[Tensor, "C V"]) -> Float[Tensor, "C V"]:
    """Logits of `scores`, written into `out`."""
    hidden, head = scores
    if head.weight is None:
        out.copy_(hidden[:, : out.shape[1]])
    else:
        _product(hidden, head.weight.t(), out)
    if head.bias is not None:
        out.add_(head.bias)
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _accumulate(gradient: Tensor, hidden: Tensor, weight: Tensor | None, gradients: _Gradients, chunk: slice) -> None:
    vocab = gradient.shape[1]
    if gradients.bias is not None:
        gradients.bias[:vocab] += gradient.sum(0)
    if weight is None:
        if gradients.hidden is not None:
            gradients.hidden[chunk, :vocab] = gradient
        return
    if hidden.dtype != gradient.dtype:
        gradient = gradient.to(hidden.dtype)
    if gradients.hidden is not None:
        _product(gradient, weight, gradients.hidden[chunk])
    if gradients.weight is not None:
        target = gradients.weight[:vocab]
        if chunk.start == 0:
            _product(gradient.t(), hidden, target)
        elif gradient.dtype == target.dtype:
            target.addmm_(gradient.t(), hidden)
        else:
            target.add_(_wide_product(gradient.t(), hidden, target.dtype))


def _for_products(scores: Scores, vocab: int) -> Scores:
    """Cut to the common tokens and cast to the dtype that products run in.

    Under autocast that is the autocast dtype. A CPU multiplies low precision tens of times slower than float32, so there the
    operands are raised.
    """
    hidden, head = scores.hidden, scores.head.truncated(vocab)
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype) if head.weight is not None else hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if hidden.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    if head.weight is None:
        return Scores(hidden, head)
    return Scores(hidden.to(dtype), head._replace(weight=head.weight.to(dtype)))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(_wide_product(a, b, out.dtype))


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.is_cuda and dtype == torch.float32:
        # bfloat16 operands, float32 result: the accumulator is not rounded on its way out.
        return torch.mm(a, b, out_dtype=dtype)  # type: ignore[call-overload]
    return torch.mm(a, b)


def _outside_mass(common_logits: Tensor, teacher: Scores, vocab: int, sums: Sums) -> None:
    """Teacher mass on tokens that the student does not have (policy `shared_prefix`), summed over positions."""
    hidden, head = teacher
    num_extra = teacher.vocab - vocab
    if num_extra <= 0:
        return
    if head.weight is None:
        hidden = hidden[:, vocab:]
    else:
        head = head._replace(weight=head.weight[vocab:])
    if head.bias is not None:
        head = head._replace(bias=head.bias[vocab:])
    extra = project_(_for_products(Scores(hidden, head), num_extra), common_logits.new_empty(len(common_logits), num_extra))
    outside = torch.logsumexp(extra, -1)
    inside = torch.logsumexp(common_logits, -1)
    add(sums, "teacher_mass_outside", torch.sigmoid(outside - inside))
