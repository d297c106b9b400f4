"""A term: one objective on one support, with its weight in the loss."""

from __future__ import annotations

from typing import NamedTuple

from hpd.objectives import Objective
from hpd.supports import Support

__all__ = ["Term"]


class Term(NamedTuple):
    """One summand of the loss, ready to be computed (no schedule, no names to look up).

    The loss of a position is `weight * sum_k c_k value_k`, its gradient that of `-weight * sum_k c_k w_k log q_k`, with the
    support's coefficients c and both distributions softened by `temperature`.
    """

    name: str
    objective: Objective
    support: Support
    weight: float = 1.0
    temperature: float = 1.0

    def check(self) -> Term:
        """Return self, or raise ValueError where the objective does not exist on the support."""
        support, domain = self.support, self.objective.domain
        if self.temperature <= 0:
            raise ValueError(f"Term {self.name!r}: temperature must be > 0, got {self.temperature}.")
        if domain == "label" and not support.label:
            raise ValueError(
                f"Term {self.name!r} reads the label as its first column, and the support {support} has none. "
                "Use support: label, or label + sampled."
            )
        if domain == "distribution" and not support.whole:
            raise ValueError(
                f"Term {self.name!r} needs a whole distribution, and {support} is only some of its tokens. "
                "Use support: full."
            )
        if domain == "token" and support.label and not support.draws and not self.objective.drop_safe:
            raise ValueError(
                f"Term {self.name!r} on the label alone is not a divergence: the rest of the vocabulary is dropped, and the "
                "minimum is no longer at the teacher. Use support: full, or label + sampled (unbiased)."
            )
        return self
