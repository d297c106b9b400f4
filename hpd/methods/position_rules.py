"""Rules over positions: a term's weight that differs from token to token of an answer.

A rule gives each label position n a number c_n, a constant for the gradient, which multiplies the term's
weights and its value there. The loss is still divided by the label tokens of the batch, whatever c is: where
c is 0 for half of them, the loss is about half as large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from hpd.methods.fields import STRICT, check_fields
from hpd.methods.schedules import Schedule, as_schedule, value_at

__all__ = ["PositionRule", "as_rule"]

# The numbers of each rule, with what they are where a recipe names none; None: it must be named.
_NUMBERS: dict[str, dict[str, float | None]] = {
    "column": {},
    "first": {"share": None},
    "entropy": {"share": None},
    "drift": {"gain": 1.0},
    "steps": {"epsilon": 1e-3, "limit": 1.5},
}
_MOVING = ("share", "gain")


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    r"""What a token's weight in a term depends on, with the tokens of its row's answer numbered 1 to T.

    * column: the row's number in a column of the dataset, >= 0.
    * first: 1 at the first :math:`\lceil s T \rceil` label tokens, else 0 (s is `share`). Where every term
      asks for it, nothing is computed behind them.
    * entropy: 1 at the :math:`\lceil s T \rceil` label tokens at which the student's entropy is greatest,
      else 0 (TIP).
    * drift: :math:`1 + g\,(1 - \sum_{u<t} |A_u| / \sum_u |A_u|)`, A the label's log p - log q: most where
      the answer has not drifted from the teacher yet (IW-OPD; g is `gain`).
    * steps: :math:`\min((d_1 + \epsilon) / (d_k + \epsilon), limit)` in the k-th stretch of labels (a turn of
      the assistant between answers of a tool), d its mean :math:`|\log q - \log p|` (SOD).

    References:
        Xu et al., TIP, 2026, arXiv 2604.14084; Xie et al., IW-OPD, 2026, arXiv 2606.22600; Zhong et al., SOD,
        2026, arXiv 2605.07725.
    """

    __pydantic_config__ = STRICT

    rule: Literal["column", "first", "entropy", "drift", "steps"]
    """What the weight depends on."""
    column: str | None = None
    """Rule column: its name; one number >= 0 a row."""
    share: float | Schedule | None = None
    """Rules first and entropy: share of a row's label tokens, in (0, 1]; 1 only as the end of a schedule."""
    gain: float | Schedule | None = None
    """Rule drift: what the first token weighs above 1, >= 0; null: 1."""
    epsilon: float | None = None
    """Rule steps: added to both distances, > 0; null: 0.001 nats."""
    limit: float | None = None
    """Rule steps: greatest weight, >= 1; null: 1.5."""

    def __post_init__(self) -> None:
        check_fields(self, "weight")
        for name in _MOVING:
            schedule = getattr(self, name)
            if isinstance(schedule, Schedule) and schedule.schedule in ("adaptive", "skew"):
                raise ValueError(
                    f"weight.{name} may follow training's progress, which a schedule of the kind "
                    f"{schedule.schedule} does not: take constant, linear, cosine or step."
                )
        own = ("column",) if self.rule == "column" else tuple(_NUMBERS[self.rule])
        for name in (f.name for f in fields(self) if f.name != "rule"):
            if name not in own and getattr(self, name) is not None:
                raise ValueError(f"weight.{name} has no effect with rule {self.rule}: remove it.")
        if self.rule == "column" and not self.column:
            raise ValueError("weight.column is missing: the dataset's column that holds each row's weight.")
        for name, default in _NUMBERS[self.rule].items():
            given = getattr(self, name)
            if given is None and default is None:
                raise ValueError(f"weight.{name} is missing: the share of a row's label tokens, in (0, 1].")
            self._check(name, default if given is None else given)

    def _check(self, name: str, value: Any) -> None:
        ends = (value.start, value.end) if isinstance(value, Schedule) else (value,)
        for number in (end for end in ends if end is not None):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"weight.{name} must be a number, got {number!r}.")
            valid, allowed = {
                "share": (0.0 < number <= 1.0, "in (0, 1]"),
                "gain": (number >= 0.0, ">= 0"),
                "epsilon": (number > 0.0, "> 0"),
                "limit": (number >= 1.0, ">= 1"),
            }[name]
            if not valid:
                raise ValueError(f"weight.{name} must be {allowed}, got {number}.")

    def check_effect(self) -> None:
        """Refuse numbers at which every token weighs 1 from the first step to the last.

        Raises:
            ValueError: which one.
        """
        for name, idle in (("share", 1.0), ("gain", 0.0)):
            value = getattr(self, name)
            ends = {value.start, value.at(1.0)} if isinstance(value, Schedule) else {value}
            if ends == {idle}:
                raise ValueError(
                    f"weight.{name}: {idle:g} weighs every token 1, so the rule has no effect: remove "
                    f"weight, or give another {name}."
                )

    def at(self, progress: float) -> PositionRule:
        """This rule at a point of training: every schedule replaced by its value."""
        return replace(self, share=value_at(self.share, progress), gain=value_at(self.gain, progress))

    def number(self, name: str) -> float:
        """The value of one of the rule's numbers, after `at`."""
        given, default = getattr(self, name), _NUMBERS[self.rule][name]
        return float(given if given is not None else default)  # type: ignore[arg-type]

    @property
    def reads_models(self) -> bool:
        """True if the weights depend on what the models say."""
        return self.rule in ("entropy", "drift", "steps")

    @property
    def reads_teacher(self) -> bool:
        """True if the weights depend on what the teacher says."""
        return self.rule in ("drift", "steps")

    def __str__(self) -> str:
        named = {name: getattr(self, name) for name in ("column", *_NUMBERS[self.rule])}
        said = [f"{name} {value}" for name, value in named.items() if value is not None]
        return ", ".join([f"by {self.rule}", *said])


def as_rule(value: Any) -> PositionRule | None:
    """`value` as a rule, if it is one; a mapping with a `rule` key is.

    Raises:
        ValueError: a rule with a field that it does not have.
    """
    if isinstance(value, PositionRule):
        return value
    if not (isinstance(value, Mapping) and "rule" in value):
        return None
    known = [f.name for f in fields(PositionRule)]
    if unknown := sorted(set(value) - set(known)):
        raise ValueError(f"weight has no field {unknown[0]!r}: {', '.join(known)}.")
    plain: dict[str, Any] = {name: as_schedule(given) or given for name, given in value.items()}
    return PositionRule(**plain)
