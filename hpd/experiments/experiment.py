"""The experiment file: a question, the grid of runs, their budget, what is tuned, and the tests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from hpd.config.load import lost_keys
from hpd.config.schema import EvalConfig
from hpd.config.yaml_file import parse_yaml, read_text
from hpd.experiments.axes import SEED_AXES, axis_values, check_axes, paths_by_axis, places, seeds_of
from hpd.methods.terms import nearest

__all__ = [
    "Budget",
    "Evaluation",
    "Experiment",
    "Tune",
    "check_evaluation",
    "is_of_validation",
    "load_experiment",
    "put",
    "read_experiment",
    "validation_metrics",
]

_OF_VALIDATION = ("loss", "forward_kl", "reverse_kl", "top1_agreement")
MIN_TUNED_VALUES = 4
MIN_TUNED_FACTOR = 8.0
_STRICT = {"extra": "forbid"}
_STEPS = "train.max_steps"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The amount that every run of the grid may spend on training; evaluation is not counted."""

    __pydantic_config__ = _STRICT

    type: Literal["steps", "label_tokens", "flops", "seconds"]
    """steps: optimizer steps. label_tokens: learned tokens. flops: counted (see `hpd.experiments.budget`).
    seconds: wall-clock."""
    value: float
    """The amount, > 0. All but steps need train.max_steps as a ceiling; schedules then follow the share of
    the budget spent."""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """A setting chosen per variant on validation data, with seeds of its own, before the test grid runs with
    the choice."""

    __pydantic_config__ = _STRICT

    paths: Mapping[str, list[float]]
    """Recipe path -> values that are tried; a learning rate needs at least four over a factor of 8. Several
    paths are tuned in their order: each at the choices of those before it, with those behind it at their
    first value."""
    seeds: list[int]
    """Seeds of the tuning runs; none of them may be a seed of the grid."""
    metric: str = "loss"
    """A figure of the validation rows (loss, forward_kl, reverse_kl, top1_agreement; of several sets
    NAME_loss, ...), or accuracy or another name of evals, measured on the file data.validation."""
    mode: Literal["min", "max"] = "min"
    """min: less of it is better; max: more."""
    per: list[str] | None = None
    """Axes that get a choice of their own; null: every axis that is not repeated over. The other axes stand
    at their first value."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Recipe paths replaced while tuning, such as {train.max_steps: 300}; they go before the axes."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(EvalConfig):
    """One more evaluation of the trained student: a recipe's `eval` under a name of its own."""

    __pydantic_config__ = _STRICT

    name: str
    """The name of the figure in the report, such as sampled_accuracy."""


def _tune_shorthand(value: Any) -> Any:
    """`{train.learning_rate: [...], ...}` is `{paths: {train.learning_rate: [...]}, ...}`."""
    if not isinstance(value, Mapping) or "paths" in value:
        return value
    paths = {key: tried for key, tried in value.items() if "." in str(key)}
    rest = {key: other for key, other in value.items() if key not in paths}
    return {**rest, "paths": paths} if paths else rest


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, and the grid of runs that answers it."""

    __pydantic_config__ = _STRICT

    name: str
    """Title, and the default folder: runs/NAME."""
    question: str = ""
    """The question that it settles; it stands at the top of the report."""
    base: str | Mapping[str, Any]
    """A recipe, the path of one, `demo`, or "package.module:name" of a function that takes a folder for its
    files and returns one."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Recipe paths replaced in the base, such as {train.max_steps: 500}."""
    axes: Mapping[str, list[Any] | Mapping[str, Any]] = field(default_factory=dict)
    """`seed`, or a recipe path -> its values, or {label: value}; or a name of your own -> {label: recipe
    paths that are replaced together}, or labels alone. The grid is their product. `$NAME` in values of the
    recipe stands for a run's label on the axis NAME of your own."""
    paired: list[str] = field(default_factory=list)
    """Axes that repeat every variant as the seed does, such as initializations of student and teacher. Runs
    are paired over them, and means, intervals and tests go over all their combinations."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """One more axis, `variant`: name -> recipe keys that replace the base's."""
    exclude: list[Mapping[str, Any]] = field(default_factory=list)
    """Cells left out: those that match every axis of an entry (a label or a list of labels)."""
    budget: Budget | None = None
    """Equal budget of all runs; null: what the recipes say."""
    tune: Annotated[Tune | None, BeforeValidator(_tune_shorthand)] = None
    """A setting that is chosen per variant before the grid runs."""
    evals: list[Mapping[str, Any]] = field(default_factory=list)
    """Evaluations of the trained student beside the recipe's own: a name, and fields of a recipe's `eval`.
    What is left out or null is as in the base's eval of that task (`hpd.experiments.bases.evaluations`)."""
    own_samples: int = 0
    """Prompts (of the recipe's eval, else of the first of evals) that the trained student continues at
    temperature 1; entropy and KLs are measured there."""
    entropy_tertiles: bool = False
    """Also measure both KLs of the trained student on thirds of the validation positions: those where the
    teacher's entropy is lowest, middle and highest."""
    own_samples_every: int | None = None
    """The same before training and after every n-th step, as a curve of the report; null: after training
    only. Its time counts in a budget of seconds."""
    baseline: str | Mapping[str, str] | None = None
    """The variant that the tests compare with, as the report names it; or {axis: label}: each variant is
    compared with the one that has this label and is otherwise equal to it. null: no tests."""
    metrics: list[str] = field(default_factory=lambda: ["accuracy", "forward_kl"])
    """Figures that are tested; all of them together are one family for the correction."""
    reach: Mapping[str, float] = field(default_factory=dict)
    """Metric of the training log -> level; the report counts the steps to it."""
    output_dir: str | None = None
    """The experiment's folder; null: runs/NAME."""

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def seeds(self) -> list[int]:
        """All seeds of the grid."""
        return seeds_of(self.axes)

    @property
    def repeats(self) -> tuple[str, ...]:
        """The axes that repeat every variant: the seed and those of `paired`."""
        return tuple(axis for axis in self.axes if axis in SEED_AXES or axis in self.paired)


def read_experiment(text: str, overrides: Sequence[str] = ()) -> Experiment:
    """Check the text of an experiment file.

    Raises:
        ValueError: not YAML, unknown keys, or settings that would make the comparison unfair.
    """
    tree = parse_yaml(text, "The experiment", "experiment", "name, base, axes")
    for override in overrides:
        _override(tree, override)
    try:
        experiment = TypeAdapter(Experiment).validate_python(tree)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    _cross_check(experiment)
    return experiment


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """`read_experiment` of a file.

    Raises:
        FileNotFoundError: no such file.
    """
    return read_experiment(read_text(path, "experiment"), overrides)


def check_evaluation(entry: Mapping[str, Any]) -> Evaluation:
    """An entry of `evals` with every field that it needs; null leaves a field at its default.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a wrong type, or no name.
    """
    given = {key: value for key, value in entry.items() if value is not None}
    if "every" in given:
        raise ValueError(
            "evals: every has no effect here, they ask the trained student; set eval.every instead."
        )
    try:
        return TypeAdapter(Evaluation).validate_python(given)
    except ValidationError as error:
        raise ValueError(_explain(error, Evaluation, "evals.")) from None


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b.c` in nested dicts, in place; dicts on the way are made, also in place of null or text.

    Raises:
        ValueError: a list is on the way.
    """
    *parents, last = path.split(".")
    for parent in parents:
        if isinstance(tree.get(parent), (list, tuple)):
            raise ValueError(f"{path!r}: {parent} is a list in the recipe; set it as a whole.")
        if isinstance(tree.get(parent), str) and parent in ("student", "teacher"):
            tree[parent] = {"model": tree[parent]}
        elif not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def change(tree: dict[str, Any], path: str, value: Any) -> None:
    """`put` of a recipe's setting, which takes nothing else from the recipe.

    Raises:
        ValueError: as `put`; or a mapping in place of a section that has more keys.
    """
    if lost := lost_keys(path, tree.get(path), value):
        raise ValueError(lost)
    put(tree, path, value)


def _cross_check(experiment: Experiment) -> None:
    axes = experiment.axes
    tune = experiment.tune
    placed = [experiment.base, experiment.set, axes, experiment.variants]
    check_axes(axes, json.dumps(placed, default=str))
    if experiment.variants and ("method" in axes or "variant" in axes):
        raise ValueError("Give variants or a method axis, not both: a variant names its method.")
    known = [*axes, *(["variant"] if experiment.variants else [])]
    excluded = [axis for rule in experiment.exclude for axis in rule]
    fixed = experiment.baseline if isinstance(experiment.baseline, Mapping) else {}
    for axis in [*excluded, *(tune.per or [] if tune else []), *experiment.paired, *fixed]:
        if axis not in known:
            raise ValueError(
                f"baseline, exclude, paired or tune.per names {axis!r}, which is not an axis. "
                f"{nearest(axis, known)}"
            )
    for axis, label in fixed.items():
        labels = list(axis_values(axes[axis]) if axis in axes else experiment.variants)
        if label not in labels:
            raise ValueError(f"baseline: {label!r} is not a label of {axis}. {nearest(label, labels)}")
    # Files that an entry leaves open come from the base, which is not read yet.
    names = [check_evaluation({"data": "$BASE", **entry}).name for entry in experiment.evals]
    if len(set(names)) < len(names):
        raise ValueError(f"evals: two are called the same: {', '.join(names)}. Give each a name of its own.")
    if experiment.own_samples < 0 or (
        experiment.own_samples_every is not None and experiment.own_samples_every < 1
    ):
        raise ValueError("own_samples must be >= 0, and own_samples_every >= 1 or null.")
    if experiment.own_samples_every is not None and not experiment.own_samples:
        raise ValueError("own_samples_every says how often, and own_samples is 0: say how many prompts.")
    if experiment.budget is not None:
        _check_budget(experiment, experiment.budget)
    if tune is not None:
        _check_tuning(experiment, tune)


def _check_budget(experiment: Experiment, budget: Budget) -> None:
    if budget.value <= 0:
        raise ValueError(f"budget.value must be > 0, got {budget.value:g}.")
    if budget.type != "steps":
        return
    tune = experiment.tune
    settings = {
        "set": places(experiment.set),
        "axes": {path for paths in paths_by_axis(experiment.axes).values() for path in paths},
        "variants": {path for changes in experiment.variants.values() for path in places(changes)},
        "tune": tune.paths if tune else {},
        "tune.set": places(tune.set) if tune else {},
    }
    for key, paths in settings.items():
        if _STEPS in paths:
            raise ValueError(
                f"budget.type steps is {_STEPS} for all runs, and {key} gives another: remove one of the two."
            )


def _check_tuning(experiment: Experiment, tune: Tune) -> None:
    if shared := set(tune.seeds) & set(experiment.seeds):
        raise ValueError(
            f"tune.seeds and the grid share seed {', '.join(map(str, sorted(shared)))}: a rate chosen on a "
            "seed of the test is fitted to it. Use other seeds for tuning."
        )
    if not tune.seeds:
        raise ValueError("tune.seeds is empty: give one or more seeds that the grid does not use.")
    axis_paths = {path for paths in paths_by_axis(experiment.axes).values() for path in paths}
    for path, tried in tune.paths.items():
        values = sorted(set(tried))
        if path in axis_paths:
            raise ValueError(f"{path} is tuned and an axis: remove one.")
        if len(values) < 2:
            raise ValueError(f"tune: {path} needs two or more different values to choose from, got {tried}.")
        if path == "train.learning_rate" and (
            len(values) < MIN_TUNED_VALUES or values[-1] < MIN_TUNED_FACTOR * values[0]
        ):
            raise ValueError(
                f"tune needs at least {MIN_TUNED_VALUES} learning rates over a factor of "
                f"{MIN_TUNED_FACTOR:g} (the rate moves the ranking more than the method does), got {tried}."
            )
    allowed = [
        *_OF_VALIDATION,
        *dict.fromkeys(["accuracy", *(entry["name"] for entry in experiment.evals)]),
    ]
    if tune.metric not in allowed and not is_of_validation(tune.metric):
        raise ValueError(
            f"tune.metric {tune.metric!r} is not measured on validation rows. {nearest(tune.metric, allowed)}"
        )
    higher = not is_of_validation(tune.metric) or tune.metric.endswith("top1_agreement")
    if higher != (tune.mode == "max"):
        raise ValueError(
            f"tune.metric {tune.metric} is better when {'higher' if higher else 'lower'}: set tune.mode "
            "accordingly."
        )


def is_of_validation(metric: str) -> bool:
    """True for a figure of validation rows, of one set or of one of several."""
    return metric in _OF_VALIDATION or metric.endswith(tuple(f"_{name}" for name in _OF_VALIDATION))


def validation_metrics(validation: Any) -> list[str]:
    """What the validation rows of a recipe's `data.validation` measure, by which a setting can be chosen."""
    sets = [f"{name}_" for name in validation] if isinstance(validation, Mapping) else [""]
    return [f"{one}{name}" for one in sets for name in _OF_VALIDATION]


def _override(tree: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"An override is written key=value, got {text!r}.")
    top, _, rest = key.partition(".")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    # Recipe paths hold dots, so below `set`, `axes` and `tune` the rest of the key is one name.
    if rest and (top in ("set", "axes") or rest.startswith("train.")):
        tree[top] = {**(tree.get(top) or {}), rest: parsed}
    elif top == "tune" and rest.startswith("set.") and isinstance(tree.get("tune"), dict):
        tree["tune"]["set"] = {**(tree["tune"].get("set") or {}), rest.removeprefix("set."): parsed}
    else:
        put(tree, key, parsed)


def _explain(error: ValidationError, known_to: type = Experiment, prefix: str = "") -> str:
    lines = []
    known = [f.name for f in dataclasses.fields(known_to)]
    for item in error.errors():
        path = prefix + ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            alone = len(item["loc"]) == 1
            hint = (
                nearest(str(item["loc"][-1]), known) if alone else "See docs/reference/experiment-files.md."
            )
            lines.append(f"unknown key {path!r}; {hint}")
        elif "missing" in item["type"]:
            lines.append(f"{path!r} is missing")
        else:
            lines.append(f"{path!r}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return "The experiment is not valid: " + "; ".join(dict.fromkeys(lines))
