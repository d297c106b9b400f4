"""The checks of a recipe: types, and choices of several sections together."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from hpd.config.models import TeacherConfig
from hpd.config.schema import Recipe
from hpd.config.secrets import check_no_secrets, redact_tree
from hpd.config.slips import trainer_name
from hpd.config.yaml_file import shorten
from hpd.files import import_named
from hpd.methods.byte_forms import check_byte_forms, check_token_forms
from hpd.methods.fields import nearest
from hpd.methods.names import new_keys
from hpd.methods.regime import Regime
from hpd.methods.table import METHODS

__all__ = ["check_recipe", "check_tree", "hint_at", "read_tree", "resolve"]


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    """Reader and writer of recipes; making one takes 50 ms, and a grid has hundreds of recipes."""
    return TypeAdapter(Recipe)


def check_tree(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, checked; its stages are not looked into.

    Raises:
        ValueError: as `load_recipe`.
    """
    recipe = read_tree(tree)
    check_recipe(recipe)
    return recipe


def read_tree(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, each section checked by itself.

    Raises:
        ValueError: an unknown key, a wrong type, what a section refuses, or a secret.
    """
    if isinstance(terms := tree.get("terms"), (list, tuple)):
        tree = {**tree, "terms": [new_keys(term) if isinstance(term, Mapping) else term for term in terms]}
    try:
        recipe = _adapter().validate_python(tree)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    check_no_secrets(resolve(recipe, redacted=False))
    if recipe.teacher.type == "cached" and recipe.teacher.path is None and recipe.cache is not None:
        recipe = replace(recipe, teacher=replace(recipe.teacher, path=recipe.cache.path))
    return recipe


def resolve(recipe: Recipe, redacted: bool = True) -> dict[str, Any]:
    """The recipe with every default written out, as plain data for YAML.

    Args:
        redacted: replace secrets, which a recipe that was built in Python may hold (`load_recipe` refuses
            them).
    """
    tree = _adapter().dump_python(recipe, mode="json")
    return redact_tree(tree) if redacted else tree


def check_recipe(recipe: Recipe) -> None:
    """Refuse choices of several sections that cannot go together.

    Each section has checked its own fields when it was made.

    Raises:
        ValueError: the first such choice, and what to choose instead.
    """
    recipe.choose_terms()
    regime = recipe.choose_regime()
    teacher = recipe.teacher
    parts = {"teacher": teacher, **{f"teacher.teachers.{name}": p for name, p in teacher.teachers.items()}}
    for where, part in parts.items():
        if part.type == "cached" and not part.path:
            raise ValueError(f"{where}.path is missing: give the folder that hpd cache wrote.")
        if part.ema is not None:
            _check_average(recipe, where)
        if part.type == "self" and recipe.student.init == "random":
            raise ValueError(
                f"{where}: self would distill from random weights: give a teacher model, or init: pretrained."
            )
    if teacher.type == "object":
        _check_object(teacher)
    if teacher.type == "routed" and (recipe.train.get("packing") or recipe.data.streaming):
        raise ValueError(
            "Routing reads the column row by row before training: set train.packing and data.streaming to "
            "false."
        )
    if teacher.reads_own_rows:
        _check_own_rows(recipe, regime)
    elif recipe.method is not None and METHODS[recipe.method].own_prompt:
        raise ValueError(
            f"method: {recipe.method} learns from a teacher that reads what the student does not, and this "
            "one reads the same prompt: set teacher.prompt or teacher.system_prompt, such as prompt: "
            '"{prompt}\\n\\nReference: {completion}".'
        )
    if recipe.train.get("vocabulary") == "bytes":
        _check_bytes(recipe, regime)
    else:
        check_token_forms(recipe.choose_terms())
    regime.check_teachers(part.type for part in parts.values())
    if recipe.lora is not None and recipe.student.init == "random":
        raise ValueError(
            "lora on student.init: random would leave an adapter whose random base is kept nowhere: remove "
            "lora to train all weights, or start from a pretrained student."
        )
    if recipe.student.quantization is not None:
        _check_quantized(recipe, regime)
    if os.path.isfile(recipe.output_dir):
        raise ValueError(f"output_dir {recipe.output_dir!r} is a file: give a folder.")


def _check_average(recipe: Recipe, where: str) -> None:
    """Refuse a moving average of the student where there can be none."""
    if recipe.student.dtype in ("bfloat16", "float16"):
        raise ValueError(
            f"{where}.ema: a moving average in {recipe.student.dtype} would round its small steps away: set "
            "student.dtype: float32 (with train.bf16: true for the products), or remove ema."
        )
    if recipe.cache is not None:
        raise ValueError(
            f"{where}.ema moves the teacher in training, so a cache of what it says before would be another "
            "teacher's: remove ema, or cache."
        )


def _check_own_rows(recipe: Recipe, regime: Regime) -> None:
    """Refuse choices that leave no place for a prompt that the teacher alone reads."""
    train, own = recipe.train, "teacher.prompt and teacher.system_prompt"
    if recipe.data.labels == "all":
        raise ValueError(
            f"data.labels: all learns prompts too, and {own} give the teacher others: set data.labels: "
            "completion, or last_turn for conversations."
        )
    if train.get("truncation_mode") == "keep_end":
        raise ValueError(
            f"train.truncation_mode: keep_end cuts prompts, and with {own} the teacher's answer would begin "
            "elsewhere than the student's: set keep_start, and train.max_length as long as the rows."
        )
    if train.get("packing") and train.get("packing_strategy", "bfd") != "bfd":
        raise ValueError(
            f"train.packing_strategy: {train['packing_strategy']} cuts rows in the middle, and {own} stand "
            "before whole ones: set packing_strategy: bfd."
        )
    if regime.rollouts.teacher_share:
        raise ValueError(
            f"rollouts.teacher_share lets the teacher write behind the student's prompt, and {own} give it "
            "another: remove one of them."
        )


def _check_bytes(recipe: Recipe, regime: Regime) -> None:
    """Refuse choices that have no form between two tokenizers."""
    check_byte_forms(recipe.choose_terms(), regime, recipe.guards, recipe.train.get("byte_length"))
    teacher = recipe.teacher
    if teacher.type == "object":
        raise ValueError(
            "teacher.type: object answers about the student's tokens, and with train.vocabulary: bytes the "
            "teacher reads its own: load it next to the student (type: model), cache it (hpd cache), or hand "
            "it to a DistillTrainer with teacher_tokenizer."
        )
    if teacher.type == "server" and teacher.protocol != "hpd" and teacher.tokenizer is None:
        raise ValueError(
            f"teacher.protocol: {teacher.protocol or 'openai'} does not tell the server's tokenizer, and "
            "with train.vocabulary: bytes the teacher reads its rows in it: name it in teacher.tokenizer (a "
            "Hub id or folder), or serve the model with hpd serve-teacher (protocol: hpd)."
        )
    if recipe.data.labels == "all":
        raise ValueError(
            "data.labels: all learns prompts too, and two tokenizers (train.vocabulary: bytes) are compared "
            "on answers: set data.labels: completion, or last_turn for conversations."
        )


def _check_quantized(recipe: Recipe, regime: Regime) -> None:
    """Refuse what needs whole weights of a student that has them in 4 or 8 bits."""
    asked = f"student.quantization: {recipe.student.quantization}"
    if recipe.lora is None:
        raise ValueError(
            f"{asked} freezes the student's weights, so nothing would be trained: add lora (lora: {{r: 16}}) "
            "to train an adapter on them, or remove quantization."
        )
    if regime.rollouts.engine == "vllm":
        raise ValueError(
            f"{asked}: vLLM is sent whole weights before it writes, and an adapter merged into "
            f"{recipe.student.quantization} would be rounded away: take rollouts.engine: transformers, or "
            "remove quantization."
        )


def _explain(error: ValidationError) -> str:
    """One paragraph: the sentence of a section's own check, or every mistake that pydantic found."""
    mistakes = error.errors()
    if len(mistakes) == 1 and mistakes[0]["type"] == "value_error":
        return _mistake(mistakes[0])
    lines = dict.fromkeys(_mistake(mistake).removesuffix(".") for mistake in mistakes)
    return f"The recipe is not valid: {'; '.join(lines)}"


def _mistake(mistake: ErrorDetails) -> str:
    """A mistake: its place, the value that was given, and what is allowed."""
    location = mistake["loc"]
    kind = mistake["type"]
    path = ".".join(str(part) for part in location if not str(part).startswith("function-"))
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        if len(location) == 1 and (field := trainer_name(path)) is not None:
            return f"unknown key {path!r}; did you mean 'train.{field}'?"
        return f"unknown key {path!r}; {_lower(nearest(str(location[-1]), _keys_at(location[:-1])))}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path!r} is missing"
    context = mistake.get("ctx", {})
    if kind == "value_error":
        # A section names its fields as if it stood where it usually does; a teacher may be one of several.
        sentence = str(context["error"])
        if path.startswith("teacher.teachers."):
            sentence = re.sub(r"\bteacher(?=[.:] ?\w)", lambda _: path, sentence)
        return sentence if not path or sentence.startswith(str(location[0])) else f"{path!r}: {sentence}"
    hint = ""
    if kind == "literal_error" and isinstance(mistake["input"], str):
        meant = nearest(mistake["input"], re.findall(r"'([^']*)'", context["expected"]))
        hint = f"; {_lower(meant)}" if meant.startswith("Did") else ""
    return f"{path!r}: {_lower(mistake['msg'])}, got {shorten(mistake['input'])}{hint}"


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _check_object(teacher: TeacherConfig) -> None:
    """Refuse a teacher of one's own that cannot be called as the recipe says; it is not called yet."""
    made = import_named(str(teacher.object))
    try:
        inspect.signature(made).bind(**teacher.kwargs)
    except (TypeError, ValueError) as error:  # not callable, too: TypeError
        raise ValueError(
            f"teacher.object {teacher.object!r} cannot be called with teacher.kwargs "
            f"{{{', '.join(teacher.kwargs)}}}: {error}."
        ) from error


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """Keys of the section at a place of the recipe."""
    section: type = Recipe
    for part in location:
        hint = get_type_hints(section).get(str(part))
        section = next(_sections(hint), section)
    return [f.name for f in fields(section)]


def hint_at(location: Sequence[str]) -> Any:
    """The type of the field at a place of the recipe; Any where the place is not in a section of fields."""
    *parents, last = location
    section: type = Recipe
    names_entry = False
    for part in parents:
        if names_entry:  # as teacher.teachers.NAME.model
            names_entry = False
            continue
        hint = get_type_hints(section).get(part)
        names_entry = get_origin(hint) is Mapping
        found = next(_sections(hint), None)
        if found is None:
            return Any
        section = found
    return get_type_hints(section).get(last, Any)


def _sections(hint: Any) -> Iterator[type]:
    """Dataclasses in a type hint."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _sections(argument)
