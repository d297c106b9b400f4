"""The adapter that a recipe trains, the one that its student may be, and the quantized weights below it."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft

from hpd.config.schema import Recipe
from hpd.models.adapters import find_adapter, has_shape_of
from hpd.models.buildable import without_weights
from hpd.models.pairing import CheckResult
from hpd.models.quantized import quantized_layers, stored_bits
from hpd.training.arguments import DistillConfig
from hpd.training.engines import engines_asked

__all__ = [
    "adapter_verdicts",
    "goes_on_adapter",
    "lora_of",
    "quantization_verdicts",
    "unfit_for_quantized",
]


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
    elif recipe.student.quantization is not None:
        text = (
            f"the student {adapter.path!r} is an adapter that lora does not train further (another shape, or "
            f"a teacher of type self), and merging it into weights of {recipe.student.quantization} would "
            f"round it away: write a whole model with hpd export {adapter.path} --merge --output DIR, and "
            "name that as the student."
        )
        return [CheckResult("error", "adapter", text)]
    elif recipe.lora is None:
        text = f"merged into its base {adapter.base.model}; all weights are trained"
    else:
        text = (
            f"merged into its base {adapter.base.model}, and a new one is trained on the result, whose base "
            f"is {adapter.path}"
        )
    return [CheckResult("ok", "adapter", text)]


def quantization_verdicts(recipe: Recipe, config: Any, args: DistillConfig) -> list[CheckResult]:
    """How much of the student is quantized, and what of the recipe cannot go with it.

    Args:
        config: of the student (of its base, where it is an adapter).
        args: of training.
    """
    bits = stored_bits(recipe.student, config)
    if bits is None and getattr(config, "quantization_config", None) is None:
        return []
    problem = unfit_for_quantized(args)
    if recipe.lora is None:
        problem = (
            f"the student {recipe.student.model!r} is stored quantized, and its weights cannot be trained: "
            "add lora (lora: {r: 16}) to train an adapter on them, or name the whole model."
        )
    if problem is not None or bits is None:
        return [] if problem is None else [CheckResult("error", "quantization", problem)]
    model = without_weights(config, trust_remote_code=recipe.student.trust_remote_code)
    layers = quantized_layers(model)
    lora = recipe.lora
    full = [name for name in (lora.modules_to_save if lora else None) or () if _names_one(name, layers)]
    if full:
        text = (
            f"lora.modules_to_save names {', '.join(full)}, whose weights are held in {bits} and cannot be "
            "trained in full: name them in lora.target_modules, or remove student.quantization."
        )
        return [CheckResult("error", "quantization", text)]
    inside = sum(parameter.numel() for layer in layers.values() for parameter in layer.parameters())
    share = inside / sum(parameter.numel() for parameter in model.parameters())
    text = (
        f"{share:.0%} of the student's weights are held in {bits} and frozen (not its embeddings, norms and "
        "head); the adapter is trained in float32"
    )
    if recipe.student.quantization is not None:
        text += (
            ". Whatever reads the run afterwards puts the adapter on the whole weights, which give slightly "
            "other logits"
        )
    return [CheckResult("ok" if share >= 0.5 else "warning", "quantization", text)]


def _names_one(name: str, layers: Any) -> bool:
    """True if peft would take the name for one of these layers."""
    return any(f".{layer}".endswith(f".{name}") for layer in layers)


def unfit_for_quantized(args: DistillConfig) -> str | None:
    """What the settings of a trainer ask for that a quantized student does not have; None: nothing."""
    if engines := engines_asked(args):
        return (
            f"the student is quantized, and {engines[0].value} cannot shard packed weights: "
            "launch with DDP (recipes/accelerate/ddp.yaml), where each process holds the small quantized "
            "student whole, or remove its quantization."
        )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            return (
                f"train.{name} casts the whole student for evaluations, which quantized weights cannot be: "
                "remove it."
            )
    return None
