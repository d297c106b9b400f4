"""The student's softmax of a chunk, for terms that read a few tokens: in place, or by blocks.

Axes: C positions of a chunk, n tokens per position, B blocks of the vocabulary, V vocabulary.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.methods.sampling import block_tokens, inverse_cdf_of_blocks
from hpd.methods.supports import Draws, Support

__all__ = [
    "BlockSoftmax",
    "InPlaceSoftmax",
    "StudentSoftmax",
    "compiled",
    "log_normalizer_by_blocks",
]

Updates = list[tuple[Int[Tensor, "C n"], Float[Tensor, "C n"]]]


class StudentSoftmax(ABC):
    """What `token_gradient` asks of the student."""

    dtype: torch.dtype
    given: Draws | None
    """The tokens that the caller drew."""

    @abstractmethod
    def logprobs(self, tokens: Int[Tensor, "C n"]) -> Float[Tensor, "C n"]:
        """Log-probabilities (nats) of the label, or of tokens with mass."""

    @abstractmethod
    def draw(self, support: Support, uniforms: Float[Tensor, "C u"]) -> Draws:
        """Tokens drawn by inverse CDF, as `Support.draw`."""

    @abstractmethod
    def gradient(self, mass: Float[Tensor, "C 1"], updates: Updates) -> Float[Tensor, "C V"]:
        """`mass * q`, plus each update at its tokens. Ends the life of this object."""


class InPlaceSoftmax(StudentSoftmax):
    """Overwrites the logits with log-probabilities, then probabilities, then the gradient."""

    def __init__(self, logits: Float[Tensor, "C V"], labels: Int[Tensor, "C"], draws: Tensor | None):
        self.dtype = logits.dtype
        self._labels = labels
        log_q = torch.log_softmax(logits, -1, out=logits)
        self._label_logprobs = log_q.gather(1, labels[:, None])
        self.given = None if draws is None else Draws(draws, log_q.gather(1, draws))
        self._q = log_q.exp_()

    def logprobs(self, tokens: Int[Tensor, "C n"]) -> Float[Tensor, "C n"]:
        # A drawn token has mass, so that its logarithm is exact; the label's may have underflowed and was
        # kept.
        return torch.where(
            tokens == self._labels[:, None], self._label_logprobs, torch.log(self._q.gather(1, tokens))
        )

    def draw(self, support: Support, uniforms: Float[Tensor, "C u"]) -> Draws:
        return support.draw(self._q, self._q, self._labels, uniforms)

    def gradient(self, mass: Float[Tensor, "C 1"], updates: Updates) -> Float[Tensor, "C V"]:
        gradient = self._q.mul_(mass)
        for tokens, values in updates:
            gradient.scatter_add_(1, tokens, values)
        return gradient


class BlockSoftmax(StudentSoftmax):
    """Leaves the logits as they are: one compiled pass reads them for the normalizer and the mass of each
    block, another for the gradient, which it writes in the dtype of the products. A GPU's time between the
    products is the bytes that it moves, and this is a third of what the other moves.
    """

    def __init__(
        self,
        logits: Float[Tensor, "C V"],
        labels: Int[Tensor, "C"],
        draws: Tensor | None,
        gradient_dtype: torch.dtype,
    ):
        self.dtype = logits.dtype
        self._logits, self._labels, self._gradient_dtype = logits, labels, gradient_dtype
        self._log_masses = _log_block_masses(logits)
        self._log_z = torch.logsumexp(self._log_masses, -1, keepdim=True)
        self.given = None if draws is None else Draws(draws, self.logprobs(draws))

    def logprobs(self, tokens: Int[Tensor, "C n"]) -> Float[Tensor, "C n"]:
        return self._logits.gather(1, tokens) - self._log_z

    def draw(self, support: Support, uniforms: Float[Tensor, "C u"]) -> Draws:
        def probs_at(tokens: Tensor) -> Tensor:
            return self.logprobs(tokens).exp_()

        masses = torch.exp(self._log_masses - self._log_z)
        tokens = inverse_cdf_of_blocks(masses, probs_at, self._logits.shape[1], uniforms[:, : support.draws])
        return support.as_draws(tokens, probs_at(tokens), self._labels, uniforms)

    def gradient(self, mass: Float[Tensor, "C 1"], updates: Updates) -> Float[Tensor, "C V"]:
        tokens, values = (torch.cat(side, 1) for side in zip(*updates, strict=True))
        # All that is due at a token, in each of its columns, so that it is rounded once.
        due = ((tokens[:, :, None] == tokens[:, None, :]) * values[:, None, :]).sum(-1)
        due = due + mass * self.logprobs(tokens).exp_()
        gradient = compiled(_scaled_probs)(self._logits, self._log_z, mass, self._gradient_dtype)
        return gradient.scatter_(1, tokens, due.to(gradient.dtype))


def log_normalizer_by_blocks(logits: Float[Tensor, "C V"]) -> Float[Tensor, "C 1"]:
    """log of the sum of exp(logit), which reads the logits once."""
    return torch.logsumexp(_log_block_masses(logits), -1, keepdim=True)


def _log_block_masses(logits: Float[Tensor, "C V"]) -> Float[Tensor, "C B"]:
    top, sums = compiled(_block_sums)(logits)
    return top + torch.log(sums)


def _block_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Greatest logit of each block, and the sum of exp(logit - greatest)."""
    size = block_tokens(logits.shape[1])
    whole = logits.shape[1] - logits.shape[1] % size
    parts = [_sums(logits[:, :whole].unflatten(1, (-1, size)))]
    if whole < logits.shape[1]:
        parts.append(_sums(logits[:, None, whole:]))
    top, sums = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    return top, sums


def _sums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    # Of a block without any mass the greatest is -inf, and -inf - -inf is NaN.
    top = blocks.amax(-1).clamp_min(torch.finfo(blocks.dtype).min)
    return top, torch.exp(blocks - top[..., None]).sum(-1)


def _scaled_probs(logits: Tensor, log_z: Tensor, mass: Tensor, dtype: torch.dtype) -> Tensor:
    return (torch.exp(logits - log_z) * mass).to(dtype)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function; the compiler keeps a version for each list of terms."""
    return torch.compile(function, dynamic=True)
