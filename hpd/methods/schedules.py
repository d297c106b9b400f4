"""Numbers that change during training: a term's weight, temperature, or any parameter of its objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from hpd.methods.fields import STRICT, check_fields

__all__ = ["Schedule", "SkewPosition", "TaidPosition", "ValidationRamp", "as_schedule", "value_at"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    r"""A number as a function of training progress x in [0, 1].

    constant: start. linear: :math:`s + (e - s)\,x'`. cosine: :math:`s + (e - s)(1 - \cos \pi x') / 2`. step:
    start before `over`, end from there on. adaptive: TAID's rule for a parameter, see `TaidPosition`;
    DistiLLM's for a share of prefixes, see `ValidationRamp`. skew: DistiLLM-2's, see `SkewPosition`. Here
    :math:`x' = \min(x / over, 1)`.

    >>> Schedule(schedule="linear", start=0.0, end=1.0, over=0.5).at(0.25)
    0.5
    """

    __pydantic_config__ = STRICT

    schedule: Literal["constant", "linear", "cosine", "step", "adaptive", "skew"]
    """Shape of the curve."""
    start: float
    """Value at the first step."""
    end: float | None = None
    """Value at the end; null: start."""
    over: float = 1.0
    """Share of training that the change takes, in (0, 1]; for step, when it happens."""

    def __post_init__(self) -> None:
        check_fields(self, "schedule")
        if not 0.0 < self.over <= 1.0:
            raise ValueError(f"A schedule's over is a share of training in (0, 1], got {self.over}.")
        if self.end is None and self.schedule != "constant":
            raise ValueError(f"A {self.schedule} schedule needs end, the value that it goes to.")

    def at(self, progress: float) -> float:
        """The value at `progress` (0 at the first step, 1 after the last)."""
        end = self.start if self.end is None else self.end
        x = min(progress / self.over, 1.0)
        if self.schedule == "step":
            return end if progress >= self.over else self.start
        if self.schedule == "cosine":
            x = (1.0 - math.cos(math.pi * x)) / 2.0
        return self.start if self.schedule in ("constant", "skew") else self.start + (end - self.start) * x


def as_schedule(value: Any) -> Schedule | None:
    """`value` as a schedule, if it is one; a mapping with a `schedule` key is."""
    if isinstance(value, Mapping) and "schedule" in value:
        return _checked(value)
    return value if isinstance(value, Schedule) else None


def _checked(tree: Mapping[str, Any]) -> Schedule:
    """A schedule from plain data; where it stands (kwargs), pydantic has not seen it."""
    shapes = get_args(get_type_hints(Schedule)["schedule"])
    known = {f.name for f in fields(Schedule)}
    numbers = [value for key, value in tree.items() if key != "schedule" and (key, value) != ("end", None)]
    if (
        tree["schedule"] not in shapes
        or set(tree) - known
        or "start" not in tree
        or not all(_is_number(value) for value in numbers)
    ):
        raise ValueError(
            f"A schedule is {{schedule: {', '.join(shapes)}; start: number; end: number; over: share}}, got "
            f"{dict(tree)}."
        )
    return Schedule(**tree)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def value_at(value: Any, progress: float) -> Any:
    """`value` itself, or the value of its schedule."""
    schedule = as_schedule(value)
    return value if schedule is None else schedule.at(progress)


class TaidPosition:
    r"""TAID's position t of the intermediate teacher: faster while the loss falls, never behind the ramp.

    .. math:: m \leftarrow \beta m + (1 - \beta) \frac{J_{n-1} - J_n}{J_{n-1}}, \qquad
              t \leftarrow \min\big(t_{end}, \max(t_{start} + x (t_{end} - t_{start}),\; t + \alpha\,
              \sigma(m) (1 - t))\big)

    with J the term's loss at a step and x the progress of training.

    Args:
        start, end: first and last position, in [0, 1].
        step_size: alpha, the largest move per step as a share of what is left (published: 5e-4).
        momentum: beta of the running relative change (published: 0.99).

    Reference:
        Shing et al., TAID, 2025, arXiv 2501.16937.
    """

    def __init__(self, start: float, end: float, step_size: float = 5e-4, momentum: float = 0.99):
        self.start = start
        self.end = end
        self.step_size = step_size
        self.momentum = momentum
        self.t = start
        self._change = 0.0
        self._previous: float | None = None

    def update(self, loss: float, progress: float) -> float:
        """Take note of a step's loss and return the position for the next step."""
        if self._previous is not None:
            relative = (self._previous - loss) / (self._previous + 1e-15)
            self._change = self.momentum * self._change + (1.0 - self.momentum) * relative
            moved = self.t + self.step_size * (1.0 - self.t) / (1.0 + math.exp(-self._change))
            self.t = min(self.end, max(self.start + progress * (self.end - self.start), moved))
        self._previous = loss
        return self.t

    def state_dict(self) -> dict[str, float | None]:
        """State for a checkpoint."""
        return {"t": self.t, "change": self._change, "previous": self._previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.t = state["t"]
        self._change = state["change"]
        self._previous = state["previous"]


class SkewPosition:
    r"""DistiLLM-2's skew: small where teacher and student are nearer on a step's labels than before.

    .. math:: \alpha \leftarrow \mathrm{clip}\Big(1 - (1 - \alpha_0) \frac{\bar g}{g},\; \alpha_{min},
              \alpha_0\Big), \qquad g = e^{\overline{\log p(y)}} - e^{\overline{\log q(y)}}

    with the gap g of the mean label probabilities at a step (student minus teacher on the student's own text)
    and its mean over all steps so far. The paper takes one gap per row; here it is one per step and writer,
    since the skew is a number of a term.

    Args:
        start: alpha_0, the largest skew (published: 0.1).
        end: the smallest (its code: 0.01).

    Reference:
        Ko et al., DistiLLM-2, 2025, arXiv 2503.07067, section 3.3 and its code.
    """

    def __init__(self, start: float, end: float):
        self.start = start
        self.end = end
        self.t = start
        self._mean = 0.0
        self._count = 0

    def update(self, gap: float) -> float:
        """Take note of a step's gap and return the skew for the next step."""
        self._count += 1
        self._mean += (gap - self._mean) / self._count
        ratio = self._mean / gap if gap != 0.0 else 1.0
        self.t = min(self.start, max(self.end, 1.0 - (1.0 - self.start) * ratio))
        return self.t

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint."""
        return {"t": self.t, "mean": self._mean, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.t = state["t"]
        self._mean = state["mean"]
        self._count = state["count"]


class ValidationRamp:
    r"""DistiLLM's share of student-written rows: it rises by a step whenever the validation loss does.

    .. math:: \phi \leftarrow \min(\phi_{end}, \phi + s), \quad L_{ref} \leftarrow L \qquad \text{if } L \ge
        L_{ref} + \epsilon

    The first loss is the first reference.

    >>> ramp = ValidationRamp(0.0, 1.0, step=0.1, margin=0.1)
    >>> [round(ramp.update(loss), 1) for loss in (2.0, 1.5, 2.05, 2.2, 2.25)]
    [0.0, 0.0, 0.0, 0.1, 0.1]

    Args:
        start, end: first and last share, in [0, 1].
        step: s.
        margin: epsilon, in the loss's unit (published: 0.1).

    Reference:
        Ko et al., DistiLLM, 2024, arXiv 2402.03898, section 3.2 and its code.
    """

    def __init__(self, start: float, end: float, step: float = 0.1, margin: float = 0.1):
        self.end = end
        self.step = step
        self.margin = margin
        self.share = start
        self._reference: float | None = None

    def update(self, loss: float) -> float:
        """Take note of a validation loss and return the share from here on."""
        if self._reference is None:
            self._reference = loss
        elif loss >= self._reference + self.margin:
            self.share = min(self.end, self.share + self.step)
            self._reference = loss
        return self.share

    def state_dict(self) -> dict[str, float | None]:
        """State for a checkpoint."""
        return {"share": self.share, "reference": self._reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.share = state["share"]
        self._reference = state["reference"]
