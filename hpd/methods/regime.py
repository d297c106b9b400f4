"""The regime of a run: prefixes, rollouts and strategy together, checked against the terms."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from hpd.methods.names import new_name
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.strategy import StrategyConfig, as_strategy
from hpd.methods.supports import has_ratio
from hpd.methods.table import METHODS
from hpd.methods.terms import Term, reads_teacher, sources_used

__all__ = ["Regime", "choose_regime"]


class Regime(NamedTuple):
    """The data regime and the optimization strategy of a run."""

    prefixes: Prefixes
    rollouts: RolloutConfig
    strategy: StrategyConfig

    @property
    def repeats(self) -> bool:
        """True if rows come several times in a row from the dataset."""
        return self.rollouts.num_rollouts > 1 or self.strategy.updates > 1

    @property
    def needs_prompts_only(self) -> bool:
        """True if the student writes every completion, so that no row of the dataset needs one."""
        prefixes = self.prefixes
        whole = prefixes.adaptive is None and prefixes.continue_tokens is None and not prefixes.stored
        return whole and prefixes.student_share(0.0) == prefixes.student_share(1.0) == 1.0

    def runs_teacher(self, terms: Sequence[Term], metrics: bool) -> bool:
        """True if a training step asks the teacher: something reads its answer (a clipped ratio always has
        it computed).

        Args:
            terms: what is learned.
            metrics: figures of both distributions are taken beside the loss.
        """
        return metrics or self.strategy.type == "policy_gradient" or reads_teacher(terms)

    def check_teachers(self, types: Iterable[str]) -> None:
        """Refuse teachers that know the dataset's rows only, where the student writes rows.

        Args:
            types: of the teacher and its parts, as recipes name them.

        Raises:
            ValueError: one of them is cached or routed, and may not be here.
        """
        if not (self.prefixes.on_policy or self.strategy.type == "policy_gradient"):
            return
        for name in types:
            # Rollouts that are stored are rows like others, for a cache; those of several teachers are not.
            if name == "routed" or (name == "cached" and not self.prefixes.stored):
                raise ValueError(
                    f"A teacher of type {name} knows the dataset's rows only, and here the student writes "
                    "rows: use a live teacher or a served one, or prefixes: {dataset: 1} without a policy "
                    "gradient."
                )


def choose_regime(
    method: str | None,
    terms: Sequence[Term],
    prefixes: Prefixes | None = None,
    rollouts: RolloutConfig | None = None,
    strategy: StrategyConfig | str | None = None,
) -> Regime:
    """The choices that are given, and the method's own where none are; checked against the terms.

    Raises:
        ValueError: choices that do not fit together, or have no effect.
    """
    row = METHODS.get(new_name(method or "", quiet=True))
    if prefixes is None:
        prefixes = row.prefixes if row else Prefixes(dataset=1.0)
    given_rollouts = rollouts
    if rollouts is None:
        rollouts = (row.rollouts if row else None) or RolloutConfig()
    if strategy is None and row is not None:
        strategy = row.strategy
    regime = Regime(prefixes, rollouts, as_strategy(strategy))
    if given_rollouts is not None and not prefixes.on_policy:
        raise ValueError(
            "rollouts has no effect where the student writes nothing: set prefixes.student, or remove it."
        )
    _check_sources(regime, terms)
    if prefixes.stored:
        _check_stored(regime, terms)
    _check_strategy(regime, terms)
    _check_positions(regime, terms)
    return regime


def _check_sources(regime: Regime, terms: Sequence[Term]) -> None:
    prefixes = regime.prefixes
    rollouts = regime.rollouts
    used = sources_used(terms)
    only_student = [term.name for term in terms if term.on == "student"]
    if only_student and not (prefixes.on_policy or prefixes.stored):
        raise ValueError(
            f"{', '.join(only_student)} learns from the student's own text, and there is none: set prefixes: "
            f"{{student: 1}}."
        )
    always = prefixes.student_share(0.0) == prefixes.student_share(1.0) == 1.0 and prefixes.adaptive is None
    if always and prefixes.continue_tokens is None and "student" not in used:
        raise ValueError(
            "Every row is the student's, and no term learns from those: set on: both, or lower "
            "prefixes.student."
        )
    if prefixes.continue_tokens is not None and rollouts.truncated == "mask":
        raise ValueError(
            "rollouts.truncated: mask would mask every continuation, since they end after continue_tokens."
        )
    if any(term.support.given for term in terms) and not _draws_plainly(rollouts):
        warnings.warn(
            "rollouts cuts or reshapes the student's distribution, and a rollout support takes its tokens "
            "for plain draws: the gradient is biased. temperature: 1 with top_p: 1, top_k: 0, min_p: 0 is "
            "exact.",
            stacklevel=3,
        )


def _check_stored(regime: Regime, terms: Sequence[Term]) -> None:
    """Refuse stored rollouts whose log-probabilities have no effect, or beside another ratio."""
    if regime.strategy.type == "direct":
        raise ValueError(
            "prefixes.stored reads how likely the writer found each token, for a likelihood ratio: it needs "
            "strategy: policy_gradient, as method: opd has it."
        )
    if regime.rollouts.teacher_share:
        raise ValueError(
            "prefixes.stored takes ratios to the student that wrote the rows, and this method draws from a "
            "mixture with the teacher: take method: opd, or terms of your own."
        )
    if idle := [term.name for term in terms if term.on == "dataset"]:
        raise ValueError(
            f"{', '.join(idle)} learns from the dataset's own text, and with prefixes.stored every row is "
            "the student's: set on: student or both, or remove it."
        )
    if not any(term.support.given or (term.support.label and has_ratio(term.support)) for term in terms):
        raise ValueError(
            "prefixes.stored reads how likely the writer found each token, and no term takes a ratio at the "
            "token that was written: give one of them support: rollout."
        )


def _draws_plainly(rollouts: RolloutConfig) -> bool:
    """True if the student's part of the draw is its own distribution, neither cut nor reshaped."""
    return replace(rollouts, teacher_share=0.0).draws_student_exactly


def _check_strategy(regime: Regime, terms: Sequence[Term]) -> None:
    strategy = regime.strategy
    rollouts = regime.rollouts
    importance = rollouts.replay is not None and rollouts.replay.importance
    if strategy.type == "direct":
        if rollouts.teacher_share:
            raise ValueError(
                "rollouts.teacher_share draws from another distribution than the student's, which only "
                "strategy: policy_gradient corrects for."
            )
        if importance:
            raise ValueError(
                "rollouts.replay.importance is a likelihood ratio: it needs strategy: policy_gradient."
            )
        return
    if importance and rollouts.engine == "vllm" and not rollouts.draws_student_exactly:
        raise ValueError(
            "rollouts.replay.importance compares the student with the one that wrote the text, and vLLM "
            "gives the log-probabilities of the distribution it drew from, cut and reshaped: with vLLM "
            "set temperature: 1, top_p: 1, top_k: 0, min_p: 0 and repetition_penalty: 1, or take engine: "
            "transformers, which gives the student's own."
        )
    if importance and rollouts.teacher_share:
        raise ValueError(
            "rollouts.replay.importance and teacher_share are two ratios at once: choose one of them."
        )
    if rollouts.teacher_share and not _draws_plainly(rollouts):
        # The ratio's denominator is (1 - a) q + a p at the written token: no cut or reshaped q.
        raise ValueError(
            "rollouts.teacher_share is corrected for as a share of plain draws, (1 - a) student + a teacher, "
            "and the student's part is cut or reshaped here: with teacher_share set temperature: 1, top_p: "
            "1, top_k: 0, min_p: 0 and repetition_penalty: 1, or remove teacher_share."
        )
    if not any(has_ratio(term.support) for term in terms):
        raise ValueError(
            "strategy: policy_gradient takes likelihood ratios of single tokens, and every term sums a whole "
            "distribution. Use support: label, sampled, label+sampled or rollout in at least one, or "
            "strategy: direct."
        )
    if softened := [term.name for term in terms if term.temperature != 1.0]:
        raise ValueError(
            f"strategy: policy_gradient is defined at temperature 1, and {', '.join(softened)} is softened."
        )
    if strategy.discount and not any(term.support.given for term in terms):
        raise ValueError(
            "strategy.discount credits later tokens of a rollout: it needs a term with support: rollout."
        )


def _check_positions(regime: Regime, terms: Sequence[Term]) -> None:
    """Refuse rules over positions that have no effect on these rows, or cannot be followed there."""
    columns = sorted({term.positions.column or "" for term in terms if term.positions is not None} - {""})
    if len(columns) > 1:
        raise ValueError(
            f"Terms are weighed by {len(columns)} columns ({', '.join(columns)}), and rows carry one: name "
            "one, or fold them into it."
        )
    if columns and regime.prefixes.on_policy:
        raise ValueError(
            f"weight: the column {columns[0]} is of the dataset's rows, and here the student writes rows: "
            "set prefixes: {dataset: 1}, or take another rule."
        )
    for term in terms:
        if term.positions is None:
            continue
        if term.positions.rule == "steps" and (term.on == "student" or regime.needs_prompts_only):
            raise ValueError(
                f"Term {term.name!r} is weighed by steps, and what the student writes here is one step, "
                "without answers of a tool in between: set on: dataset and prefixes: {dataset: 1} to learn "
                "from recorded agents, or take another rule."
            )
        if term.support.given and regime.strategy.discount:
            raise ValueError(
                f"Term {term.name!r} is weighed {term.positions}, and strategy.discount adds up what later "
                "tokens gain: a weight of theirs would count for this one. Remove one of the two."
            )
