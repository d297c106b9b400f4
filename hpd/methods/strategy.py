"""The optimization strategy: weights that meet the gradient directly, or as advantages of a clipped policy
gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from hpd.methods.fields import STRICT, check_fields

__all__ = ["StrategyConfig", "as_strategy"]


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Optimization strategy; the fields below type are those of policy_gradient."""

    __pydantic_config__ = STRICT

    type: Literal["direct", "policy_gradient"] = "direct"
    """direct: weights times log-likelihood. policy_gradient: weights as advantages of PPO's clipped ratio."""
    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low, in (0, 1]."""
    clip_high: float = 0.2
    """... and below 1 + clip_high, > 0."""
    dual_clip: float | None = None
    """Bound c > 1 of the ratio at negative advantages; null: none."""
    updates: int = 1
    """Optimizer steps on the same rollouts, draws and advantages."""
    mean: Literal["token", "sequence"] = "token"
    """token: every label token counts the same. sequence: every row does."""
    discount: float = 0.0
    """Credit of later tokens, in [0, 1]: the advantage of a token of a `rollout` support is the sum of its
    own and its successors', each step discounted by it. 0: its own only."""
    later_only: bool = False
    """Leave a token's own advantage out (MiniLLM: a full-vocabulary term counts it exactly)."""
    normalize_returns: bool = False
    """Divide the sum by the number of tokens in it (MiniLLM's length normalization)."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "strategy",
            clip_low=(0.0 < self.clip_low <= 1.0, "in (0, 1]"),
            clip_high=(self.clip_high > 0.0, "> 0"),
            dual_clip=(self.dual_clip is None or self.dual_clip > 1.0, "> 1, or null"),
            updates=(self.updates >= 1, ">= 1"),
            discount=(0.0 <= self.discount <= 1.0, "in [0, 1]"),
        )
        if self.type == "direct" and any(getattr(self, f.name) != f.default for f in fields(self)):
            raise ValueError(
                "strategy: direct has no ratio to clip and one update per batch: set type: policy_gradient."
            )
        if self.discount == 0.0 and (self.later_only or self.normalize_returns):
            raise ValueError(
                "strategy.later_only and normalize_returns speak of later tokens: set discount above 0."
            )


def as_strategy(value: StrategyConfig | str | None) -> StrategyConfig:
    """A strategy, or the one of a name with its defaults."""
    if value is None:
        return StrategyConfig()
    if isinstance(value, str):
        return replace(StrategyConfig(), type=value)  # type: ignore[arg-type]
    return value
