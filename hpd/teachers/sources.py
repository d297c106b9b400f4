"""Teachers from recipes and from Python: descriptions without weights, checks of caches, loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import nn

from hpd.batch import TokenBatch
from hpd.config.models import ModelConfig, TeacherConfig
from hpd.config.schema import Recipe
from hpd.files import import_named
from hpd.losses import TeacherScores
from hpd.methods.terms import Term, TermConfig
from hpd.models.load import load_model
from hpd.teachers.cache import TEACHER, read_about
from hpd.teachers.cached import CachedTeacher
from hpd.teachers.fingerprints import (
    differences,
    own_prompt,
    teacher_fingerprint,
    tokenizer_fingerprint,
)
from hpd.teachers.limits import check_cached_terms
from hpd.teachers.mixture import MixtureTeacher, RoutedTeacher
from hpd.teachers.model import ModelTeacher, SelfTeacher
from hpd.teachers.origin import folder_of
from hpd.teachers.remote.server import ServedTeacher
from hpd.teachers.teacher import RoutedScores, Teacher

__all__ = ["as_teacher", "check_caches", "described_by", "knows_likeliest", "load_teacher"]


def described_by(recipe: Recipe) -> dict[str, ModelConfig | TeacherConfig]:
    """Where configuration and tokenizer of each teacher are read, by the role that messages name it with."""
    if recipe.teacher.teachers:
        return {
            f"teacher {name}": _description(part, recipe) for name, part in recipe.teacher.teachers.items()
        }
    return {"teacher": _description(recipe.teacher, recipe)}


def _description(teacher: TeacherConfig, recipe: Recipe) -> ModelConfig | TeacherConfig:
    if teacher.type in ("self", "object"):
        return recipe.student
    if teacher.type == "cached":
        return replace(
            teacher, model=str(folder_of(str(teacher.path)) / TEACHER), revision=None, quantization=None
        )
    return teacher


def check_caches(
    teacher: TeacherConfig,
    tokenizer: Any,
    args: Any,
    terms: Sequence[Term | TermConfig] = (),
    reader: TeacherConfig | None = None,
) -> None:
    """Compare every cache among the teachers with what the recipe would write.

    Args:
        teacher: of the recipe.
        tokenizer: the student's, which tokenizes the rows.
        args: `DistillConfig`.
        terms: of the loss, which may read what a cache does not hold.
        reader: whose prompt the rows have for the teacher; None: its own.

    Raises:
        ValueError: there is none, it is unfinished or damaged, or it was written for something else; the text
            names what.
    """
    for part in teacher.teachers.values():
        check_caches(part, tokenizer, args, terms, teacher)
        if (
            teacher.type == "mixture"
            and part.type == "cached"
            and read_about(str(part.path))["kind"] != "hidden"
        ):
            raise ValueError(
                f"A mixture needs whole distributions, and {part.path} holds some of the tokens only: "
                "cache kind hidden."
            )
    if teacher.type != "cached":
        return
    about = read_about(str(teacher.path))
    check_cached_terms(teacher.path, about, terms)
    cached = about["fingerprint"]
    asked = {
        "teacher's prompt": None,
        **own_prompt(reader or teacher),
        "train.vocabulary": "bytes" if args.vocabulary == "bytes" else None,
    }
    changed = differences(cached, {**tokenizer_fingerprint(tokenizer, args), **asked})
    if teacher.model is not None:
        here = replace(teacher, type="model", path=None)
        # Of an imported one nothing is known but the name: no weights were here.
        other = (
            cached["name"] != here.title
            if "imported" in cached["teacher"]
            else cached["teacher"] != teacher_fingerprint(here)
        )
        changed += ["teacher"] if other else []
    if changed:
        raise ValueError(
            f"The cache {teacher.path} was written with another {', another '.join(changed)}. Use what it "
            f"was written with ({cached['name']} on {cached['data']}), or write a cache for this recipe."
        )


def knows_likeliest(teacher: TeacherConfig | Teacher) -> bool:
    """True for a cache of kind top_k and a server that tells no more, alone or among several."""
    parts = teacher.teachers if isinstance(teacher, (TeacherConfig, MixtureTeacher, RoutedTeacher)) else {}
    if parts:
        return any(map(knows_likeliest, parts.values()))
    if isinstance(teacher, CachedTeacher):
        return teacher.cache.about["kind"] == "top_k"
    source = teacher.source if isinstance(teacher, ServedTeacher) else teacher
    if not isinstance(source, TeacherConfig):
        return False
    if source.type == "server":
        return source.protocol != "hpd"
    return source.type == "cached" and read_about(str(source.path))["kind"] == "top_k"


def load_teacher(teacher: TeacherConfig) -> Teacher:
    """The teacher, its weights loaded where it has any.

    Raises:
        ValueError: see `load_model` and `CachedTeacher`; or an object that fails to be made or is not a
            teacher.
    """
    if teacher.type == "self":
        return SelfTeacher(teacher.ema)
    if teacher.type == "object":
        return _of_your_own(teacher)
    if teacher.type == "cached":
        return CachedTeacher(str(teacher.path))
    parts = {name: load_teacher(part) for name, part in teacher.teachers.items()}
    if teacher.type == "mixture":
        return MixtureTeacher(parts, teacher.weights)
    if teacher.type == "routed":
        return RoutedTeacher(parts, str(teacher.column))
    return ModelTeacher(load_model(teacher, "teacher"))


def _of_your_own(teacher: TeacherConfig) -> Teacher:
    """The teacher that a recipe names by its module."""
    try:
        made = import_named(str(teacher.object))(**teacher.kwargs)
    except Exception as error:  # a module runs its own code
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"teacher.object {teacher.object!r} could not be made: {said}.") from error
    if not isinstance(made, Teacher):
        raise ValueError(
            f"teacher.object {teacher.object!r} gave a {type(made).__name__}: derive it from "
            "hpd.teachers.Teacher, whose method scores(inputs, batch) answers about label positions."
        )
    return made


def as_teacher(teacher: Any, trust_remote_code: bool = False) -> Teacher:
    """A `Teacher` of what Python code names one with.

    Args:
        teacher: a path or Hub id, "self", a loaded model, a `Teacher`, or another object with `scores` (and
            perhaps `prepare` and `vocab`).
        trust_remote_code: for a path or Hub id.

    Raises:
        ValueError: an object without `scores`, or one with methods that only a `Teacher` has; see also
            `load_model`.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if teacher == "self":
        return SelfTeacher()
    if isinstance(teacher, str):
        source = ModelConfig(model=teacher, trust_remote_code=trust_remote_code)
        return ModelTeacher(load_model(source, "teacher"))
    return ModelTeacher(teacher) if isinstance(teacher, nn.Module) else _Adapted(teacher)


class _Adapted(Teacher):
    """An object that was written for the protocol of `scores` and `prepare`, before `Teacher` was a class."""

    def __init__(self, teacher: Any):
        optional = [name for name in ("read_rows", "fetch", "request", "wait") if hasattr(teacher, name)]
        if optional or not hasattr(teacher, "scores"):
            problem = f"has {', '.join(optional)}" if optional else "has no method scores"
            raise ValueError(
                f"The teacher is a {type(teacher).__name__}, which {problem}: derive it from "
                "hpd.teachers.Teacher, whose methods are scores, prepare, register_rows (before: read_rows), "
                "ask (before: fetch or request) and wait."
            )
        self._teacher = teacher
        self.model = getattr(teacher, "model", None)
        config = getattr(self.model or teacher, "config", None)
        self.vocab = (
            getattr(teacher, "vocab", None) if config is None else config.get_text_config().vocab_size
        )

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        if hasattr(self._teacher, "prepare"):
            self._teacher.prepare(student, accelerator)

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores | RoutedScores:
        return self._teacher.scores(inputs, batch)
