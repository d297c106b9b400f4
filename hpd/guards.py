"""Guards: signs that training goes wrong, read from the metrics that are logged anyway; they warn, or stop and save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hpd.by_source import teacher_logits
from hpd.losses import Scores, TeacherScores
from hpd.losses.reference import logits

__all__ = ["Finding", "GuardsConfig", "Thresholds", "check_metrics", "support_overlap"]

Level = Literal["warn", "stop"]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """At which value of a metric something happens; null: never."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 (read by pydantic, when it is there)

    warn: float | None = None
    """Say so, once per crossing."""
    stop: float | None = None
    """Save a checkpoint and end training."""


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """What is watched. Metrics are those of a logging step, over all processes; nothing is synchronised for them."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 (read by pydantic, when it is there)

    length_ratio: Thresholds = Thresholds(warn=2.0)
    """Length inflation: rollouts' mean length over that of the dataset's completions to the same prompts; above."""
    truncated: Thresholds = Thresholds(warn=0.5)
    """Share of rollouts that were cut at their limit, in [0, 1]; above."""
    repetition: Thresholds = Thresholds(warn=0.5)
    """Share of 4-grams that a rollout holds already, in [0, 1]; above."""
    entropy: Thresholds = Thresholds(warn=0.1)
    """Entropy collapse: the student's mean entropy as a share of the run's first logged one; below."""
    support_overlap: Thresholds = Thresholds()
    """Share of the student's likeliest tokens that are among the teacher's, in [0, 1]; below. Measured only if set: it
    multiplies both heads on every train.metric_stride-th position once more."""
    overlap_top_k: int = 16
    """How many likeliest tokens support_overlap compares."""
    negative_divergence: Thresholds = Thresholds(warn=-1e-3)
    """Lowest KL of the logging step, in nats per token; below. A KL cannot be negative: its arithmetic went wrong."""
    non_finite: Literal["off", "warn", "stop", "skip"] = "stop"
    """What a loss or gradient that is NaN or infinite does. stop and skip look at every step, before the optimiser: stop keeps
    the weights, saves a checkpoint and ends the run; skip leaves the step out. Both write the batch to nonfinite/. warn looks
    at the logged figures only, and so costs no synchronisation."""
    max_skipped_steps: int | None = None
    """How many steps of the run skip may leave out before it stops; null: 10."""

    def __post_init__(self) -> None:
        if self.overlap_top_k < 1:
            raise ValueError(f"guards.overlap_top_k must be >= 1, got {self.overlap_top_k}.")
        if self.max_skipped_steps is not None and self.non_finite != "skip":
            raise ValueError("guards.max_skipped_steps has no effect without guards.non_finite: skip.")
        if self.max_skipped_steps is not None and self.max_skipped_steps < 1:
            raise ValueError(f"guards.max_skipped_steps must be >= 1, got {self.max_skipped_steps}.")

    @property
    def overlap(self) -> bool:
        """Whether the overlap is measured."""
        return self.support_overlap != Thresholds()


class Finding(NamedTuple):
    """A metric beyond its threshold."""

    guard: str
    level: Level
    text: str


def check_metrics(config: GuardsConfig, logs: Mapping[str, float], history: Sequence[Mapping[str, Any]] = ()) -> list[Finding]:
    """What the metrics of a logging step show.

    Args:
        config: thresholds.
        logs: metrics of the step, by the names under which they are logged.
        history: the earlier logs of the run; the first is what entropy is compared with.
    """
    findings = _non_finite(config, logs)
    first = next((log["student_entropy"] for log in history if log.get("student_entropy")), logs.get("student_entropy"))
    kls = [logs[name] for name in ("forward_kl", "reverse_kl") if name in logs]
    above = {
        "length_ratio": (config.length_ratio, logs.get("rollouts/length_ratio"), "rollouts are {:.2f} x as long as the data"),
        "truncated": (config.truncated, logs.get("rollouts/truncated"), "{:.0%} of the rollouts are cut at their limit"),
        "repetition": (config.repetition, logs.get("rollouts/repetition"), "{:.0%} of the rollouts' 4-grams repeat themselves"),
    }
    below = {
        "entropy": (config.entropy, _share(logs.get("student_entropy"), first), "entropy fell to {:.0%} of what it was"),
        "support_overlap": (
            config.support_overlap, logs.get("support_overlap"), "{:.0%} of the student's likeliest tokens are the teacher's",
        ),
        "negative_divergence": (config.negative_divergence, min(kls, default=None), "a KL of {:.2e} nats is below zero"),
    }  # fmt: skip
    for sign, table in ((1.0, above), (-1.0, below)):
        for guard, (thresholds, value, text) in table.items():
            if value is None or not math.isfinite(value):
                continue
            for level, bound in (("stop", thresholds.stop), ("warn", thresholds.warn)):
                if bound is not None and sign * value > sign * bound:
                    findings.append(Finding(guard, level, f"{text.format(value)} (threshold {bound:g})"))  # type: ignore[arg-type]
                    break
    return findings


def _non_finite(config: GuardsConfig, logs: Mapping[str, float]) -> list[Finding]:
    if config.non_finite == "off":
        return []
    names = [n for n in ("loss", "grad_norm", "forward_kl", "reverse_kl") if not math.isfinite(logs.get(n, 0.0))]
    # Under skip, what is left is a figure that no step is made of.
    level: Level = "stop" if config.non_finite == "stop" else "warn"
    return [Finding("non_finite", level, f"{' and '.join(names)} not finite")] if names else []


def _share(value: float | None, first: float | None) -> float | None:
    return value / first if value is not None and first else None


@torch.no_grad()
def support_overlap(student: Scores, teacher: TeacherScores, labels: Tensor, top_k: int, stride: int) -> tuple[Tensor, Tensor]:
    """Sum over every `stride`-th position of the share of the student's `top_k` tokens among the teacher's, and a count."""
    rows = slice(None, None, max(stride, 1))
    vocab = min(student.vocab, teacher.vocab)
    sides = (
        logits(student.at(rows), vocab),
        teacher_logits(teacher.at(rows), labels[rows], vocab, student.hidden),
    )
    mine, theirs = (side.topk(min(top_k, vocab), -1).indices for side in sides)
    shared = (mine[:, :, None] == theirs[:, None, :]).any(-1).to(torch.float64 if mine.device.type != "mps" else torch.float32)
    return shared.mean(-1).sum(), shared.new_tensor(float(len(shared)))
