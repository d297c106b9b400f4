"""Supports: which tokens of the vocabulary a term sums over, with what coefficients, and the tail's rule.

Axes: N label positions, K columns of the support, V vocabulary.

A support turns the two full distributions at N positions into K columns, in a fixed order: the label first
(where the support has it), then the draws, or the top-k tokens and their tail. Coefficients multiply the
objective's weights and values column by column; they carry the importance weights of drawn tokens and make a
token count once where the label and another column coincide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.methods.columns import (
    EXCLUDED_LOGPROB,
    LOGPROB_FLOOR,
    Columns,
    Draws,
    LogitGradient,
    Tail,
    raise_excluded_,
)
from hpd.methods.sampling import inverse_cdf

__all__ = [
    "EXCLUDED_LOGPROB",
    "LOGPROB_FLOOR",
    "Columns",
    "Draws",
    "LogitGradient",
    "Support",
    "full",
    "has_ratio",
    "label",
    "raise_excluded_",
    "sampled",
    "top_k",
]


Side = Literal["teacher", "student"]
Pairs = Literal["ranks", "shared", "unshared"]


def label() -> Support:
    """The dataset's token only: SFT and the other rules of one token."""
    return Support(label=True)


def top_k(k: int, *, of: Side = "teacher", tail: Tail = "bucket") -> Support:
    """The `k` likeliest tokens of one side, with a stated rule for the rest of the vocabulary."""
    if k < 1:
        raise ValueError(f"top_k(k) needs k >= 1, got {k}.")
    return Support(top_k=k, top_k_of=of, tail=tail)


@dataclass(frozen=True, kw_only=True)
class Support:
    """Tokens that are summed over: one of `full`, `label`, `sampled`, `top_k`, or some joined with `+`."""

    whole: bool = False
    """Every token of the vocabulary."""
    label: bool = False
    """The token that the dataset holds, as column 0."""
    draws: int = 0
    """Tokens drawn per position."""
    draws_of: Side = "student"
    """Whose distribution the draws come from."""
    importance: bool = True
    """Divide a drawn token's weight by the probability that it was drawn with (the sum is then unbiased). HPD
    does not."""
    exclude_label: bool = False
    """Draw from the distribution with the label removed, instead of ignoring draws that equal the label."""
    share: float = 1.0
    """Share of label positions that get draws at all, in [0, 1]."""
    temperature: float = 1.0
    """Temperature of the draw, > 0; it changes which token is drawn and never the log-probabilities."""
    given: bool = False
    """The draw is the token that the row itself holds: the student wrote it. It is handed to the operator as
    a draw."""
    top_k: int = 0
    """The k likeliest tokens."""
    top_k_of: Side = "teacher"
    """Whose likeliest tokens."""
    pairs: Pairs | None = None
    """Tokens of two vocabularies in pairs, where both have read the same text: `ranks` (the i-th likeliest of
    either), `shared` (those of the same bytes), `unshared` (the others, by rank). Between two tokenizers
    only, where `whole` compares next bytes."""
    tail: Tail = "bucket"
    """The rest of the vocabulary next to the top-k: `bucket` (one column that holds all of it), `renormalize`
    (the k columns are normalized among themselves), or `drop` (nothing; no divergence unless the weights do
    not depend on the student)."""

    def __post_init__(self) -> None:
        if self.whole and (self.draws or self.top_k):
            raise ValueError(
                "A full support already holds every token: it cannot be joined with draws or top_k."
            )
        if self.draws and self.top_k:
            raise ValueError(
                "Draws and top_k cannot be joined: a drawn token may be one of the k, and would count twice."
            )
        if self.pairs and (self.whole or self.label or self.draws or self.top_k):
            raise ValueError(
                f"{self.pairs} already pairs two whole vocabularies: it cannot be joined with others."
            )
        if not (self.whole or self.label or self.draws or self.top_k or self.pairs):
            raise ValueError("An empty support: use full(), label(), sampled(n), top_k(k) or a sum of them.")
        if self.given and (
            self.draws != 1 or self.label or self.draws_of != "student" or not self.importance
        ):
            raise ValueError(
                "A rollout's own token is one draw of the student, weighted by 1 / probability, and nothing "
                "else."
            )
        if self.draws < 0 or self.top_k < 0:
            raise ValueError(f"sampled(n) and top_k(n) need n >= 1, got {min(self.draws, self.top_k)}.")
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(
                f"share is the part of label positions that get a draw, in [0, 1], got {self.share}."
            )
        if (self.share < 1.0 or self.exclude_label) and self.draws and not self.label:
            raise ValueError("share and exclude_label speak of the label: use label() + sampled(...).")
        if not self.draws and (self.share < 1.0 or self.exclude_label or self.temperature != 1.0):
            raise ValueError(
                f"share, exclude_label and temperature speak of draws, and {self} draws nothing."
            )
        if self.temperature <= 0:
            raise ValueError(f"The draw temperature must be > 0, got {self.temperature}.")
        for name, value, allowed in (
            ("draws_of", self.draws_of, ("teacher", "student")),
            ("top_k_of", self.top_k_of, ("teacher", "student")),
            ("tail", self.tail, ("drop", "bucket", "renormalize")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if self.pairs not in (None, "ranks", "shared", "unshared"):
            raise ValueError(f"pairs must be ranks, shared or unshared, got {self.pairs!r}.")

    def __add__(self, other: Support) -> Support:
        if (self.whole and other.draws) or (self.draws and other.whole):
            raise ValueError("A full support already holds every token: it cannot be joined with draws.")
        owner, guest = (self, other) if self.draws or self.top_k or self.whole else (other, self)
        if guest.draws or guest.top_k or guest.whole:
            raise ValueError(f"{self} and {other} cannot be joined: only the label joins another support.")
        return replace(owner, label=self.label or other.label)

    def __str__(self) -> str:
        of = "" if self.draws_of == "student" else ", of=teacher"
        parts = {
            "label": self.label,
            "rollout": self.given,
            f"sampled({self.draws}{of})": self.draws and not self.given,
            f"top_k({self.top_k}, of={self.top_k_of}, tail={self.tail})": self.top_k,
            "full": self.whole,
            str(self.pairs): self.pairs,
        }
        return " + ".join(name for name, present in parts.items() if present)

    @property
    def is_distribution(self) -> bool:
        """True if the columns are a normalized distribution."""
        whole = (self.whole and not self.label) or self.pairs == "ranks"
        return whole or (self.top_k > 0 and self.tail != "drop")

    @property
    def draws_student_exactly(self) -> bool:
        """True if every position gets draws from the student's own distribution, unchanged."""
        return (
            bool(self.draws)
            and self.draws_of == "student"
            and not self.exclude_label
            and self.share == self.temperature == 1.0
        )

    @property
    def is_few_tokens(self) -> bool:
        """True if single log-probabilities serve: the label and unmodified draws of the student."""
        if self.whole or self.top_k or self.pairs:
            return False
        return not self.draws or (
            self.draws_of == "student" and self.temperature == 1.0 and not self.exclude_label
        )

    @property
    def num_uniforms(self) -> int:
        """Uniforms used per position: one a draw, and one for the coin that decides if it gets draws."""
        return self.draws + (self.share < 1.0) if self.draws and not self.given else 0

    def draw(
        self,
        logprobs: Float[Tensor, "N V"],
        probs: Float[Tensor, "N V"],
        labels: Int[Tensor, "N"],
        uniforms: Float[Tensor, "N u"],
    ) -> Draws:
        """Draw tokens; a position without a draw (share, or nothing but the label to draw) repeats the label.

        Args:
            logprobs: of the side that is drawn from (`draws_of`), nats, normalized.
            probs: their exponentials, which the caller has anyway.
            labels: the dataset's tokens.
            uniforms: `num_uniforms` numbers per position in [0, 1), float64.
        """
        if self.temperature != 1.0:
            probs = torch.softmax(logprobs / self.temperature, -1)
        if self.exclude_label:
            probs = probs.scatter(1, labels[:, None], 0.0)
            probs = probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
        tokens = inverse_cdf(probs, uniforms[:, : self.draws])
        return self.as_draws(tokens, probs.gather(1, tokens), labels, uniforms)

    def as_draws(
        self,
        tokens: Int[Tensor, "N n"],
        mass: Float[Tensor, "N n"],
        labels: Int[Tensor, "N"],
        uniforms: Float[Tensor, "N u"],
    ) -> Draws:
        """Drawn tokens and their probabilities (`mass`), with the label where nothing is drawn."""
        drawn, skip = torch.log(mass), mass <= 0
        if self.share < 1.0:
            skip = skip | (uniforms[:, self.draws, None] >= self.share)
            drawn = drawn + math.log(self.share) if self.share else drawn
        if self.label:
            tokens, drawn = torch.where(skip, labels[:, None], tokens), torch.where(skip, 0.0, drawn)
        return Draws(tokens, drawn)

    def columns(
        self,
        teacher_logprobs: Float[Tensor, "N V"],
        student_logprobs: Float[Tensor, "N V"],
        labels: Int[Tensor, "N"],
        draws: Draws | None = None,
    ) -> Columns:
        """The support's columns.

        Args:
            teacher_logprobs: nats, normalized over the vocabulary.
            student_logprobs: the same of the student.
            labels: the dataset's tokens.
            draws: as `draw` gives them; needed when the support is sampled. A draw that equals the label has
                coefficient 0 beside the label: a token counts once.
        """
        if self.pairs:
            raise ValueError(f"Support {self.pairs} compares two vocabularies: it needs two tokenizers.")
        if self.is_distribution and self.whole:
            return Columns(teacher_logprobs, student_logprobs, None, None)
        if self.top_k:
            return self._top_columns(teacher_logprobs, student_logprobs, labels)
        if self.whole:
            tokens = labels[:, None]
            everything = torch.arange(student_logprobs.shape[1], device=labels.device).expand_as(
                student_logprobs
            )
            coefficients = torch.cat([torch.ones_like(student_logprobs[:, :1]), everything != tokens], dim=1)
            tokens = torch.cat([tokens, everything], dim=1)  # [N, 1 + V]
            pair = _gather(teacher_logprobs, student_logprobs, tokens)
            # The label counts once: its own column among the others is emptied.
            own = labels[:, None] + 1
            teacher, student = (side.scatter(1, own, LOGPROB_FLOOR) for side in pair)
            return Columns(teacher, student, tokens, coefficients)
        tokens, coefficients = self.token_columns(labels, draws)
        return Columns(*_gather(teacher_logprobs, student_logprobs, tokens), tokens, coefficients)

    def token_columns(
        self, labels: Int[Tensor, "N"], draws: Draws | None = None
    ) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"] | None]:
        """Tokens and coefficients (None: all one) of a support made of the label and draws only."""
        tokens = labels[:, None] if self.label else labels.new_empty(len(labels), 0)  # [N, 0 or 1]
        if not self.draws:
            return tokens, None
        assert draws is not None, "a sampled support needs its draws"
        return torch.cat([tokens, draws.tokens], dim=1), self._coefficients(draws, labels)

    def _top_columns(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Columns:
        ranked = teacher if self.top_k_of == "teacher" else student
        tokens = ranked.topk(min(self.top_k, ranked.shape[1]), -1).indices
        # With every token among the k there is no tail left to treat.
        tail = self.tail if self.top_k < ranked.shape[1] else "drop"
        absent = None
        if self.label:
            # A label that is one of the k counts once: its own column, the first, is emptied.
            absent = (tokens == labels[:, None]).any(-1)
            tokens = torch.cat([labels[:, None], tokens], dim=1)
        columns = list(_gather(teacher, student, tokens))
        if absent is not None:
            for column in columns:
                column[:, 0] = torch.where(absent, LOGPROB_FLOOR, column[:, 0])
        if tail == "renormalize":
            columns = [torch.log_softmax(column, -1).clamp_min(LOGPROB_FLOOR) for column in columns]
        if tail == "bucket":
            sides = zip(columns, (teacher, student), strict=True)
            columns = [torch.cat([column, _log_rest(side, tokens)], dim=1) for column, side in sides]
            raise_excluded_(columns[0][:, -1:])
        coefficients = None
        if absent is not None:
            coefficients = torch.ones_like(columns[1])
            coefficients[:, 0] = torch.where(absent, 0.0, 1.0)
        return Columns(columns[0], columns[1], tokens, coefficients, tail)

    def _coefficients(self, draws: Draws, labels: Tensor) -> Tensor:
        drawn = torch.ones_like(draws.logprobs)
        if self.importance:
            # A token drawn with probability P counts w/P, so that the expectation over the draw is the full
            # sum.
            drawn = torch.exp(-draws.logprobs) / draws.tokens.shape[1]
        if not self.label:
            return drawn
        drawn = drawn * (draws.tokens != labels[:, None])
        return torch.cat([torch.ones_like(drawn[:, :1]), drawn], dim=1)


def _gather(teacher: Tensor, student: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    at_tokens = teacher.gather(1, tokens), student.gather(1, tokens)
    return raise_excluded_(at_tokens[0]), at_tokens[1].clamp_min(LOGPROB_FLOOR)


def _log_rest(logprobs: Float[Tensor, "N V"], tokens: Int[Tensor, "N Kt"]) -> Float[Tensor, "N 1"]:
    """Log-probability of all tokens but these."""
    # Summed: `1 - sum` would lose a tail below the rounding of one.
    rest = torch.logsumexp(logprobs.scatter(1, tokens, -math.inf), -1, keepdim=True)
    return rest.clamp_min(LOGPROB_FLOOR)


def full() -> Support:
    """Every token of the vocabulary: the divergence itself, no sampling error."""
    return Support(whole=True)


def sampled(n: int = 1, *, of: Side = "student", **switches: Any) -> Support:
    """`n` tokens drawn at every position; `switches` are the fields of `Support` about draws.

    `share` and `exclude_label` speak of the label, so they are given to the union: `Support(label=True,
    draws=1, share=0.5)`.
    """
    if n < 1:
        raise ValueError(f"sampled(n) needs n >= 1, got {n}.")
    return Support(draws=n, draws_of=of, **switches)


def has_ratio(support: Support) -> bool:
    """True if the support is a few tokens, each with a likelihood ratio of its own."""
    return not (support.whole or support.top_k or support.pairs)
