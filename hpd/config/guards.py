"""Guards of a run: which signs of trouble warn, and which stop it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpd.methods.fields import STRICT, check_fields

__all__ = ["GuardsConfig", "Level", "Thresholds"]

Level = Literal["warn", "stop"]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Values of a metric at which something happens; null: never."""

    __pydantic_config__ = STRICT

    warn: float | None = None
    """Say so, once per crossing."""
    stop: float | None = None
    """Save a checkpoint and end training."""


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """Signs of trouble that are watched, in the metrics of a logging step over all processes; nothing is
    synchronized for them."""

    __pydantic_config__ = STRICT

    length_ratio: Thresholds = Thresholds(warn=2.0)
    """Length inflation: rollouts' mean length over that of the dataset's completions to the same prompts;
    above."""
    truncated: Thresholds = Thresholds(warn=0.5)
    """Share of rollouts that were cut at their limit, in [0, 1]; above."""
    repetition: Thresholds = Thresholds(warn=0.5)
    """Share of 4-grams that a rollout holds already, in [0, 1]; above."""
    entropy: Thresholds = Thresholds(warn=0.1)
    """Entropy collapse: the student's mean entropy as a share of the teacher's on the same tokens (of the
    run's first logged one where the teacher gives too little to know it); below."""
    support_overlap: Thresholds = Thresholds()
    """Share of the student's likeliest tokens that are among the teacher's, in [0, 1]; below. Measured only
    if set: it multiplies both heads on every train.metric_stride-th position once more."""
    overlap_top_k: int = 16
    """Number of likeliest tokens that support_overlap compares."""
    negative_divergence: Thresholds = Thresholds(warn=-1e-3)
    """Lowest KL of the logging step, in nats per token; below. A KL cannot be negative: its arithmetic went
    wrong."""
    non_finite: Literal["off", "warn", "stop", "skip"] = "stop"
    """Response to a loss or gradient that is NaN or infinite. stop and skip look at every step, before the
    optimizer: stop keeps the weights, saves a checkpoint and ends the run; skip leaves the step out. Both
    write the batch to nonfinite/. warn looks at the logged figures only, and so costs no synchronization."""
    max_skipped_steps: int | None = None
    """Steps of the run that skip may leave out before it stops; null: 10."""

    def __post_init__(self) -> None:
        most = self.max_skipped_steps
        check_fields(
            self,
            "guards",
            overlap_top_k=(self.overlap_top_k >= 1, ">= 1"),
            max_skipped_steps=(most is None or most >= 1, ">= 1"),
        )
        if most is not None and self.non_finite != "skip":
            raise ValueError("guards.max_skipped_steps has no effect without guards.non_finite: skip.")

    @property
    def overlap(self) -> bool:
        """True if the overlap is measured."""
        return self.support_overlap != Thresholds()
