"""The matrix products with the heads, chunk by chunk: logits out of hidden states, and gradients back.

Axes: N label positions, C positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.heads import Head, Scores

__all__ = [
    "Gradients",
    "accumulate",
    "add_product_",
    "chunk_rows",
    "chunks",
    "empty_gradients",
    "for_gradients",
    "for_products",
    "leaves",
    "logits",
    "product_",
    "project_",
    "wide",
]


def chunks(num_tokens: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Walk over label positions, as many at a time as the bytes allow, at least one.

    >>> list(chunks(5, row_bytes=4, chunk_bytes=8))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows = max(1, chunk_bytes // row_bytes)
    for start in range(0, num_tokens, rows):
        yield slice(start, min(start + rows, num_tokens))


def chunk_rows(num_tokens: int, row_bytes: int, chunk_bytes: int) -> int:
    """Positions of a chunk, evened out: a last chunk of a few rows reads the heads in vain."""
    most = max(1, min(num_tokens, chunk_bytes // row_bytes))
    count = -(-num_tokens // most)
    return -(-num_tokens // max(count, 1)) or 1


class Gradients(NamedTuple):
    """Buffers for the gradients of hidden states, head weight and bias; None where none is needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def empty_gradients(tensors: Sequence[Tensor | None], needed: Sequence[bool], vocab: int) -> Gradients:
    """Buffers that the walk overwrites; zeros where it only adds, or does not reach."""
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


def leaves(student: Scores) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tensors that gradients flow to: hidden states, weight and bias."""
    leaves = student.hidden, student.head.weight, student.head.bias
    if torch.is_grad_enabled():
        return leaves
    # Inside a Function the grad mode is off and inputs still ask for gradients: an evaluation would compute
    # them.
    hidden, weight, bias = leaves
    return (
        hidden.detach(),
        weight if weight is None else weight.detach(),
        bias if bias is None else bias.detach(),
    )


def wide(tensor: Tensor) -> torch.dtype:
    """At least float32: what logits and gradients are accumulated in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def for_products(scores: Scores, vocab: int) -> Scores:
    """Cut to the common tokens and cast to the dtype that products run in.

    Under autocast that is the autocast dtype. A CPU multiplies low precision tens of times slower than
    float32, so there the operands are raised.
    """
    hidden, head = scores.hidden, scores.head.truncated(vocab)
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype) if head.weight is not None else hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if hidden.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    if head.weight is None:
        return scores._replace(head=head)
    return scores._replace(hidden=hidden.to(dtype), head=head._replace(weight=head.weight.to(dtype)))


def for_gradients(scores: Scores) -> Scores:
    """The operands of both gradient products, out of those of `for_products`.

    On a CPU under bfloat16 autocast they are bfloat16, and their products are added in float32. Logits stay
    float32: such a product of a CPU is rounded on its way out, and a logit of 20 would be off by 0.06 nats.
    """
    device, weight = scores.hidden.device.type, scores.head.weight
    if device != "cpu" or weight is None or not torch.is_autocast_enabled("cpu"):
        return scores
    dtype = torch.get_autocast_dtype("cpu")
    if dtype != torch.bfloat16 or weight.dtype != torch.float32:
        return scores
    return scores._replace(hidden=scores.hidden.to(dtype), head=scores.head._replace(weight=weight.to(dtype)))


def project_(scores: Scores, out: Float[Tensor, "C V"]) -> Float[Tensor, "C V"]:
    """Logits of `scores`, written into `out`."""
    hidden, head, _ = scores
    if head.weight is None:
        out.copy_(hidden[:, : out.shape[1]])
    else:
        product_(hidden, head.weight.t(), out)
    if head.bias is not None:
        out.add_(head.bias)
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def accumulate(
    gradient: Float[Tensor, "C V"],
    hidden: Float[Tensor, "C D"],
    weight: Tensor | None,
    gradients: Gradients,
    chunk: slice,
) -> None:
    """The chunk's part of the gradients: overwritten in the first chunk, added in the others."""
    vocab = gradient.shape[1]
    if gradients.bias is not None:
        gradients.bias[:vocab] += gradient.sum(0, dtype=gradients.bias.dtype)
    if weight is None:
        if gradients.hidden is not None:
            gradients.hidden[chunk, :vocab] = gradient
        return
    if hidden.dtype != gradient.dtype:
        gradient = gradient.to(hidden.dtype)
    if gradients.hidden is not None:
        product_(gradient, weight, gradients.hidden[chunk])
    if gradients.weight is not None:
        target = gradients.weight[:vocab]
        if chunk.start == 0:
            product_(gradient.t(), hidden, target)
        else:
            add_product_(gradient.t(), hidden, target)


def product_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`a @ b` into `out`, which may be wider than both."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _widens(a, out):
        torch.mm(a, b, out_dtype=out.dtype, out=out)  # type: ignore[call-overload]
    else:
        out.copy_(torch.mm(a, b))


def add_product_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add `a @ b` to `out`, which may be wider than both."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif _widens(a, out):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)  # type: ignore[call-overload]
    else:
        out.add_(torch.mm(a, b))


def _widens(a: Tensor, out: Tensor) -> bool:
    """True where products of low precision are written in float32: the accumulator is not rounded on its way
    out, and no copy is made."""
    return a.is_cuda and out.dtype == torch.float32


class _WideProduct(torch.autograd.Function):
    """`hidden @ weight.T` in at least float32, whatever autocast says: it would round the logits, and a logit
    of 20 by 0.06 nats. Operands and gradients are those of the fused operator."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ready = for_products(Scores(hidden, Head(weight)), len(weight))
        low = for_gradients(ready)
        assert ready.head.weight is not None
        ctx.save_for_backward(low.hidden, low.head.weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        out = hidden.new_empty(len(hidden), len(weight), dtype=wide(hidden))
        product_(ready.hidden, ready.head.weight.t(), out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = grad_output.to(weight.dtype)
        found: list[Tensor | None] = [None, None]
        for side, (a, b) in enumerate(((gradient, weight), (gradient.t(), hidden))):
            if ctx.needs_input_grad[side]:
                out = grad_output.new_empty(a.shape[0], b.shape[1])
                product_(a, b, out)
                found[side] = out.to(ctx.dtypes[side])
        return found[0], found[1]


def logits(scores: Scores, vocab: int | None = None) -> Float[Tensor, "N V"]:
    """Differentiable logits of the first `vocab` tokens, in at least float32."""
    head = scores.head.truncated(vocab)
    if head.weight is None:
        out = scores.hidden.to(wide(scores.hidden))[:, :vocab]
    else:
        out = cast(Tensor, _WideProduct.apply(scores.hidden, head.weight))
    if head.bias is not None:
        out = out + head.bias
    out = out * head.scale
    return out if head.softcap is None else head.softcap * torch.tanh(out / head.softcap)
