"""Terms: an objective on a support with its weight in the loss; as computed, and as a recipe writes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, cast

from hpd.files import import_named
from hpd.methods.fields import STRICT, nearest
from hpd.methods.names import TakesEarlierNames, new_keys, new_name
from hpd.methods.position_rules import PositionRule, as_rule
from hpd.methods.schedules import Schedule, as_schedule, value_at
from hpd.methods.supports import Support
from hpd.objectives import OBJECTIVES, Objective, capped

__all__ = [
    "SUPPORTS",
    "ObjectiveLike",
    "Scalar",
    "Term",
    "TermConfig",
    "as_evaluated",
    "nearest",
    "num_uniforms",
    "parameters_of",
    "sources_used",
    "with_parameters",
]

Scalar = float | Schedule
Source = Literal["both", "dataset", "student"]


class _NameInRecipes:
    """A field's annotation: plain data holds a name there, Python code may give the thing itself."""

    @staticmethod
    def __get_pydantic_core_schema__(source: object, handler: Callable[[type], Any]) -> Any:
        return handler(str)


ObjectiveLike: TypeAlias = str | Objective | Callable[..., Objective]
"""A name of OBJECTIVES; an `Objective`, or a factory of one; or "package.module:name" of either."""

SUPPORTS: dict[str, dict[str, Any]] = {
    "full": {"whole": True},
    "label": {"label": True},
    "label+full": {"label": True, "whole": True},
    "sampled": {"draws": 1},
    "label+sampled": {"label": True, "draws": 1},
    "rollout": {"draws": 1, "given": True, "importance": True},
    "top_k": {"top_k": 1},
    "label+top_k": {"label": True, "top_k": 1},
    "ranks": {"pairs": "ranks"},
    "shared": {"pairs": "shared"},
    "unshared": {"pairs": "unshared"},
}
"""Supports by the names that recipes give them: arguments of `Support`."""

# Supports of objectives that read the label as their first column; the others read every token.
_SUPPORT_OF_DOMAIN = {"label": "label+sampled", "label_and_vocabulary": "label+full"}

# Objectives whose part of each token is least where p = q, so that some tokens serve as well as all.
_PART_BY_PART = ("generalized_jsd", "total_variation")

_SCALARS = ("temperature", "sample_fraction", "draw_temperature")

# Fields of TermConfig and the field of Support that each becomes.
_DRAW_FIELDS = {
    "num_samples": "draws",
    "sample_fraction": "share",
    "draw_temperature": "temperature",
    "draws_of": "draws_of",
    "exclude_label": "exclude_label",
    "importance": "importance",
}
_TOP_K_FIELDS = {"top_k": "top_k", "top_k_of": "top_k_of", "tail": "tail"}


class Term(NamedTuple):
    """One summand of the loss, ready to be computed (no schedule, no names to look up).

    The loss of a position is `weight * sum_k c_k value_k`, its gradient that of `-weight * sum_k c_k w_k log
    q_k`, with the support's coefficients c and both distributions softened by `temperature`. With `positions`
    both are multiplied by the position's number, which whoever computes the loss must be given.
    """

    name: str
    objective: Objective
    support: Support
    weight: float = 1.0
    temperature: float = 1.0
    on: Source = "both"
    positions: PositionRule | None = None

    def check(self) -> Term:
        """Return self, or raise ValueError where the objective does not exist on the support."""
        support, domain = self.support, self.objective.domain
        if self.on not in ("both", "dataset", "student"):
            raise ValueError(f"Term {self.name!r}: on must be both, dataset or student, got {self.on!r}.")
        if support.given and self.on != "student":
            raise ValueError(
                f"Term {self.name!r} reads the tokens that the student wrote, and only its own text has "
                "those: set on: student."
            )
        if self.temperature <= 0:
            raise ValueError(f"Term {self.name!r}: temperature must be > 0, got {self.temperature}.")
        if domain == "label" and (not support.label or support.whole or support.top_k):
            raise ValueError(
                f"Term {self.name!r} reads the label as its first column and draws after it, which {support} "
                "does not give. Use support: label, or label+sampled."
            )
        if self.objective.support == "label" and support.draws:
            raise ValueError(
                f"Term {self.name!r} reads the label alone, and {support} would draw tokens for nothing. Use "
                "support: label."
            )
        if domain == "label_and_vocabulary" and not (support.label and support.whole):
            raise ValueError(
                f"Term {self.name!r} reads the label and every token, not {support}. Use support: label+full."
            )
        if domain == "distribution" and not support.is_distribution:
            raise ValueError(
                f"Term {self.name!r} needs a whole distribution, and {support} is only some of its tokens. "
                "Use support: full, or top_k with tail: bucket or renormalize."
            )
        if support.pairs in ("shared", "unshared") and self.objective.rule not in _PART_BY_PART:
            raise ValueError(
                f"Term {self.name!r} on {support} would be no divergence: these are some of the tokens, and "
                "shrinking the student's mass on them minimizes it. Use an objective whose every part is "
                f"zero at p = q and above zero elsewhere: {', '.join(_PART_BY_PART)}."
            )
        drops = not (support.whole or support.draws or support.is_distribution or support.pairs)
        if domain == "token" and drops and not self.objective.drop_safe:
            raise ValueError(
                f"Term {self.name!r} on {support} is not a divergence: the tail of the vocabulary is "
                "dropped, the sum can go below zero, and shrinking the student's mass on the support "
                "minimizes it. Use support: full, top_k with tail: bucket, or label+sampled (unbiased)."
            )
        return self


@dataclass(frozen=True, kw_only=True)
class TermConfig(metaclass=TakesEarlierNames):
    """One term of the loss, as a recipe writes it."""

    __pydantic_config__ = STRICT

    objective: Annotated[ObjectiveLike, _NameInRecipes]
    """A name of OBJECTIVES, such as forward_kl, akl, hpd (`hpd methods` lists them), or "package.module:name"
    of your own `Objective` or factory of one. In Python the `Objective` or factory itself will do."""
    weight: Scalar | PositionRule = 1.0
    """Factor of this term in the loss: a number, a schedule, or a rule that weighs the tokens of an answer
    differently, such as {rule: first, share: 0.3}."""
    temperature: Scalar = 1.0
    """Softens teacher and student before the objective sees them (no T^2 factor is applied), > 0."""
    on: Source = "both"
    """Whose text the term learns from: the dataset's, the student's own rollouts, or both. (Evaluation reads
    the dataset's rows only, and computes every term there.)"""
    support: str | None = None
    """full, label, sampled, label+sampled, rollout, top_k, label+top_k, or label+full; between two
    tokenizers also ranks, shared or unshared; null: the objective's own (label+sampled for hpd, label+full
    for hpd_expected, label for nll, masked_sft, alm and the label_ rules, else full). rollout: the token that
    the student wrote, as its draw."""
    draws: Literal["sampled", "exact"] = "sampled"
    """exact: HPD's expectation over the draw, on the whole vocabulary (the objective hpd_expected)."""
    num_samples: int = 1
    """Tokens drawn from the student per position; used by sampled supports."""
    sample_fraction: Scalar = 1.0
    """Share of label positions that get a draw, in [0, 1]."""
    draw_temperature: Scalar = 1.0
    """Temperature of the draw, > 0."""
    exclude_label: bool = False
    """Draw from the student's distribution without the label (the paper's algorithm), instead of ignoring
    such draws."""
    importance: bool | None = None
    """Divide a drawn token's weight by its probability: unbiased, larger variance; null: yes, except for
    HPD's own rule."""
    draws_of: Literal["student", "teacher"] = "student"
    """Whose distribution is drawn from."""
    top_k: int | None = None
    """Tokens of a top_k support, required by it."""
    top_k_of: Literal["teacher", "student"] = "teacher"
    """Whose likeliest tokens."""
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"
    """The rest of the vocabulary next to the top-k: one bucket, none of it (the k are renormalized), or
    dropped."""
    cap: float | None = None
    """Most that one token may add to the loss of a position, in nats, > 0; beyond it, it has no gradient of
    its own. For divergences on full and top_k; null: no bound."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the objective, such as {mu: 0.5} for akl. Numbers here and above may be schedules."""

    def __post_init__(self) -> None:
        # In parameters of a method it is plain data still.
        if (rule := as_rule(self.weight)) is not None:
            object.__setattr__(self, "weight", rule)

    @property
    def scheduled(self) -> bool:
        """True if any number changes during training."""
        return self.at(0.0) != self

    def at(self, progress: float, adaptive: Mapping[str, float] | None = None) -> TermConfig:
        """This term at a point of training: every schedule replaced by its value.

        Args:
            progress: share of the training steps that lie behind.
            adaptive: values of the parameters whose schedule is adaptive, by parameter.
        """
        numbers = {name: value_at(getattr(self, name), progress) for name in _SCALARS}
        weight = self.weight
        weight = weight.at(progress) if isinstance(weight, PositionRule) else value_at(weight, progress)
        kwargs = {key: value_at(value, progress) for key, value in self.kwargs.items()}
        return replace(self, weight=weight, **numbers, kwargs={**kwargs, **(adaptive or {})})

    @property
    def adaptive(self) -> dict[str, Schedule]:
        """Parameters of the objective whose schedule follows what is seen in training."""
        schedules = {key: as_schedule(value) for key, value in self.kwargs.items()}
        return {key: s for key, s in schedules.items() if s and s.schedule in ("adaptive", "skew")}

    @property
    def name(self) -> str:
        """The objective's name, for logs and errors."""
        if isinstance(self.objective, str):
            return new_name(self.objective)
        maker = "rule" if isinstance(self.objective, Objective) else "__name__"
        return getattr(self.objective, maker, "") or "objective"

    def build(self, name: str | None = None) -> Term:
        """The term, checked. Raises ValueError with the reason where the choices do not fit together."""
        fixed = self.at(0.0)
        objective = _build_objective(self.objective, self.name, fixed.kwargs)
        if self.draws == "exact":
            if objective.rule != "hpd" or self.support not in (None, "label+full"):
                raise ValueError(
                    f"draws: exact is HPD's expectation on its own support, not {self.name!r} on "
                    f"{self.support!r}."
                )
            objective = OBJECTIVES["hpd_expected"](*objective.arguments)
        support = fixed._build_support(objective)
        name = name or self.name
        if self.cap is not None:
            if not support.is_distribution:
                raise ValueError(
                    f"Term {name!r}: cap bounds what each token adds to a divergence on whole distributions, "
                    f"and {support} is none. Use support: full, or top_k with tail: bucket or renormalize; "
                    "or remove cap."
                )
            objective = capped(objective, self.cap)
        rule = fixed.weight if isinstance(fixed.weight, PositionRule) else None
        weight = 1.0 if rule is not None else fixed.weight
        term = Term(name, objective, support, weight, fixed.temperature, fixed.on, rule)  # type: ignore
        return term.check()

    def _build_support(self, objective: Objective) -> Support:
        """The support, with the draw's switches where it has draws."""
        key = self.support or objective.support or _SUPPORT_OF_DOMAIN.get(objective.domain, "full")
        key = key.replace(" ", "")
        if key not in SUPPORTS:
            raise ValueError(f"Unknown support {self.support!r}. {nearest(key, list(SUPPORTS))}")
        spec = dict(SUPPORTS[key])
        used = {}
        if "draws" in spec and "given" not in spec:
            used = _DRAW_FIELDS
        elif "top_k" in spec:
            used = _TOP_K_FIELDS
        switches = [f for f in fields(self) if f.name in _DRAW_FIELDS | _TOP_K_FIELDS]
        idle = [f.name for f in switches if f.name not in used and getattr(self, f.name) != f.default]
        if idle:
            raise ValueError(
                f"Support {key!r} makes no use of {', '.join(idle)}. Remove it, or choose a support that "
                "does: label+sampled for draws, top_k for the k likeliest tokens."
            )
        spec.update({option: getattr(self, name) for name, option in used.items()})
        if used is _DRAW_FIELDS and self.importance is None:
            spec["importance"] = objective.domain not in _SUPPORT_OF_DOMAIN
        if used is _TOP_K_FIELDS and self.top_k is None:
            raise ValueError("A top_k support needs top_k, the number of tokens.")
        return Support(**spec)


def _factory(objective: ObjectiveLike) -> Callable[..., Objective]:
    """A factory of the objective.

    Raises:
        ValueError: unknown name, a module that cannot be imported, or something that is not an objective.
    """
    found = objective
    if isinstance(objective, str):
        if ":" in objective:
            found = import_named(objective)
        elif new_name(objective) in OBJECTIVES:
            found = OBJECTIVES[new_name(objective)]
        else:
            raise ValueError(f"Unknown objective {objective!r}. {nearest(objective, list(OBJECTIVES))}")
    if isinstance(found, Objective):
        return lambda: found
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"{objective} is a {kind}: give an Objective, or a function that returns one.")
    return cast(Callable[..., Objective], found)


def parameters_of(objective: ObjectiveLike) -> Mapping[str, inspect.Parameter]:
    """Parameters that the objective's factory takes; an `Objective` has none left. Raises as it is built."""
    return inspect.signature(_factory(objective)).parameters


def _build_objective(given: ObjectiveLike, name: str, kwargs: Mapping[str, Any]) -> Objective:
    parameters = parameters_of(given)
    for key in kwargs:
        if key not in parameters:
            raise ValueError(f"Objective {name!r} has no parameter {key!r}. {nearest(key, list(parameters))}")
    required = [key for key, p in parameters.items() if p.default is p.empty]
    if missing := [key for key in required if key not in kwargs]:
        raise ValueError(f"Objective {name!r} needs {', '.join(missing)}: give them in kwargs.")
    # f_divergence takes functions, which a recipe names.
    values = {key: import_named(v) if isinstance(v, str) and ":" in v else v for key, v in kwargs.items()}
    objective = _factory(given)(**values)
    if not isinstance(objective, Objective):
        raise ValueError(f"{name} returned a {type(objective).__name__}, not an hpd.Objective.")
    return objective


def with_parameters(term: TermConfig, parameters: Mapping[str, Any]) -> TermConfig:
    """`term` with those `parameters` put in that its objective takes, or that are fields of `TermConfig`."""
    taken, parameters = parameters_of(term.objective), new_keys(parameters)
    given = {**term.kwargs, **parameters.get("kwargs", {})}
    inner = {**given, **{key: value for key, value in parameters.items() if key in taken}}
    names = {f.name for f in fields(term)} & parameters.keys() - taken.keys() - {"kwargs"}
    outer = {name: _from_plain(parameters[name]) for name in names}
    return replace(term, kwargs=inner, **outer)


def _from_plain(value: Any) -> Any:
    """A rule or schedule of a field, where plain data says one."""
    return as_rule(value) or as_schedule(value) or value


def sources_used(terms: Sequence[Term]) -> set[str]:
    """The writers that any term learns from."""
    return {source for source in ("dataset", "student") if any(term.on in (source, "both") for term in terms)}


def reads_teacher(terms: Sequence[Term]) -> bool:
    """False where every term is plain likelihood of the label, in weights that ask the teacher nothing."""
    return any(
        term.objective.rule != "nll" or (term.positions is not None and term.positions.reads_teacher)
        for term in terms
    )


def num_uniforms(terms: Sequence[Term]) -> int:
    """Uniforms that a position needs."""
    return max((term.support.num_uniforms for term in terms), default=0)


def as_evaluated(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms as they are measured on held-out rows: all of them on the dataset's prefixes.

    The tokens there are not the student's, so a term on its own tokens reads a fresh draw instead.
    """
    return tuple(term._replace(on="both", support=_redrawn(term)) for term in terms)


def _redrawn(term: Term) -> Support:
    return replace(term.support, given=False) if term.support.given else term.support
