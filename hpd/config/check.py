"""The recipe: everything that a run is, as one tree of frozen dataclasses. Loading, overrides and
cross-checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hpd.config.models import ModelConfig, TeacherConfig, check_served
from hpd.config.schema import (
    CacheConfig,
    DataConfig,
    DpoStageConfig,
    EvalConfig,
    GenerateConfig,
    GuardsConfig,
    LoraConfig,
    Recipe,
    StageConfig,
    Thresholds,
    check_generate,
)
from hpd.config.secrets import check_no_secrets, redact_tree
from hpd.config.yaml_file import shorten
from hpd.methods.prefixes import Prefixes, ReplayConfig, RolloutConfig
from hpd.methods.strategy import StrategyConfig
from hpd.methods.terms import TermConfig

__all__ = ["check_answers_anything", "check_teacher", "check_tree", "resolve"]


def check_tree(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, checked. Raises ValueError as `load_recipe`."""
    try:
        recipe = TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    check_no_secrets(resolve(recipe, redacted=False))
    if recipe.teacher.type == "cached" and recipe.teacher.path is None and recipe.cache is not None:
        recipe = dataclasses.replace(
            recipe, teacher=dataclasses.replace(recipe.teacher, path=recipe.cache.path)
        )
    _cross_check(recipe)
    return recipe


def resolve(recipe: Recipe, redacted: bool = True) -> dict[str, Any]:
    """The recipe with every default written out, as plain data for YAML.

    Args:
        redacted: replace secrets, which a recipe that was built in Python may hold (`load_recipe` refuses
            them).
    """
    tree = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return redact_tree(tree) if redacted else tree


def _explain(error: ValidationError) -> str:
    """One line per mistake: path, what was given, what is allowed."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            allowed = _keys_at(item["loc"][:-1])
            close = get_close_matches(str(item["loc"][-1]), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}."
            lines.append(f"unknown key {path!r}; {hint}")
        elif item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            lines.append(f"{path!r} is missing")
        else:
            lines.append(f"{path!r}: {item['msg'][0].lower()}{item['msg'][1:]}, got {shorten(item['input'])}")
    return "The recipe is not valid: " + "; ".join(dict.fromkeys(lines))


def _keys_at(location: Sequence[int | str]) -> list[str]:
    classes = {
        "student": ModelConfig,
        "teacher": TeacherConfig,
        "data": DataConfig,
        "lora": LoraConfig,
        "eval": EvalConfig,
        "terms": TermConfig,
        "replay": ReplayConfig,
        "prefixes": Prefixes,
        "rollouts": RolloutConfig,
        "strategy": StrategyConfig,
        "guards": GuardsConfig,
        "dpo": DpoStageConfig,
        "stages": StageConfig,
        "generate": GenerateConfig,
        "cache": CacheConfig,
    }
    if "guards" in location and location[-1] != "guards":
        return [f.name for f in dataclasses.fields(Thresholds)]
    owner = next((classes[part] for part in location if part in classes), Recipe)
    return [f.name for f in dataclasses.fields(owner)]


def _cross_check(recipe: Recipe) -> None:
    """Choices that cannot go together, found before anything is loaded."""
    recipe.choose_terms()
    regime = recipe.choose_regime()
    if recipe.stages:
        from hpd.config.load import stage_recipes

        stage_recipes(recipe)
    data = recipe.data
    named = {"student.model": recipe.student.model, "data.path": data.path, "output_dir": recipe.output_dir}
    if empty := next((name for name, value in named.items() if not value.strip()), None):
        raise ValueError(f"{empty} is empty: give a path, or (models and data) a Hub id.")
    check_teacher(recipe.teacher, recipe)
    if regime.prefixes.on_policy or regime.strategy.type == "policy_gradient":
        check_answers_anything(recipe.teacher)
    if data.streaming and isinstance(data.validation, float):
        raise ValueError(
            "A stream has no known length to take a share of: give data.validation a file or a split."
        )
    if isinstance(data.validation, float) and not 0.0 < data.validation < 1.0:
        raise ValueError(f"data.validation as a share must be in (0, 1), got {data.validation}.")
    if data.limit is not None and data.limit < 1:
        raise ValueError(f"data.limit must be >= 1, got {data.limit}.")
    if recipe.lora and recipe.lora.r < 1:
        raise ValueError(f"lora.r must be >= 1, got {recipe.lora.r}.")
    if recipe.lora and not 0.0 <= recipe.lora.lora_dropout < 1.0:
        raise ValueError(f"lora.lora_dropout must be in [0, 1), got {recipe.lora.lora_dropout}.")
    _check_evals(recipe.eval)
    if recipe.generate:
        check_generate(recipe.generate)
    if os.path.isfile(recipe.output_dir):
        raise ValueError(f"output_dir {recipe.output_dir!r} is a file: give a folder.")


def _check_evals(evals: Sequence[EvalConfig]) -> None:
    for config in evals:
        if config.task == "exact-match" and not config.data:
            raise ValueError("eval.data is missing: give a file with prompts and answers, or remove eval.")
        if isinstance(config.every, int) and config.every < 1:
            raise ValueError(f"eval.every must be 1 or more steps, or epoch, got {config.every}.")
    names = [config.task for config in evals]
    if len(set(names)) < len(names):
        raise ValueError("eval names a task twice: their metrics would have one name.")


# Fields that only some types read.
_TEACHER_FIELDS = {
    "path": ("cached",),
    "teachers": ("mixture", "routed"),
    "weights": ("mixture",),
    "column": ("routed",),
    "quantization": ("model", "cached"),
}


def check_teacher(teacher: TeacherConfig, recipe: Recipe, where: str = "teacher") -> None:
    """The fields of a teacher and of those that it is made of; `where` is its place in the recipe.

    Raises:
        ValueError: a missing field, one without effect, or teachers that cannot be combined.
    """
    check_served(teacher)
    if teacher.type == "model" and not teacher.model:
        raise ValueError(
            f"{where}.model is missing: give a Hub id or folder, or teacher: self for self-distillation."
        )
    if teacher.type == "self" and (teacher.model or teacher.quantization):
        raise ValueError(
            f"{where}: self is the student itself: remove {where}.model and {where}.quantization."
        )
    if teacher.type == "self" and recipe.student.init == "random":
        raise ValueError(
            f"{where}: self would distil from random weights: give a teacher model, or init: pretrained."
        )
    if teacher.type == "cached" and not teacher.path:
        raise ValueError(f"{where}.path is missing: give the folder that hpd cache wrote.")
    for name, types in _TEACHER_FIELDS.items():
        if getattr(teacher, name) and teacher.type not in types:
            raise ValueError(
                f"{where}.{name} is for type {' or '.join(types)}, and the type is {teacher.type}: remove it."
            )
    if teacher.type in ("mixture", "routed"):
        _check_teachers(teacher, recipe, where)


def _check_teachers(teacher: TeacherConfig, recipe: Recipe, where: str) -> None:
    if where != "teacher" or len(teacher.teachers) < 2 or teacher.model:
        raise ValueError(
            f"{where} of type {teacher.type} needs teachers: {{name: path, other: path}}, two or more, not "
            "nested."
        )
    if teacher.type == "mixture" and (
        set(teacher.weights) != set(teacher.teachers) or min(teacher.weights.values()) <= 0
    ):
        raise ValueError(
            f"{where}.weights needs a number > 0 for each of {', '.join(teacher.teachers)}, got "
            f"{dict(teacher.weights)}."
        )
    if teacher.type == "routed" and not teacher.column:
        raise ValueError(
            f"{where}.column is missing: the column of the dataset that names each row's teacher."
        )
    if teacher.type == "routed" and (recipe.train.get("packing") or recipe.data.streaming):
        raise ValueError(
            "Routing reads the column row by row before training: set train.packing and data.streaming to "
            "false."
        )
    for name, part in teacher.teachers.items():
        if part.type == "server":
            raise ValueError(
                f"teacher.teachers.{name} is a server, which answers for whole batches: load the model here."
            )
        check_teacher(part, recipe, f"teacher.teachers.{name}")


def check_answers_anything(teacher: TeacherConfig) -> None:
    """For runs whose rows the student writes.

    Raises:
        ValueError: a teacher that knows the dataset's rows only.
    """
    for part in (teacher, *teacher.teachers.values()):
        if part.type in ("cached", "routed"):
            raise ValueError(
                f"A teacher of type {part.type} knows the dataset's rows only, and here the student writes "
                "rows: use a "
                "live teacher or a served one, or prefixes: {dataset: 1} without a policy gradient."
            )
