"""A teacher that follows the student, told of each step of the optimizer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hpd.teachers import Teacher

__all__ = ["Following"]


class Following(TrainerCallback):
    """Lets a teacher move behind each optimizer step (`Teacher.follow`)."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._teacher.follow()
