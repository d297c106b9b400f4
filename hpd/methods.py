"""The table of methods: a name, its terms, where its prefixes come from. Never a subclass, never a branch in the trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hpd.terms import Term, TermConfig, nearest, objective_factory, with_parameters

__all__ = ["METHODS", "Method", "build_terms", "choose_terms", "method_terms", "name_terms"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table."""

    summary: str
    """One line for `hpd methods`."""
    terms: tuple[TermConfig, ...]
    reference: str


def _one(objective: str, **kwargs: Any) -> tuple[TermConfig, ...]:
    return (TermConfig(objective=objective, kwargs=kwargs),)


METHODS: dict[str, Method] = {
    "hpd": Method(
        summary="Hybrid Policy Distillation: both KL directions per token, on the label and one student draw",
        terms=_one("hpd"),
        reference="Zhu et al. 2026, arXiv 2604.20244, eq. 11-15",
    ),
    "hpd_exact": Method(
        summary="HPD's expectation over the draw, computed on the whole vocabulary instead of sampled",
        terms=_one("hpd_exact"),
        reference="this project; the expectation of arXiv 2604.20244, eq. 15",
    ),
    "hpd_full": Method(
        summary="HPD's switch at every token of the vocabulary, no label, no draw",
        terms=_one("hpd_full"),
        reference="this project",
    ),
    "sft": Method(
        summary="supervised fine-tuning: the label's negative log-likelihood (the teacher is not used)",
        terms=_one("nll"),
        reference="Kim and Rush 2016, arXiv 1606.07947, when the dataset is the teacher's (sequence-level distillation)",
    ),
    "forward_kl": Method(
        summary="KL(teacher || student): covers every mode of the teacher",
        terms=_one("forward_kl"),
        reference="Hinton et al. 2015, arXiv 1503.02531",
    ),
    "reverse_kl": Method(
        summary="KL(student || teacher): seeks the teacher's modes",
        terms=_one("reverse_kl"),
        reference="Gu et al. 2024, arXiv 2306.08543",
    ),
    "symmetric_kl": Method(
        summary="(1 - lam) forward + lam reverse KL over the whole vocabulary",
        terms=_one("symmetric_kl"),
        reference="Jeffreys 1946; Ko et al. 2024, arXiv 2402.03898",
    ),
    "generalized_jsd": Method(
        summary="generalised Jensen-Shannon divergence; beta 0 is forward KL, 1 is reverse KL",
        terms=_one("generalized_jsd"),
        reference="Agarwal et al. 2024 (GKD), arXiv 2306.13649",
    ),
    "skew_forward_kl": Method(
        summary="forward KL against a student-teacher mixture (DistiLLM)",
        terms=_one("skew_forward_kl"),
        reference="Ko et al. 2024, arXiv 2402.03898",
    ),
    "skew_reverse_kl": Method(
        summary="reverse KL against a student-teacher mixture (DistiLLM)",
        terms=_one("skew_reverse_kl"),
        reference="Ko et al. 2024, arXiv 2402.03898",
    ),
    "js": Method(
        summary="Jensen-Shannon divergence in DistiLLM's parametrisation, teacher's share 1 - lam",
        terms=_one("js", lam=0.5),
        reference="Ko et al. 2024, arXiv 2402.03898",
    ),
    "total_variation": Method(
        summary="half the L1 distance between the distributions",
        terms=_one("total_variation"),
        reference="Wen et al. 2023, arXiv 2307.15190",
    ),
    "abkd": Method(
        summary="alpha-beta divergence: hardness and confidence weighting by two exponents",
        terms=_one("abkd", alpha=0.2, beta=0.7),
        reference="Wang et al. 2025, arXiv 2505.04560",
    ),
    "akl": Method(
        summary="adaptive KL: forward on the teacher's head, reverse on its tail, mixed by the gaps",
        terms=_one("akl"),
        reference="Wu et al. 2025, arXiv 2404.02657",
    ),
    "todi": Method(
        summary="per-token mix of both directions by the log-ratio",
        terms=_one("todi"),
        reference="Jung et al. 2025, arXiv 2505.16297",
    ),
    "taid": Method(
        summary="cross-entropy against a teacher interpolated with the student at t",
        terms=_one("taid", t=0.5),
        reference="Shing et al. 2025, arXiv 2501.16937",
    ),
}


def method_terms(name: str, kwargs: Mapping[str, Any]) -> tuple[TermConfig, ...]:
    """The preset's terms with `kwargs` put in: parameters of the objective, or fields of `TermConfig`.

    Raises:
        ValueError: unknown method, or a key that no term of the method knows.
    """
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. {nearest(name, list(METHODS))}")
    own = {f.name for f in fields(TermConfig)} - {"objective", "kwargs"}
    terms, used = [], set()
    for term in METHODS[name].terms:
        parameters = set(inspect.signature(objective_factory(term.objective)).parameters)
        used |= (parameters | own) & set(kwargs)
        terms.append(with_parameters(term, kwargs))
        allowed = sorted(parameters | own)
    for key in kwargs:
        if key not in used:
            raise ValueError(f"Method {name!r} has no parameter {key!r}. {nearest(key, allowed)}")
    return tuple(terms)


def choose_terms(
    method: str | None, method_kwargs: Mapping[str, Any], terms: Sequence[TermConfig | Term]
) -> tuple[TermConfig | Term, ...]:
    """The terms of a method's name or of an explicit list (not both), checked.

    Raises:
        ValueError: nothing or both given, unknown names, or choices that do not fit together.
    """
    if method is not None and terms:
        raise ValueError("Give method or terms, not both: a method is a ready list of terms.")
    if method is None and not terms:
        raise ValueError(f"Nothing to learn: give method (one of {', '.join(METHODS)}) or terms.")
    if method_kwargs and method is None:
        raise ValueError("method_kwargs are parameters of method; with terms, put them into each term's kwargs.")
    chosen = method_terms(method, method_kwargs) if method is not None else tuple(terms)
    name_terms(chosen)
    return chosen


def name_terms(terms: Sequence[TermConfig | Term]) -> tuple[Term, ...]:
    """The terms built and checked, each under a name of its own."""
    built: list[Term] = []
    for config in terms:
        term = config.check() if isinstance(config, Term) else config.build()
        taken = sum(other.name.split("#")[0] == term.name for other in built)
        built.append(term._replace(name=f"{term.name}#{taken + 1}") if taken else term)
    return tuple(built)


def build_terms(
    method: str | None, method_kwargs: Mapping[str, Any], terms: Sequence[TermConfig | Term] = ()
) -> tuple[Term, ...]:
    """`choose_terms`, built as they are at the start of training."""
    return name_terms(choose_terms(method, method_kwargs, terms))
