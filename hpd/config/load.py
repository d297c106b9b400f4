"""The way from a file or a tree to a checked recipe, with overrides; and the recipes of its stages."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import TypeAdapter

from hpd.config.check import check_recipe, check_tree, hint_at, read_tree, resolve
from hpd.config.data import data_shorthand
from hpd.config.models import model_shorthand, teacher_shorthand
from hpd.config.schema import DpoStageConfig, Recipe, StageConfig
from hpd.config.yaml_file import read_yaml
from hpd.methods.prefixes import RolloutConfig
from hpd.methods.rest import rests_where_equal
from hpd.methods.table import name_terms

__all__ = ["Stage", "handed_on", "is_push_key", "load_recipe", "lost_keys", "stage_recipes"]

_SECTIONS: dict[str, Callable[[Any], Any]] = {
    "student": model_shorthand,
    "teacher": teacher_shorthand,
    "data": data_shorthand,
    **dict.fromkeys(
        ("rollouts", "strategy", "guards", "lora", "train", "generate", "cache"), lambda value: value
    ),
}
"""What loses keys where it is put as a whole -> its short form as a mapping."""

# Parts of a recipe that a stage changes key by key; the others it replaces.
_MERGED = ("rollouts", "guards", "data", "train", "eval", "method_kwargs")

# What another method brings itself, unless the stage gives it too.
_OF_METHOD = {
    "method": None,
    "terms": (),
    "method_kwargs": {},
    "prefixes": None,
    "rollouts": None,
    "strategy": None,
}

# What a stage of preferences does not read, and what it does not read of rollouts.
_NOT_OF_PAIRS = ("teacher", "method", "method_kwargs", "terms", "prefixes", "strategy", "guards")
_ROLLOUTS_OF_PAIRS = (
    "engine",
    "vllm",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "batch_size",
)


class Stage(NamedTuple):
    """A stage, as a run of its own."""

    name: str
    recipe: Recipe
    dpo: DpoStageConfig | None
    rollouts: RolloutConfig
    """How the student writes its side of a pair (`dpo`)."""


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe, and those of its stages.

    Args:
        source: YAML file, or the tree itself.
        overrides: `a.b=c` assignments; the value is read as YAML, or as text where only text will do. A
            section given as a whole replaces the one that is there, with a warning where that takes keys.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: not YAML, unknown key (with the nearest valid one), wrong type, or choices that do not fit
            together.
    """
    tree = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    for override in overrides:
        _override(tree, override)
    recipe = check_tree(tree)
    stage_recipes(recipe)
    return recipe


def lost_keys(path: str, found: Any, value: Any) -> str:
    """What a section loses where it is put as a whole, in a sentence; empty where it loses nothing.

    Args:
        path: where it is put.
        found: what the recipe has there.
        value: what is put there; one of another `type` has nothing in common with what is there.
    """
    if path not in _SECTIONS:
        return ""
    found, new = _SECTIONS[path](found), _SECTIONS[path](value)
    if not (isinstance(new, Mapping) and isinstance(found, Mapping)) or _type(path, new) != _type(
        path, found
    ):
        return ""
    lost = [str(key) for key in found if key not in new and key != "type"]
    names = ", ".join(f"{path}.{key}" for key in new) or "none is given"
    return (
        f"{path} is given as a whole, which takes {', '.join(lost)} from the recipe's {path}. To keep the "
        f"others give keys by their whole names ({names})."
        if lost
        else ""
    )


def _type(path: str, section: Mapping[str, Any]) -> Any:
    return section.get("type", "model" if path == "teacher" else None)


def _override(tree: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"An override is written a.b=c, got {text!r}.")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, list):
            raise ValueError(f"{key!r}: {parent} is a list in the recipe; change its entries there.")
        if isinstance(child, str) and parent in ("student", "teacher"):
            child = (model_shorthand if parent == "student" else teacher_shorthand)(child)
        node[parent] = dict(child) if isinstance(child, Mapping) else {}
        node = node[parent]
    try:
        read = _read_value(key.split("."), value)
    except RecursionError:
        raise ValueError(f"The value of {key} is nested too deeply.") from None
    if lost := lost_keys(key, node.get(last), read):
        warnings.warn(lost, stacklevel=3)
    node[last] = read


def _read_value(key: Sequence[str], text: str) -> Any:
    """The YAML value of a text, or the text itself where the key takes no such value.

    YAML makes a number of a commit and false of no.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    if key[0] == "train":
        # The trainer's fields have types of their own, which read yes and no as well.
        is_word = isinstance(value, bool) and text.strip().lower() not in ("true", "false")
        return text.strip() if is_word else value
    hint = hint_at(key)
    # Lists and null are what they look like; a section's short form is not asked for a number. A mapping is
    # text where nothing else is taken: a prompt is often `Answer: ...` or `{question}`.
    is_scalar = isinstance(value, (bool, int, float, datetime.date))
    only_text = set(get_args(hint) or (hint,)) <= {str, type(None)}
    takes_text = only_text or str in get_args(hint) or get_origin(hint) is Literal
    may_be_text = (takes_text and is_scalar) or (only_text and isinstance(value, dict))
    is_text = may_be_text and not _fits(value, hint) and _fits(text.strip(), hint)
    return text.strip() if is_text else value


def _fits(value: Any, hint: Any) -> bool:
    """True if a field of this type takes the value."""
    try:
        TypeAdapter(hint).validate_python(value)
    except ValueError:  # pydantic's is one
        return False
    return True


def is_push_key(key: str) -> bool:
    """True for a field of `train` about the Hub, which says nothing about what is learned."""
    return key == "push_to_hub" or key.startswith("hub_")


def stage_recipes(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, each resolved and checked.

    Raises:
        ValueError: two stages of one name, a stage that is not a valid recipe (with its name), or a first
            stage without a teacher to follow.
    """
    if not recipe.stages:
        return []
    base = resolve(replace(recipe, stages=()))
    # The run is pushed when all stages are finished; a stage is, if it says so itself.
    base["train"] = {key: value for key, value in base["train"].items() if not is_push_key(key)}
    stages: list[Stage] = []
    student = base["student"]
    for name, stage in _named(recipe.stages):
        tree = _changed(base, stage, student, bool(stages))
        tree["output_dir"] = str(Path(recipe.output_dir) / name)
        try:
            stages.append(_checked(name, stage, tree))
        except ValueError as error:
            raise ValueError(f"stages: {name}: {error}") from None
        student = {
            **base["student"],
            "model": str(handed_on(stages[-1].recipe)),
            "init": "pretrained",
            "revision": None,
            "tokenizer": None,
        }
    names = [stage.name for stage in stages]
    if double := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"stages: each needs a folder of its own, and {', '.join(double)} is named twice.")
    return stages


def _checked(name: str, stage: StageConfig, tree: Mapping[str, Any]) -> Stage:
    """A stage whose recipe has this tree.

    Raises:
        ValueError: what `check_tree` refuses, what such a stage does not read, or a teacher that the student
            is already.
    """
    recipe, rollouts = read_tree(tree), RolloutConfig()
    if stage.dpo is not None:
        _check_pairs(stage, stage.dpo)
        if recipe.rollouts is not None:
            rollouts = RolloutConfig(**{key: getattr(recipe.rollouts, key) for key in _ROLLOUTS_OF_PAIRS})
        recipe = replace(recipe, rollouts=None)
    check_recipe(recipe)
    if stage.teacher == "previous" and rests_where_equal(recipe.choose_terms()):
        what = ", ".join(term.name for term in name_terms(recipe.choose_terms()))
        raise ValueError(
            "teacher: previous teaches nothing here: the student starts as that very model, and where the "
            f"two are equal {what} has no gradient. Take a method or a term that follows the labels "
            "(method: sft, or nll among the terms), or another teacher."
        )
    return Stage(name, recipe, stage.dpo, rollouts)


def _check_pairs(stage: StageConfig, dpo: DpoStageConfig) -> None:
    """Refuse what a stage of preferences says and does not read."""
    idle = [key for key in _NOT_OF_PAIRS if getattr(stage, key) is not None]
    given = stage.rollouts or {}
    if dpo.pairs == "data":
        idle += ["rollouts"] if given else []
    else:
        idle += [f"rollouts.{key}" for key in given if key not in _ROLLOUTS_OF_PAIRS]
    if idle:
        raise ValueError(
            f"a stage of preferences (dpo, pairs: {dpo.pairs}) learns from pairs alone and does not read "
            f"{', '.join(idle)}: remove it."
        )


def handed_on(recipe: Recipe) -> Path:
    """The folder where the next stage finds a whole model: an adapter is merged into its base for it."""
    return Path(recipe.output_dir) / "merged" if recipe.lora else Path(recipe.output_dir)


def _named(stages: Sequence[StageConfig]) -> Iterator[tuple[str, StageConfig]]:
    """Every stage as often as it is repeated, with the name of its folder."""
    for stage in stages:
        for number in range(1, stage.repeat + 1):
            yield (stage.name if stage.repeat == 1 else f"{stage.name}-{number}"), stage


def _changed(
    base: Mapping[str, Any], stage: StageConfig, student: Mapping[str, Any], has_previous: bool
) -> dict[str, Any]:
    """The recipe's tree with a stage's changes and the student that it starts from."""
    tree = {**base, "student": dict(student)}
    if stage.method is not None or stage.terms is not None:
        tree |= _OF_METHOD
    for key in ("method", "terms", "prefixes", "strategy", *_MERGED):
        change = getattr(stage, key)
        if change is None:
            continue
        if key == "train" and (pushes := [name for name in change if is_push_key(name)]):
            raise ValueError(
                f"train.{pushes[0]} belongs in the recipe's own train: what is pushed is the run's student, "
                "when its stages are finished."
            )
        old = tree[key]
        merges = key in _MERGED and isinstance(old, Mapping) and isinstance(change, Mapping)
        tree[key] = {**old, **change} if merges else change
    if stage.teacher == "previous":
        if not has_previous:
            raise ValueError(
                f"stages: {stage.name}: there is no stage before the first: teacher: previous needs one."
            )
        read_alike = ("model", "tokenizer", "attn_implementation", "trust_remote_code", "allow_pickle")
        tree["teacher"] = {"type": "model", **{key: student[key] for key in read_alike}}
    elif stage.teacher is not None:
        tree["teacher"] = stage.teacher
    return tree
