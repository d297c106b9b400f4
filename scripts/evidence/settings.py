"""Everything that decides the numbers of scripts/gpu_evidence.py, and the work that it adds up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from evidence.decoder import Shape

METHODS = ("sft", "masked_sft", "hpd", "forward_kl", "hpd_full")
"""Names of hpd's table of methods."""
WHOLE_VOCABULARY = ("forward_kl", "hpd_full")
TUNING_ORDER = 100
"""Seed of the order of rows while the rate is chosen; that of a main run is its initialization's number."""


class Regime(NamedTuple):
    """How many rows, and how often each is seen."""

    name: str
    rows: int
    epochs: int


_TEACHER = Shape(12, 768, 12)  # 98 M weights
_STUDENT = Shape(6, 512, 8)  # 28 M weights


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale of the experiment."""

    vocab: int = 16_384
    teacher: Shape = _TEACHER
    student: Shape = _STUDENT
    pretrain_batch: int = 256
    pretrain_rate: float = 6e-4
    teacher_steps: int = 3_000
    student_steps: int = 1_500
    """At most: a student's pretraining ends where its KL from the teacher is `student_gap`."""
    student_gap: float = 0.1
    """Forward KL on validation rows, nats per label token."""
    look_every: int = 50
    """Pretraining steps between two looks at the clock, the loss and the gap."""
    initializations: int = 3
    regimes: tuple[Regime, ...] = (Regime("repeated", 500, 20), Regime("single", 10_000, 1))
    batch: int = 25
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    warmup: int = 20
    points: int = 10
    """Looks at the validation rows during a run: the curves."""
    validation: int = 256
    """Held-out rows."""
    problems: int = 256
    """Problems to answer."""
    samples: int = 8
    """Answers to each, where they are sampled."""


FULL = Settings()
TINY = Settings(
    vocab=256,
    teacher=Shape(2, 64, 4),
    student=Shape(1, 32, 2),
    pretrain_batch=16,
    pretrain_rate=3e-3,
    teacher_steps=400,
    student_steps=100,
    look_every=20,
    initializations=2,
    regimes=(Regime("repeated", 20, 8), Regime("single", 160, 1)),
    batch=10,
    rates=(1e-3, 3e-3),
    warmup=2,
    points=2,
    validation=16,
    problems=8,
    samples=2,
)


def petaflops(settings: Settings, tokens: int, labels: float) -> dict[str, float]:
    """Work of each part in 10^15 operations: 6 a weight and token to train, 2 to read.

    Args:
        tokens: of a row, prompt included; every one passes the blocks.
        labels: of a row, on average: only those meet a head.
    """

    def work(shape: Shape, rows: float, factor: int) -> float:
        return factor * rows * (shape.body_weights * tokens + shape.width * settings.vocab * labels) / 1e15

    passes = settings.regimes[0].rows * settings.regimes[0].epochs
    runs = len(METHODS) * len(settings.regimes) * (len(settings.rates) + settings.initializations)
    answers = settings.problems * (1 + 2 * settings.samples)
    main_runs = len(METHODS) * len(settings.regimes) * settings.initializations
    # Beside the student's own six: the product of stored hidden states with the teacher's head.
    teacher_head = 2 * passes * settings.teacher.width * settings.vocab * labels / 1e15
    looks = settings.points * work(settings.student, settings.validation, 2)
    return {
        "teacher": work(settings.teacher, settings.teacher_steps * settings.pretrain_batch, 6),
        "students": settings.initializations
        * work(settings.student, settings.student_steps * settings.pretrain_batch, 6),
        "cache": work(settings.teacher, max(r.rows for r in settings.regimes) + settings.validation, 2),
        "runs": runs * (work(settings.student, passes, 6) + teacher_head + looks)
        + main_runs * work(settings.student, answers, 2),
    }
