"""Supports: which tokens of the vocabulary a term sums over, and with what coefficients.

Axes: N label positions, K columns of the support, V vocabulary.

A support turns the two full distributions at N positions into K columns. Column order is fixed: the label first (where the
support has it), then the draws. Coefficients multiply the objective's weights and values column by column; they carry the
importance weights of drawn tokens and make a token count once where the label and a draw coincide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Columns", "Draws", "Support", "full", "inverse_cdf", "label", "sampled"]

# Tokens per block of the two-level inverse CDF: about sqrt(V), so that the search over block sums and the search inside one
# block cost the same.
_BLOCK_TOKENS = 256


class Columns(NamedTuple):
    """The K columns of a support at N positions.

    `tokens` is None when the columns are the whole vocabulary in order; `coefficients` is None when they are all one.
    """

    teacher_logprobs: Float[Tensor, "N K"]
    student_logprobs: Float[Tensor, "N K"]
    tokens: Int[Tensor, "N K"] | None
    coefficients: Float[Tensor, "N K"] | None


class Draws(NamedTuple):
    """Tokens drawn at N positions, n each, and the log-probability (nats) with which each was drawn."""

    tokens: Int[Tensor, "N n"]
    logprobs: Float[Tensor, "N n"]


@dataclass(frozen=True, kw_only=True)
class Support:
    """Which tokens are summed over. Build one with `full`, `label`, `sampled`, and join them with `+`."""

    whole: bool = False
    """Every token of the vocabulary."""
    label: bool = False
    """The token that the dataset holds, as column 0."""
    draws: int = 0
    """Tokens drawn per position."""
    importance: bool = True
    """Divide a drawn token's weight by the probability that it was drawn with (the sum is then unbiased). HPD does not."""
    exclude_label: bool = False
    """Draw from the student's distribution with the label removed, instead of ignoring draws that equal the label."""
    share: float = 1.0
    """Share of label positions that get draws at all, in [0, 1]."""
    temperature: float = 1.0
    """Temperature of the draw, > 0; it changes which token is drawn and never the log-probabilities."""

    def __post_init__(self) -> None:
        if self.whole and self.draws:
            raise ValueError("A full support already holds every token: it cannot be joined with draws.")
        if not (self.whole or self.label or self.draws):
            raise ValueError("An empty support: use full(), label(), sampled(n) or a sum of them.")
        if self.draws < 0:
            raise ValueError(f"sampled(n) needs n >= 1, got {self.draws}.")
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share is the part of label positions that get a draw, in [0, 1], got {self.share}.")
        if (self.share < 1.0 or self.exclude_label) and self.draws and not self.label:
            raise ValueError("share and exclude_label speak of the label: use label() + sampled(...).")
        if self.temperature <= 0:
            raise ValueError(f"The draw temperature must be > 0, got {self.temperature}.")

    def __add__(self, other: Support) -> Support:
        if self.draws and other.draws:
            raise ValueError("Two sampled supports cannot be joined: ask for more draws in one.")
        sampler = self if self.draws else other
        return Support(
            whole=self.whole or other.whole,
            label=self.label or other.label,
            draws=sampler.draws,
            importance=sampler.importance,
            exclude_label=sampler.exclude_label,
            share=sampler.share,
            temperature=sampler.temperature,
        )

    def __str__(self) -> str:
        parts = {"label": self.label, f"sampled({self.draws})": self.draws, "full": self.whole}
        return " + ".join(name for name, present in parts.items() if present)

    @property
    def num_uniforms(self) -> int:
        """Uniform numbers used per position: one a draw, and one for the coin when only a share of positions is drawn."""
        return self.draws + (self.share < 1.0) if self.draws else 0

    def draw(
        self,
        student_logprobs: Float[Tensor, "N V"],
        student_probs: Float[Tensor, "N V"],
        labels: Int[Tensor, "N"],
        uniforms: Float[Tensor, "N u"],
    ) -> Draws:
        """Draw from the student; a position without a draw (share, or nothing but the label to draw) repeats the label.

        Args:
            student_logprobs: nats, normalised.
            student_probs: their exponentials, which the caller has anyway.
            uniforms: `num_uniforms` numbers per position in [0, 1), float64.
        """
        probs, target = student_probs, labels[:, None]
        if self.temperature != 1.0:
            probs = torch.softmax(student_logprobs / self.temperature, -1)
        if self.exclude_label:
            probs = probs.scatter(1, target, 0.0)
        tokens = inverse_cdf(probs, uniforms[:, : self.draws])
        mass = probs.gather(1, tokens)
        logprobs = torch.log(mass)
        if self.exclude_label:
            logprobs = logprobs - torch.log(probs.sum(-1, keepdim=True))
        skip = mass <= 0
        if self.share < 1.0:
            skip = skip | (uniforms[:, self.draws, None] >= self.share)
            logprobs = logprobs + math.log(self.share) if self.share else logprobs
        if self.label:
            tokens, logprobs = torch.where(skip, target, tokens), torch.where(skip, 0.0, logprobs)
        return Draws(tokens, logprobs)

    def columns(
        self,
        teacher_logprobs: Float[Tensor, "N V"],
        student_logprobs: Float[Tensor, "N V"],
        labels: Int[Tensor, "N"],
        draws: Draws | None = None,
    ) -> Columns:
        """The support's columns.

        Args:
            teacher_logprobs: nats, normalised over the vocabulary.
            student_logprobs: the same of the student.
            labels: the dataset's tokens.
            draws: as `draw` gives them; needed when the support is sampled. A draw that equals the label has coefficient 0
                beside the label: a token counts once.
        """
        if self.whole and not self.label:
            return Columns(teacher_logprobs, student_logprobs, None, None)
        tokens = labels[:, None] if self.label else labels.new_empty(len(labels), 0)  # [N, 0 or 1]
        coefficients = None
        if self.whole:
            everything = torch.arange(student_logprobs.shape[1], device=labels.device).expand_as(student_logprobs)
            coefficients = torch.cat([torch.ones_like(student_logprobs[:, :1]), everything != tokens], dim=1)
            tokens = torch.cat([tokens, everything], dim=1)  # [N, 1 + V]
        if self.draws:
            assert draws is not None, "a sampled support needs its draws"
            coefficients = self._coefficients(draws, labels)
            tokens = torch.cat([tokens, draws.tokens], dim=1)  # [N, K]
        return Columns(teacher_logprobs.gather(1, tokens), student_logprobs.gather(1, tokens), tokens, coefficients)

    def _coefficients(self, draws: Draws, labels: Tensor) -> Tensor:
        drawn = torch.ones_like(draws.logprobs)
        if self.importance:
            # A token drawn with probability P counts w/P, so that the expectation over the draw is the full sum.
            drawn = torch.exp(-draws.logprobs) / draws.tokens.shape[1]
        if not self.label:
            return drawn
        drawn = drawn * (draws.tokens != labels[:, None])
        return torch.cat([torch.ones_like(drawn[:, :1]), drawn], dim=1)


def full() -> Support:
    """Every token of the vocabulary: the divergence itself, no sampling error."""
    return Support(whole=True)


def label() -> Support:
    """The dataset's token only: one-hot methods (SFT)."""
    return Support(label=True)


def sampled(n: int = 1, **switches: Any) -> Support:
    """`n` tokens drawn from the student at every position; `switches` are the fields of `Support` after `draws`.

    `share` and `exclude_label` speak of the label, so they are given to the union: `Support(label=True, draws=1, share=0.5)`.
    """
    if n < 1:
        raise ValueError(f"sampled(n) needs n >= 1, got {n}.")
    return Support(draws=n, **switches)


def inverse_cdf(probs: Float[Tensor, "N V"], uniforms: Float[Tensor, "N n"]) -> Int[Tensor, "N n"]:
    r"""Tokens drawn from `probs` by inverse CDF on block sums.

    .. math:: a = \min \{ v : \sum_{u \le v} q_u > U \sum_u q_u \}

    One pass sums blocks of the probabilities; the search then reads one block per draw. No random number is made over the
    vocabulary, and the same uniform gives the same token whatever else is in the batch.

    Args:
        probs: non-negative, need not be normalised; a row without any mass gives token 0.
        uniforms: in [0, 1), float64 so that tokens rarer than float32's step can be drawn.
    """
    vocab = probs.shape[1]
    whole = vocab - vocab % _BLOCK_TOKENS
    sums = probs[:, :whole].unflatten(1, (-1, _BLOCK_TOKENS)).sum(-1)  # [N, blocks]
    if whole < vocab:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], dim=1)
    block, rest = _search(sums.double(), uniforms.double())
    tokens = block[..., None] * _BLOCK_TOKENS + torch.arange(_BLOCK_TOKENS, device=probs.device)  # [N, n, block]
    inside = probs.gather(1, tokens.clamp_max(vocab - 1).flatten(1)).view(tokens.shape)
    inside = torch.where(tokens < vocab, inside, 0.0)
    offset, _ = _search(inside.flatten(0, 1).double(), rest.reshape(-1, 1))
    return block * _BLOCK_TOKENS + offset.view_as(block)


def _search(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the mass that each uniform falls in, and how far into that mass it lies, in [0, 1)."""
    cumulative = masses.cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # Rounding can put the target on the last edge: the last index with any mass is meant.
    ranks = torch.arange(masses.shape[-1], device=masses.device)
    index = torch.minimum(index, torch.where(masses > 0, ranks, 0).amax(-1, keepdim=True))
    mass = masses.gather(-1, index)
    start = cumulative.gather(-1, index) - mass
    into = (uniforms * cumulative[:, -1:] - start) / mass.clamp_min(torch.finfo(masses.dtype).tiny)
    return index, into.clamp(0.0, 1.0 - 2.0**-53)
