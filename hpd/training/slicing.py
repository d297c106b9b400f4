"""Context parallelism in training: which processes share rows, and what is not trained so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from hpd.batch import TEACHER_PREFIXES
from hpd.data.rows import validation_sets
from hpd.data.teacher_prompts import TEACHER_PROMPT
from hpd.methods.regime import Regime
from hpd.methods.table import name_terms
from hpd.methods.terms import Term
from hpd.models.slices import RowSlices, check_model
from hpd.teachers import CachedTeacher, ModelTeacher, SelfTeacher, Teacher
from hpd.training.adapting import lora_of
from hpd.training.engines import check_sizes, layout_asked
from hpd.training.plan import Plan

__all__ = ["check_sliced", "check_sliced_plan", "check_slicing", "refuse_slices", "slices_of"]


def slices_of(accelerator: Accelerator) -> RowSlices | None:
    """This process's part of rows, where accelerate has processes share them (cp_size); else None.

    Accelerate's device mesh, its batches and FSDP2 are used. Its own attention is not: it gives every layer
    of the student a causal mask, in generation too, and torch has it for GPUs alone.
    """
    layout = accelerator.parallelism_config
    if layout is None or not layout.cp_enabled:
        return None
    accelerator._prepare_cp = lambda *args: args  # type: ignore[method-assign]
    return RowSlices(cast(Any, accelerator.torch_device_mesh)["cp"].get_group())


def check_sliced(
    args: Any,
    terms: Sequence[Term],
    regime: Regime,
    *,
    here: bool,
    adapter: PeftConfig | None,
    rows: Sequence[Any],
    configs: Mapping[str, Any],
) -> None:
    """Refuse what is not trained on slices of rows, where accelerate's configuration asks for them.

    Args:
        args: `DistillConfig`.
        terms: of the loss.
        regime: of the run.
        here: the teacher is a model of the same processes that stays as it is, or a cache.
        adapter: what is trained of the student, if not all of it.
        rows: the sets of training and validation.
        configs: of student and teacher, as far as they are known.

    Raises:
        ValueError: the first such thing, and what to do.
    """
    layout = layout_asked(args)
    if layout is None or not layout.cp_enabled:
        check_sizes(args)
        return
    size = layout.cp_size
    unfit = _by_data(rows) | {
        "rules over the positions of a row (terms.positions)": any(t.positions is not None for t in terms),
        "text that the student writes (prefixes)": regime.prefixes.on_policy or regime.prefixes.stored,
        f"strategy: {regime.strategy.type}": regime.strategy.type != "direct",
        "a teacher that is neither a model here nor a cache (served, several, a moving average)": not here,
        "an adapter that is no LoRA": adapter is not None and not isinstance(adapter, LoraConfig),
        "train.vocabulary: bytes": args.vocabulary == "bytes",
        "rows behind one another (train.packing, eval_packing, padding_free)": bool(
            args.packing or args.eval_packing or args.padding_free
        ),
        "train.torch_compile": args.torch_compile,
        "train.include_num_input_tokens_seen, which would count a row once for each process": (
            args.include_num_input_tokens_seen != "no"
        ),
    }
    for what, is_so in unfit.items():
        if is_so:
            raise ValueError(
                f"Context parallelism (cp_size: {size}) does not go with {what}: leave that out, or launch "
                "without cp_size, with gradient checkpointing (recipes/accelerate/fsdp2.yaml)."
            )
    for role, config in configs.items():
        if config is not None:
            check_model(config, role)
    check_sizes(args)


def _by_data(rows: Sequence[Any]) -> dict[str, bool]:
    columns = {name for part in rows if isinstance(part, Dataset) for name in part.column_names}
    return {
        "a teacher that reads a prompt of its own": bool(columns & {TEACHER_PROMPT, TEACHER_PREFIXES}),
        "images": bool(columns & {"image", "images"}),
        "a stream of rows": any(isinstance(part, IterableDataset) for part in rows),
    }


def refuse_slices(args: Any, what: str) -> None:
    """Refuse a launch with shared rows for what reads whole ones.

    Raises:
        ValueError: accelerate's configuration says cp_size.
    """
    layout = layout_asked(args)
    if layout is not None and layout.cp_enabled:
        raise ValueError(
            f"Context parallelism (cp_size: {layout.cp_size}) is for training on rows of text, and {what} "
            "reads whole rows: launch without cp_size."
        )


def check_sliced_plan(planned: Plan) -> None:
    """`check_sliced` of a recipe, before a model loads.

    Raises:
        ValueError: as `check_sliced`.
    """
    recipe, rows = planned.recipe, planned.rows
    # A cached teacher reads nothing here, so it may be of any kind.
    teachers = {} if recipe.teacher.type == "cached" else planned.teacher_configs
    check_sliced(
        planned.args,
        name_terms(recipe.choose_terms()),
        recipe.choose_regime(),
        here=recipe.teacher.type in ("model", "self", "cached") and recipe.teacher.ema is None,
        adapter=lora_of(recipe),
        rows=[rows.train, *validation_sets(rows.validation).values()],
        configs={"student": planned.student_config, **teachers},
    )


def check_slicing(
    args: Any, terms: Sequence[Term], regime: Regime, model: Any, teacher: Any, options: Mapping[str, Any]
) -> None:
    """`check_sliced` of what `DistillTrainer` was called with; `options` are those of `SFTTrainer`.

    Raises:
        ValueError: as `check_sliced`, and a model that is loaded and cannot read slices.
    """
    sets = [validation_sets(options.get(name)) for name in ("train_dataset", "eval_dataset")]
    if isinstance(teacher, Teacher):
        here = isinstance(teacher, (ModelTeacher, CachedTeacher, SelfTeacher)) and not teacher.follows
    else:
        here = isinstance(teacher, (str, nn.Module))
    adapter = model.active_peft_config if isinstance(model, PeftModel) else options.get("peft_config")
    sources = {"student": model, "teacher": getattr(teacher, "model", teacher)}
    configs = {role: getattr(source, "config", None) for role, source in sources.items()}
    check_sliced(
        args,
        terms,
        regime,
        here=here,
        adapter=adapter,
        rows=[rows for named in sets for rows in named.values()],
        configs=configs,
    )
