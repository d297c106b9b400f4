"""What a teacher that is not known whole can serve: reasons against the terms of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpd.config.schema import CacheConfig
from hpd.methods.drawn import label_is_read, why_not_drawn
from hpd.methods.terms import Term, TermConfig

__all__ = ["check_cached_terms", "check_rewritten", "reasons_against", "unread_labels", "why_not_top_k"]

Reason = Callable[[Term], str | None]


def reasons_against(terms: Sequence[Term | TermConfig], reason: Reason) -> list[str]:
    """What `reason` has against each term, at the begin and at the end of its schedules."""
    found = []
    for config in terms:
        ends = [config] if isinstance(config, Term) else [config.at(0.0).build(), config.at(1.0).build()]
        found += [f"term {term.name} {why}" for term in ends if (why := reason(term))]
    return list(dict.fromkeys(found))


def why_not_top_k(term: Term, top_k: int) -> str | None:
    """Why a teacher that is known at its `top_k` likeliest tokens and the label cannot serve a term
    exactly."""
    support = term.support
    if support.whole or support.pairs:
        return "reads every token of the vocabulary"
    if support.draws:
        return (
            "reads tokens that the student draws"
            if support.draws_of == "student"
            else "draws from the whole vocabulary"
        )
    if support.top_k and support.top_k_of == "student":
        return "reads the student's likeliest tokens"
    if support.top_k > top_k:
        return f"reads {support.top_k} tokens"
    if term.temperature != 1.0:
        return f"softens by temperature {term.temperature:g}, which normalizes over the whole vocabulary"
    return None


def unread_labels(about: Mapping[str, Any]) -> int:
    """Labels of an imported cache that are none of its tokens, and that no method may read."""
    imported = about["fingerprint"].get("teacher", {}).get("imported")
    return 0 if imported is None or imported["guesses_labels"] else int(about["labels_outside"])


def check_rewritten(path: Any, about: Mapping[str, Any], config: CacheConfig) -> None:
    """Raise ValueError where a cache does not hold what another one would be written from.

    Args:
        path: of the cache that is read, for the message.
        about: its description.
        config: of the one to write.
    """
    if about["kind"] == "hidden":
        return
    if about["kind"] == "top_k" and config.kind == "top_k":
        if about["top_k"] == config.top_k:
            return
        needs = f"cache.top_k is {config.top_k}, and each position there has {about['top_k']}"
    else:
        needs = f"kind {config.kind} needs hidden states or whole distributions"
    raise ValueError(
        f"The cache {path} is of kind {about['kind']}: {needs}. Write from the teacher, or from a cache of "
        "kind hidden."
    )


def check_cached_terms(path: Any, about: Mapping[str, Any], terms: Sequence[Term | TermConfig]) -> None:
    """Raise ValueError where the loss reads what a cache does not hold.

    Args:
        path: of the cache, for the message.
        about: its description.
        terms: of the loss.
    """
    if about["kind"] == "sampled" and (reasons := reasons_against(terms, why_not_drawn)):
        raise ValueError(
            f"The cache {path} holds tokens drawn from the teacher, which serve what is linear in its "
            f"probabilities: {'; '.join(reasons)}. It serves forward_kl on the whole vocabulary (unbiased) "
            "and methods that read the label alone (exact). Others need a cache of kind hidden or "
            "top_k."
        )
    if about["kind"] == "sampled":
        label_is_read([term if isinstance(term, Term) else term.at(0.0).build() for term in terms])
    unread = unread_labels(about)
    if unread and (reasons := reasons_against(terms, _reads_label)):
        raise ValueError(
            f"The cache {path} was imported, and {unread:,} of its {about['positions']:,} labels are none of "
            f"the {about['top_k']} tokens that the file has: {'; '.join(reasons)}, and the teacher's "
            "log-probability of those is not known. Choose a method on the teacher's top_k or on the whole "
            "vocabulary (forward_kl, or support: top_k), or import again with --guess-labels."
        )


def _reads_label(term: Term) -> str | None:
    # Plain likelihood of the label asks the teacher nothing. A rollout that was stored is its row's label.
    if (term.support.label or term.support.given) and term.objective.rule != "nll":
        return "reads the label"
    if term.positions is not None and term.positions.rule in ("drift", "steps"):
        return f"is weighed {term.positions}, which reads the label"
    return None
