"""From what a recipe says of its teacher to the teacher: descriptions without weights, checks of caches,
loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hpd.config.models import ModelConfig, TeacherConfig
from hpd.config.schema import Recipe
from hpd.models.load import load_model
from hpd.teachers.cache import TEACHER, read_about
from hpd.teachers.cached import CachedTeacher
from hpd.teachers.fingerprints import differences, teacher_fingerprint, tokenizer_fingerprint
from hpd.teachers.mixture import MixtureTeacher, RoutedTeacher
from hpd.teachers.model import ModelTeacher, SelfTeacher, Teacher

__all__ = ["check_caches", "described_by", "load_teacher"]


def described_by(recipe: Recipe) -> dict[str, ModelConfig | TeacherConfig]:
    """Where configuration and tokenizer of each teacher are read, by the role that messages name it with."""
    if recipe.teacher.teachers:
        return {
            f"teacher {name}": _description(part, recipe) for name, part in recipe.teacher.teachers.items()
        }
    return {"teacher": _description(recipe.teacher, recipe)}


def _description(teacher: TeacherConfig, recipe: Recipe) -> ModelConfig | TeacherConfig:
    if teacher.type == "self":
        return recipe.student
    if teacher.type == "cached":
        return replace(
            teacher, model=str(Path(str(teacher.path)) / TEACHER), revision=None, quantization=None
        )
    return teacher


def check_caches(teacher: TeacherConfig, tokenizer: Any, args: Any) -> None:
    """Compare every cache among the teachers with what the recipe would write.

    Args:
        teacher: of the recipe.
        tokenizer: the student's, which tokenises the rows.
        args: `DistillConfig`.

    Raises:
        ValueError: there is none, it is unfinished or damaged, or it was written for something else; the text
            names what.
    """
    for part in teacher.teachers.values():
        check_caches(part, tokenizer, args)
        if (
            teacher.type == "mixture"
            and part.type == "cached"
            and read_about(str(part.path))["kind"] == "top_k"
        ):
            raise ValueError(
                f"A mixture needs whole distributions, and {part.path} holds the likeliest tokens only: "
                "cache kind hidden."
            )
    if teacher.type != "cached":
        return
    cached = read_about(str(teacher.path))["fingerprint"]
    changed = differences(cached, tokenizer_fingerprint(tokenizer, args))
    if teacher.model is not None:
        changed += (
            ["teacher"]
            if cached["teacher"] != teacher_fingerprint(replace(teacher, type="model", path=None))
            else []
        )
    if changed:
        raise ValueError(
            f"The cache {teacher.path} was written with another {', another '.join(changed)}. Use what it "
            f"was written with ({cached['name']} on {cached['data']}), or write a cache for this recipe."
        )


def load_teacher(teacher: TeacherConfig) -> Teacher:
    """The teacher, its weights loaded where it has any.

    Raises:
        ValueError: see `load_model` and `CachedTeacher`.
    """
    if teacher.type == "self":
        return SelfTeacher()
    if teacher.type == "cached":
        return CachedTeacher(str(teacher.path))
    parts = {name: load_teacher(part) for name, part in teacher.teachers.items()}
    if teacher.type == "mixture":
        return MixtureTeacher(parts, teacher.weights)
    if teacher.type == "routed":
        return RoutedTeacher(parts, str(teacher.column))
    return ModelTeacher(load_model(teacher, "teacher"))


def as_teacher(teacher: Any, trust_remote_code: bool) -> Teacher:
    if isinstance(teacher, str):
        if teacher == "self":
            return SelfTeacher()
        from hpd.config.models import ModelConfig
        from hpd.models.load import load_model

        return ModelTeacher(
            load_model(ModelConfig(model=teacher, trust_remote_code=trust_remote_code), "teacher")
        )
    return ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
