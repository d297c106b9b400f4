"""Guards: signs that training goes wrong, read from the metrics that are logged anyway; they warn, or stop
and save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.config.schema import GuardsConfig, Level, Thresholds
from hpd.losses import Scores, TeacherScores
from hpd.losses.by_source import label_gaps
from hpd.losses.products import logits
from hpd.losses.teacher_side import teacher_logits
from hpd.losses.tile import sum_dtype

__all__ = ["Finding", "check_metrics", "check_overlap", "further_sums", "support_overlap"]

# 1: too large, -1: too small; and how the value is put into words.
_TEXTS = {
    "length_ratio": (1.0, "rollouts are {:.2f} x as long as the data"),
    "truncated": (1.0, "{:.0%} of the rollouts are cut at their limit"),
    "repetition": (1.0, "{:.0%} of the rollouts' 4-grams repeat themselves"),
    "entropy": (-1.0, "the student's entropy is {:.0%} of {}"),
    "support_overlap": (-1.0, "{:.0%} of the student's likeliest tokens are the teacher's"),
    "negative_divergence": (-1.0, "a KL of {:.2e} nats is below zero"),
}


class Finding(NamedTuple):
    """A metric beyond its threshold."""

    guard: str
    level: Level
    text: str


def check_metrics(
    config: GuardsConfig, logs: Mapping[str, float], history: Sequence[Mapping[str, Any]] = ()
) -> list[Finding]:
    """Compare the metrics of a logging step with their thresholds.

    Args:
        config: thresholds.
        logs: metrics of the step, by the names under which they are logged.
        history: the earlier logs of the run; the first is what entropy is compared with where the teacher's
            is not known.
    """
    entropy, of_what = _relative_entropy(logs, history)
    seen = {
        "length_ratio": logs.get("rollouts/length_ratio"),
        "truncated": logs.get("rollouts/truncated"),
        "repetition": logs.get("rollouts/repetition"),
        "entropy": entropy,
        "support_overlap": logs.get("support_overlap"),
        "negative_divergence": min(
            (logs[name] for name in ("forward_kl", "reverse_kl") if name in logs), default=None
        ),
    }
    findings = _non_finite(config, logs)
    for guard, (sign, text) in _TEXTS.items():
        thresholds: Thresholds = getattr(config, guard)
        value = seen[guard]
        if value is None or not math.isfinite(value):
            continue
        levels: tuple[tuple[Level, float | None], ...] = (
            ("stop", thresholds.stop),
            ("warn", thresholds.warn),
        )
        for level, bound in levels:
            if bound is not None and sign * value > sign * bound:
                findings.append(Finding(guard, level, f"{text.format(value, of_what)} (threshold {bound:g})"))
                break
    return findings


def _non_finite(config: GuardsConfig, logs: Mapping[str, float]) -> list[Finding]:
    if config.non_finite == "off":
        return []
    names = [
        n for n in ("loss", "grad_norm", "forward_kl", "reverse_kl") if not math.isfinite(logs.get(n, 0.0))
    ]
    # Under skip, what is left is a figure that no step is made of.
    level: Level = "stop" if config.non_finite == "stop" else "warn"
    return [Finding("non_finite", level, f"{' and '.join(names)} not finite")] if names else []


def _relative_entropy(
    logs: Mapping[str, float], history: Sequence[Mapping[str, Any]]
) -> tuple[float | None, str]:
    """The student's entropy as a share of the teacher's on the same tokens, and what it is a share of.

    A student that learns gets surer, down to where its teacher is: only below that it collapses. A teacher
    that gives a few log-probabilities has no entropy that is known; then the run's first is what there is.
    """
    own = logs.get("student_entropy")
    if (teacher := logs.get("teacher_entropy")) is not None:
        return (own / teacher if own is not None and teacher else None), "the teacher's"
    first = next((log["student_entropy"] for log in history if log.get("student_entropy")), own)
    return (own / first if own is not None and first else None), "what it was at the run's start"


def check_overlap(guards: GuardsConfig, drawn: bool) -> None:
    """Refuse to compare likeliest tokens with those of a teacher known by `drawn` ones.

    Raises:
        ValueError: guards.support_overlap is set.
    """
    if guards.overlap and drawn:
        raise ValueError(
            "guards.support_overlap compares with the teacher's likeliest tokens, and a cache of kind "
            "sampled holds drawn ones: remove it, or write a cache of kind top_k or hidden."
        )


def further_sums(
    guards: GuardsConfig, gaps: bool, student: Scores, teacher: TeacherScores, batch: TokenBatch, stride: int
) -> dict[str, Tensor]:
    """Sums over a batch that adaptive terms (`gaps`) and guards ask for."""
    found: dict[str, Tensor] = {}
    if gaps:
        found.update(label_gaps(student, teacher, batch, stride))
    if guards.overlap:
        shared, count = support_overlap(student, teacher, batch.labels, guards.overlap_top_k, stride)
        found.update({"support_overlap": shared, "overlap_rows": count})
    return found


@torch.no_grad()
def support_overlap(
    student: Scores, teacher: TeacherScores, labels: Tensor, top_k: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Sum over every `stride`-th position of the share of the student's `top_k` tokens among the teacher's,
    and a count."""
    rows = slice(None, None, max(stride, 1))
    vocab = min(student.vocab, teacher.vocab)
    sides = (
        logits(student.at(rows), vocab),
        teacher_logits(teacher.at(rows), labels[rows], vocab, student.hidden),
    )
    of_student, of_teacher = (side.topk(min(top_k, vocab), -1).indices for side in sides)
    shared = (of_student[:, :, None] == of_teacher[:, None, :]).any(-1).to(sum_dtype(labels.device))
    return shared.mean(-1).sum(), shared.new_tensor(float(len(shared)))
