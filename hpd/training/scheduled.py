"""Terms whose numbers move during training: built at every step, what they follow kept in the trainer's
state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hpd.methods.schedules import SkewPosition, TaidPosition
from hpd.methods.table import name_terms
from hpd.methods.terms import Term, TermConfig

if TYPE_CHECKING:
    from hpd.training.trainer import DistillTrainer

__all__ = ["ScheduledTerms", "adaptive_positions"]


_STATE_KEY = "hpd_adaptive"


_GAPS = tuple(
    f"gap/{source}/{name}" for source in ("dataset", "student") for name in ("student", "teacher", "rows")
)


class ScheduledTerms(TrainerCallback):
    """Builds the terms of each step, and keeps the adaptive positions in the trainer's state, which
    checkpoints hold."""

    def __init__(self, trainer: DistillTrainer):
        self._trainer = trainer
        self._seen: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, saved in state.stateful_callbacks.get(_STATE_KEY, {}).items():
            self._trainer._adaptive[name].load_state_dict(saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.build_scheduled_terms(state.global_step / max(state.max_steps, 1))
        self._seen = self._totals()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._totals()
        for name, position in self._trainer._adaptive.items():
            term = name.rsplit(".", 1)[0]
            seen = {key: value - self._seen.get(key, 0.0) for key, value in now.items()}
            if isinstance(position, SkewPosition):
                _follow_gap(position, seen, next(t.on for t in self._trainer.terms if t.name == term))
            else:
                loss = seen.get(f"value/{term}", 0.0) / max(seen.get("tokens", 0.0), 1.0)
                position.update(loss, state.global_step / max(state.max_steps, 1))
            state.stateful_callbacks.setdefault(_STATE_KEY, {})[name] = position.state_dict()

    def _totals(self) -> dict[str, float]:
        """Running sums of this window over all processes; read from the device only where a position
        adapts."""
        if not self._trainer._adaptive:
            return {}
        names = [*(f"value/{term.name}" for term in self._trainer.terms), "tokens", *_GAPS]
        return self._trainer.reduce_sums(self._trainer._sums["train"], names)


def _follow_gap(position: SkewPosition, seen: Mapping[str, float], on: str) -> None:
    """Tell an adaptive skew how far apart the labels' mean probabilities were in a step."""
    source = "student" if on == "student" else "dataset"
    rows = seen.get(f"gap/{source}/rows", 0.0)
    if rows:
        student, teacher = (math.exp(seen[f"gap/{source}/{side}"] / rows) for side in ("student", "teacher"))
        position.update(student - teacher if source == "student" else teacher - student)


def adaptive_positions(configs: Sequence[TermConfig | Term]) -> dict[str, TaidPosition | SkewPosition]:
    """Adaptive parameters by "term.parameter"."""
    positions: dict[str, TaidPosition | SkewPosition] = {}
    for term, config in zip(name_terms(configs), configs, strict=True):
        for key, schedule in config.adaptive.items() if isinstance(config, TermConfig) else ():
            assert schedule.end is not None
            kind = SkewPosition if schedule.schedule == "skew" else TaidPosition
            positions[f"{term.name}.{key}"] = kind(schedule.start, schedule.end)
    return positions
