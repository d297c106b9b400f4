"""Terms whose numbers move during training: built at every step, following what the steps before showed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpd.methods.schedules import SkewPosition, TaidPosition
from hpd.methods.table import name_terms
from hpd.methods.terms import Term, TermConfig

__all__ = ["ScheduledTerms"]

_GAPS = tuple(
    f"gap/{source}/{name}" for source in ("dataset", "student") for name in ("student", "teacher", "rows")
)


class ScheduledTerms:
    """The terms of each step, and the positions of adaptive parameters, by "term.parameter".

    Args:
        configs: as `name_terms` takes them.
    """

    def __init__(self, configs: Sequence[TermConfig | Term]):
        self._configs = {term.name: config for term, config in zip(name_terms(configs), configs, strict=True)}
        self.positions: dict[str, TaidPosition | SkewPosition] = {}
        for name, config in self._configs.items():
            for key, schedule in config.adaptive.items() if isinstance(config, TermConfig) else ():
                assert schedule.end is not None
                kind = SkewPosition if schedule.schedule == "skew" else TaidPosition
                self.positions[f"{name}.{key}"] = kind(schedule.start, schedule.end)

    @property
    def moves(self) -> bool:
        """True if any number changes during training."""
        return any(isinstance(c, TermConfig) and c.scheduled for c in self._configs.values())

    @property
    def reads_gaps(self) -> bool:
        """True if `observe` needs the sums of `label_gaps`."""
        return any(isinstance(position, SkewPosition) for position in self.positions.values())

    @property
    def observed(self) -> list[str]:
        """Names of the sums that `observe` reads; none where no position adapts."""
        return (
            [*(f"value/{name}" for name in self._configs), "tokens", "labels_cut", *_GAPS]
            if self.positions
            else []
        )

    def at(self, progress: float) -> tuple[Term, ...]:
        """The terms where `progress`, a share of the training steps, lies behind."""
        fixed: list[TermConfig | Term] = []
        for name, config in self._configs.items():
            if isinstance(config, TermConfig):
                adaptive = {key: self.positions[f"{name}.{key}"].t for key in config.adaptive}
                config = config.at(progress, adaptive)
            fixed.append(config)
        return name_terms(fixed)

    def observe(self, sums: Mapping[str, float], progress: float) -> None:
        """Move the adaptive positions by a step's sums, over all processes; `progress` counts that step."""
        for name, position in self.positions.items():
            term = name.rsplit(".", 1)[0]
            if isinstance(position, SkewPosition):
                _follow_gap(position, sums, self._configs[term].on)
            else:
                labels = sums.get("tokens", 0.0) + sums.get("labels_cut", 0.0)
                position.update(sums.get(f"value/{term}", 0.0) / max(labels, 1.0), progress)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The positions as a checkpoint holds them; the same on all processes."""
        return {name: dict(position.state_dict()) for name, position in self.positions.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on where `state_dict` was taken."""
        for name, saved in state.items():
            self.positions[name].load_state_dict(saved)


def _follow_gap(position: SkewPosition, sums: Mapping[str, float], on: str) -> None:
    """Tell an adaptive skew how far apart the labels' mean probabilities were in a step."""
    source = "student" if on == "student" else "dataset"
    rows = sums.get(f"gap/{source}/rows", 0.0)
    if rows:
        student, teacher = (math.exp(sums[f"gap/{source}/{side}"] / rows) for side in ("student", "teacher"))
        position.update(student - teacher if source == "student" else teacher - student)
