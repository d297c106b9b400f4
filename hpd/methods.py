"""The table of methods: a name, its terms, where its prefixes come from. Never a subclass, never a branch in the trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from hpd.objectives import OBJECTIVES
from hpd.supports import Support
from hpd.terms import Term

__all__ = ["METHODS", "SUPPORTS", "Method", "TermConfig", "build_terms", "method_terms", "nearest"]


def nearest(name: str, allowed: Sequence[str]) -> str:
    """The end of an error message: what was probably meant, or all that is allowed."""
    close = get_close_matches(name, allowed, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Allowed: {', '.join(allowed)}."


SUPPORTS: dict[str, dict[str, Any]] = {
    "full": {"whole": True},
    "label": {"label": True},
    "label+full": {"label": True, "whole": True},
    "sampled": {"draws": 1},
    "label+sampled": {"label": True, "draws": 1},
}


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One term of the loss, as a recipe writes it."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, when it is there)

    objective: str
    """A name of OBJECTIVES, such as forward_kl, akl, hpd (`hpd methods` lists them)."""
    weight: float = 1.0
    """Factor of this term in the loss."""
    temperature: float = 1.0
    """Softens teacher and student before the objective sees them (no T^2 factor is applied), > 0."""
    support: str | None = None
    """full, label, sampled, label+sampled, or label+full; null: the objective's own (label+sampled for hpd, label for nll,
    label+full for hpd_exact, else full)."""
    num_draws: int = 1
    """Tokens drawn from the student per position; used by sampled supports."""
    draw_share: float = 1.0
    """Share of label positions that get a draw, in [0, 1]."""
    draw_temperature: float = 1.0
    """Temperature of the draw, > 0."""
    exclude_label: bool = False
    """Draw from the student's distribution without the label (the paper's algorithm), instead of ignoring such draws."""
    importance: bool | None = None
    """Divide a drawn token's weight by its probability: unbiased, larger variance; null: yes, except for HPD's own rule."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the objective, such as {mu: 0.5} for akl."""

    def build(self, name: str | None = None) -> Term:
        """The term, checked. Raises ValueError with the reason where the choices do not fit together."""
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Unknown objective {self.objective!r}. {nearest(self.objective, list(OBJECTIVES))}")
        factory = OBJECTIVES[self.objective]
        allowed = list(inspect.signature(factory).parameters)
        for key in self.kwargs:
            if key not in allowed:
                raise ValueError(f"Objective {self.objective!r} has no parameter {key!r}. {nearest(key, allowed)}")
        required = [key for key, p in inspect.signature(factory).parameters.items() if p.default is p.empty]
        if missing := [key for key in required if key not in self.kwargs]:
            raise ValueError(f"Objective {self.objective!r} needs {', '.join(missing)}: give them in kwargs.")
        return Term(
            name or self.objective, factory(**self.kwargs), self.build_support(), self.weight, self.temperature
        ).check()

    def build_support(self) -> Support:
        """The support, with the draw's switches where it has draws."""
        key = (self.support or _OWN_SUPPORTS.get(self.objective, "full")).replace(" ", "")
        if key not in SUPPORTS:
            raise ValueError(f"Unknown support {self.support!r}. {nearest(key, list(SUPPORTS))}")
        spec = dict(SUPPORTS[key])
        if "draws" in spec:
            importance = self.objective not in _OWN_SUPPORTS if self.importance is None else self.importance
            return Support(
                label=spec.get("label", False), draws=self.num_draws, share=self.draw_share,
                temperature=self.draw_temperature, exclude_label=self.exclude_label, importance=importance,
            )  # fmt: skip
        idle = [f.name for f in fields(self) if f.name in _DRAW_FIELDS and getattr(self, f.name) != f.default]
        if idle:
            raise ValueError(
                f"Support {key!r} draws nothing, so {', '.join(idle)} would have no effect. Remove it, or use support: "
                "label+sampled."
            )
        return Support(**spec)


_DRAW_FIELDS = ("num_draws", "draw_share", "draw_temperature", "exclude_label", "importance")
# Objectives that read the label as their first column, and the support that they were defined on.
_OWN_SUPPORTS = {"nll": "label", "hpd": "label+sampled", "hpd_exact": "label+full"}


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
        parameters = set(inspect.signature(OBJECTIVES[term.objective]).parameters)
        used |= (parameters | own) & set(kwargs)
        terms.append(with_parameters(term, kwargs))
        allowed = sorted(parameters | own)
    for key in kwargs:
        if key not in used:
            raise ValueError(f"Method {name!r} has no parameter {key!r}. {nearest(key, allowed)}")
    return tuple(terms)


def with_parameters(term: TermConfig, parameters: Mapping[str, Any]) -> TermConfig:
    """`term` with those of the `parameters` that its objective takes, or that are fields of `TermConfig`, put in."""
    own = inspect.signature(OBJECTIVES[term.objective]).parameters
    inner = {**term.kwargs, **{key: value for key, value in parameters.items() if key in own}}
    outer = {f.name: parameters[f.name] for f in fields(term) if f.name in parameters and f.name not in own}
    return replace(term, kwargs=inner, **outer)


def build_terms(
    method: str | None, method_kwargs: Mapping[str, Any], terms: Sequence[TermConfig | Term]
) -> tuple[Term, ...]:
    """Terms from a method's name or from an explicit list (not both), each under a name of its own."""
    if method is not None and terms:
        raise ValueError("Give method or terms, not both: a method is a ready list of terms.")
    if method is None and not terms:
        raise ValueError(f"Nothing to learn: give method (one of {', '.join(METHODS)}) or terms.")
    if method_kwargs and method is None:
        raise ValueError("method_kwargs are parameters of method; with terms, put them into each term's kwargs.")
    configs = method_terms(method, method_kwargs) if method is not None else terms
    built: list[Term] = []
    for config in configs:
        term = config.check() if isinstance(config, Term) else config.build()
        taken = sum(other.name.split("#")[0] == term.name for other in built)
        built.append(term._replace(name=f"{term.name}#{taken + 1}") if taken else term)
    return tuple(built)
