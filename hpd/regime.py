"""How a run is fed and updated: prefixes, rollouts and strategy together, and whether they fit the terms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from hpd.by_source import sources_used
from hpd.methods import METHODS
from hpd.policy_gradient import StrategyConfig, as_strategy, has_ratio
from hpd.prefixes import Prefixes, RolloutConfig
from hpd.terms import Term

__all__ = ["Regime", "RepeatedRows", "choose_regime"]


class Regime(NamedTuple):
    """The data regime and the optimisation strategy of a run."""

    prefixes: Prefixes
    rollouts: RolloutConfig
    strategy: StrategyConfig

    @property
    def repeats(self) -> bool:
        """Whether rows come several times in a row from the dataset."""
        return self.rollouts.num_rollouts > 1 or self.strategy.updates > 1


def choose_regime(
    method: str | None, terms: Sequence[Term], prefixes: Prefixes | None = None, rollouts: RolloutConfig | None = None,
    strategy: StrategyConfig | str | None = None,
) -> Regime:  # fmt: skip
    """What is given, and the method's own where nothing is; checked against the terms.

    Raises:
        ValueError: choices that do not fit together, or have no effect.
    """
    row = METHODS.get(method or "")
    if prefixes is None:
        prefixes = row.prefixes if row else Prefixes(dataset=1.0)
    given_rollouts = rollouts
    if rollouts is None:
        rollouts = (row.rollouts if row else None) or RolloutConfig()
    if strategy is None and row is not None:
        strategy = row.strategy
    regime = Regime(prefixes, rollouts, as_strategy(strategy))
    if given_rollouts is not None and not prefixes.on_policy:
        raise ValueError("rollouts has no effect where the student writes nothing: set prefixes.student, or remove it.")
    _check_sources(regime, terms)
    _check_strategy(regime, terms)
    return regime


def _check_sources(regime: Regime, terms: Sequence[Term]) -> None:
    prefixes, rollouts = regime.prefixes, regime.rollouts
    used = sources_used(terms)
    only_student = [term.name for term in terms if term.on == "student"]
    if only_student and not prefixes.on_policy:
        raise ValueError(
            f"{', '.join(only_student)} learns from the student's own text, and there is none: set prefixes: {{student: 1}}."
        )
    always = prefixes.student_share(0.0) == prefixes.student_share(1.0) == 1.0 and prefixes.adaptive is None
    if always and prefixes.continue_tokens is None and "student" not in used:
        raise ValueError("Every row is the student's, and no term learns from those: set on: both, or lower prefixes.student.")
    if prefixes.continue_tokens is not None and rollouts.truncated == "mask":
        raise ValueError("rollouts.truncated: mask would mask every continuation, since they end after continue_tokens.")
    if any(term.support.given for term in terms) and not rollouts.draws_student_exactly and not rollouts.teacher_share:
        warnings.warn(
            "rollouts cuts or reshapes the student's distribution, and a rollout support takes its tokens for plain draws: the "
            "gradient is biased. temperature: 1 with top_p: 1, top_k: 0, min_p: 0 is exact.",
            stacklevel=3,
        )


def _check_strategy(regime: Regime, terms: Sequence[Term]) -> None:
    strategy, rollouts = regime.strategy, regime.rollouts
    importance = rollouts.replay is not None and rollouts.replay.importance
    if strategy.type == "direct":
        if rollouts.teacher_share:
            raise ValueError(
                "rollouts.teacher_share draws from another distribution than the student's, which only strategy: "
                "policy_gradient corrects for."
            )
        if importance:
            raise ValueError("rollouts.replay.importance is a likelihood ratio: it needs strategy: policy_gradient.")
        return
    if importance and rollouts.teacher_share:
        raise ValueError("rollouts.replay.importance and teacher_share are two ratios at once: choose one of them.")
    if not any(has_ratio(term.support) for term in terms):
        raise ValueError(
            "strategy: policy_gradient takes likelihood ratios of single tokens, and every term sums a whole distribution. "
            "Use support: label, sampled, label+sampled or rollout in at least one, or strategy: direct."
        )
    if softened := [term.name for term in terms if term.temperature != 1.0]:
        raise ValueError(f"strategy: policy_gradient is defined at temperature 1, and {', '.join(softened)} is softened.")
    if strategy.discount and not any(term.support.given for term in terms):
        raise ValueError("strategy.discount credits later tokens of a rollout: it needs a term with support: rollout.")


class RepeatedRows(Sampler[int]):
    """Every row `num_rollouts` times side by side, and the rows of every step `updates` times one after the other.

    Shuffled by (seed, epoch) alone, so that all processes and resumed runs agree. What does not fill a last step is left out.

    >>> list(RepeatedRows(range(5), prompts=2, num_rollouts=2, updates=1, seed=None))
    [0, 0, 1, 1, 2, 2, 3, 3]

    Args:
        rows: the dataset.
        prompts: different rows of one optimiser step, over all processes.
        num_rollouts: times side by side.
        updates: optimiser steps on the same rows.
        seed: of the shuffling; None keeps the dataset's order.
    """

    def __init__(self, rows: Sized, prompts: int, num_rollouts: int, updates: int, seed: int | None):
        self._count, self._prompts, self._seed = len(rows), prompts, seed
        self._num_rollouts, self._updates, self._epoch = num_rollouts, updates, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; called by the Trainer."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count // self._prompts * self._prompts * self._num_rollouts * self._updates

    def __iter__(self) -> Iterator[int]:
        order: Any = range(self._count)
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 0x9E3779B1 % 2**32 + self._epoch)
            order = torch.randperm(self._count, generator=generator).tolist()
        for start in range(0, self._count - self._prompts + 1, self._prompts):
            for _ in range(self._updates):
                for index in order[start : start + self._prompts]:
                    yield from [index] * self._num_rollouts
