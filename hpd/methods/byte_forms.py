"""Which terms have a form between two tokenizers (train.vocabulary: bytes), and which methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpd.methods.regime import Regime, choose_regime
from hpd.methods.table import METHODS, name_terms
from hpd.methods.terms import Term, TermConfig

__all__ = [
    "check_byte_forms",
    "check_forms",
    "check_likeliest",
    "check_token_forms",
    "methods_with_byte_forms",
]


def check_token_forms(configs: Sequence[TermConfig | Term]) -> None:
    """Refuse terms that there are between two tokenizers only, where student and teacher have one.

    Raises:
        ValueError: the first such term.
    """
    for term in name_terms(configs):
        if term.support.pairs:
            raise ValueError(
                f"Term {term.name} on {term.support} pairs the tokens of two vocabularies: set "
                "train.vocabulary: bytes, or compare one with itself on support: full."
            )


def check_forms(
    configs: Sequence[TermConfig | Term], regime: Regime, guards: Any, length: str | None
) -> None:
    """`check_byte_forms` between two tokenizers, `check_token_forms` within one.

    Args:
        length: as `train.byte_length`; None: there is one tokenizer.
    """
    if length is None:
        check_token_forms(configs)
    else:
        check_byte_forms(configs, regime, guards, length)


def check_likeliest(configs: Sequence[TermConfig | Term]) -> None:
    """Refuse terms that read more than chunks, where a teacher with another tokenizer is known by its
    likeliest tokens.

    Raises:
        ValueError: the first such term.
    """
    for term in name_terms(configs):
        if term.support.draws or term.support.whole or term.support.pairs:
            raise ValueError(
                f"Term {term.name} on {term.support} reads the teacher's whole next-token distribution, and "
                "this teacher (a cache of kind top_k, or a server without protocol: hpd) tells its likeliest "
                "tokens: between two tokenizers it serves rules on the label (masked_sft, alm, ...). Write "
                "the cache with cache.kind: hidden, or serve the model with hpd serve-teacher."
            )


def check_byte_forms(
    configs: Sequence[TermConfig | Term], regime: Regime, guards: Any = None, length: str | None = None
) -> None:
    """Refuse what a teacher with another tokenizer cannot be asked.

    Args:
        configs: of the terms.
        regime: where rows come from, and how weights meet the gradient.
        guards: a `GuardsConfig`; None: the defaults.
        length: as `train.byte_length`; None: the default.

    Raises:
        ValueError: the first term that has no byte form, and the methods that have one; a guard without one.
    """
    if guards is not None and guards.overlap:
        raise ValueError(
            "guards.support_overlap compares token by token, and train.vocabulary: bytes has two "
            "vocabularies: remove it."
        )
    whole = [term.name for term in name_terms(configs) if term.objective.whole_chunks]
    if whole and length != "product":
        raise ValueError(
            f"Term {whole[0]} compares the probabilities of whole chunks: set train.byte_length: product "
            "(geometric takes their mean over tokens)."
        )
    problem = _problem(configs, regime)
    if problem is not None:
        raise ValueError(
            f"train.vocabulary: bytes: {problem}. Methods that work between two tokenizers: "
            f"{', '.join(methods_with_byte_forms())}."
        )


def methods_with_byte_forms() -> list[str]:
    """Names of METHODS that work between two tokenizers."""
    return [
        name
        for name, method in METHODS.items()
        if _problem(method.terms, choose_regime(name, name_terms(method.terms))) is None
    ]


def _problem(configs: Sequence[TermConfig | Term], regime: Regime) -> str | None:
    if regime.prefixes.on_policy and len({config.on for config in configs}) > 1:
        return (
            "its terms learn from rows of different writers (on: dataset, on: student), and chunks are not "
            "told apart by who wrote them"
        )
    if regime.strategy.type != "direct":
        return f"strategy {regime.strategy.type} takes ratios of single tokens"
    for config, term in zip(configs, name_terms(configs), strict=True):
        if (reason := _without_form(config, term)) is not None:
            return f"term {term.name} on {term.support} has no byte form: {reason}"
    return None


def _without_form(config: TermConfig | Term, term: Term) -> str | None:
    support = term.support
    if term.positions is not None:
        return "a rule over positions counts the tokens of one tokenizer"
    if config.temperature != 1.0:
        return "at a temperature other than 1 a chunk's probability is not that of its tokens"
    if isinstance(config, TermConfig) and any(s.schedule == "skew" for s in config.adaptive.values()):
        return "its skew follows the labels' gap, which is measured token by token"
    if term.objective.domain == "label_and_vocabulary":
        return "it compares every token with the label, and there are only next bytes to compare"
    if support.top_k:
        return "the likeliest tokens of one vocabulary are no tokens of the other"
    if support.draws and not support.label:
        return "draws are compared as events next to the label's chunk (support: label+sampled)"
    if support.draws and (support.importance or support.draws_of == "teacher"):
        return "draws are the student's, and not weighted by their probability"
    return None
