"""`Method`: a row of the table of methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.strategy import StrategyConfig
from hpd.methods.terms import TermConfig

__all__ = ["Method", "one_term"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table."""

    summary: str
    """The thing that it learns, in one line."""
    weight: str
    """The weight w(v), in formulas of p (teacher), q (student), y (label), a (draw)."""
    use: str
    """When to choose it."""
    defaults: str
    """Published defaults of its parameters."""
    reference: str
    """Paper, and equation where it has a number."""
    terms: tuple[TermConfig, ...]
    prefixes: Prefixes = Prefixes(dataset=1.0)
    """Where its contexts come from."""
    rollouts: RolloutConfig | None = None
    """Settings of the student's own writing; null: the defaults."""
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """The way its weights meet the gradient."""
    own_prompt: bool = False
    """True if its teacher reads a prompt that the student does not (teacher.prompt, or rows with
    teacher_prompt): without one there is nothing to learn from."""


def one_term(objective: str, **kwargs: Any) -> tuple[TermConfig, ...]:
    """The terms of a method that is one objective with these parameters."""
    return (TermConfig(objective=objective, kwargs=kwargs),)
