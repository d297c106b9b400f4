"""What a recipe says about its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DpoStageConfig", "StageConfig"]


@dataclass(frozen=True, kw_only=True)
class DpoStageConfig:
    """A stage of direct preference optimisation by TRL's DPOTrainer."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, when it is there)

    pairs: Literal["rollouts", "data"] = "rollouts"
    """rollouts: the dataset's completion is preferred to one that the student writes when the stage starts. data: the rows have
    the columns prompt, chosen and rejected."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TRL's DPOConfig, such as beta or loss_type; those of `train` that DPOConfig has count too."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of a run: what it changes in the recipe around it. The student is what the stage before leaves."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, when it is there)

    name: str
    """Its folder inside output_dir."""
    repeat: int = 1
    """Run it n times, one after the other (name-1, name-2, ...)."""
    teacher: Any = None
    """Another teacher; "previous": the student that the stage before left (self-distillation in rounds)."""
    method: str | None = None
    """Another method; its own prefixes and strategy then count, unless given here."""
    method_kwargs: Mapping[str, Any] | None = None
    """Parameters of the method."""
    terms: tuple[Any, ...] | None = None
    """Terms instead of a method."""
    prefixes: Mapping[str, Any] | None = None
    """Other prefixes."""
    rollouts: Mapping[str, Any] | None = None
    """Changes of rollouts."""
    strategy: Any = None
    """Another strategy."""
    guards: Mapping[str, Any] | None = None
    """Changes of guards."""
    data: Mapping[str, Any] | None = None
    """Changes of data."""
    train: Mapping[str, Any] | None = None
    """Changes of train."""
    eval: Any = None
    """Changes of eval, or other tasks."""
    dpo: DpoStageConfig | None = None
    """Preference optimisation instead of distillation."""
