"""The adapter that a recipe trains, and the one that its student may be."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft

from hpd.config.schema import Recipe
from hpd.models.adapters import find_adapter, has_shape_of
from hpd.models.pairing import CheckResult

__all__ = ["adapter_verdicts", "goes_on_adapter", "lora_of"]


def lora_of(recipe: Recipe) -> peft.LoraConfig | None:
    """Return the recipe's adapter as peft takes it."""
    if recipe.lora is None:
        return None
    # Whoever loads the adapter needs the base of that revision.
    options = {**dataclasses.asdict(recipe.lora), "revision": recipe.student.revision}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def goes_on_adapter(recipe: Recipe, student_config: Any) -> bool:
    """True if the student is an adapter of the shape that `lora` asks for, which is then trained further.

    Any other adapter is merged into its base, and so is one whose run learns from `self`: with an adapter
    switched off, the base would be the teacher, not the student as it was before training.

    Args:
        student_config: of the student's base.
    """
    adapter = find_adapter(recipe.student, "student")
    teachers = (recipe.teacher, *recipe.teacher.teachers.values())
    if adapter is None or any(teacher.type == "self" for teacher in teachers):
        return False
    wanted = lora_of(recipe)
    return wanted is not None and has_shape_of(adapter, student_config, wanted)


def adapter_verdicts(recipe: Recipe, student_config: Any) -> list[CheckResult]:
    """The way a student that is an adapter is taken."""
    adapter = find_adapter(recipe.student, "student")
    if adapter is None:
        return []
    if goes_on_adapter(recipe, student_config):
        text = f"lora has its shape: it is trained further, on the same base {adapter.base.model}"
    elif recipe.lora is None:
        text = f"merged into its base {adapter.base.model}; all weights are trained"
    else:
        text = (
            f"merged into its base {adapter.base.model}, and a new one is trained on the result, whose base "
            f"is {adapter.path}"
        )
    return [CheckResult("ok", "adapter", text)]
