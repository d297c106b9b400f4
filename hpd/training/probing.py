"""Checks of loaded models and prepared rows together, before the first step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.compute
from datasets import Dataset

from hpd.batch import TEACHER_PREFIXES
from hpd.methods.prefixes import RolloutConfig
from hpd.models.forward import model_inputs
from hpd.models.pairing import CheckResult
from hpd.models.probe import check_savable, mend_generation, probe_head, probe_packing

__all__ = [
    "beyond_embeddings",
    "check_packing",
    "check_rows",
    "check_seen",
    "check_writer",
    "packing_verdicts",
    "probe_student",
    "settle",
]

_LOGGER = logging.getLogger(__name__)


def probe_student(model: Any, base: Any, tokenizer: Any, packed: bool) -> list[CheckResult]:
    """Try a few tokens on the student, and to save what is written beside its weights.

    Args:
        model: the student, perhaps with its adapter around it.
        base: the same without a PEFT wrapper.
        tokenizer: or processor.
        packed: training puts rows one behind the other.
    """
    found = [probe_head(base, "student")]
    if packed:
        found.append(probe_packing(model, "student"))
    generation = getattr(base, "generation_config", None)
    if generation is not None:
        found += mend_generation(generation)
    return found + check_savable(base.config, generation, tokenizer)


def packing_verdicts(args: Any) -> list[CheckResult]:
    """Look at settings of packing under which no model keeps rows apart.

    Args:
        args: `SFTConfig`.
    """
    found = []
    if args.packing and args.packing_strategy == "wrapped":
        text = (
            "train.packing_strategy: wrapped joins rows into one text and cuts it anywhere: each row is read "
            "behind the end of another, and some are cut. train.packing_strategy: bfd keeps them apart."
        )
        found.append(CheckResult("warning", "packing", text))
    if args.eval_packing and not args.packing and not args.padding_free:
        text = (
            "train.eval_packing packs the validation rows, and without train.packing they are read as one "
            "text: set train.packing too, or train.eval_packing: false."
        )
        found.append(CheckResult("error", "packing", text))
    return found


def check_packing(student: Any, teacher: Any, args: Any) -> None:
    """Refuse packed rows that student or teacher cannot keep apart, as soon as both are loaded.

    Args:
        student: with its weights.
        teacher: a `Teacher`.
        args: `SFTConfig`.

    Raises:
        ValueError: they read a row behind another unlike the row alone.
    """
    if args.padding_free or (args.packing and args.packing_strategy != "wrapped"):
        found = [probe_packing(student, "student"), *teacher.probe(packed=True)]
        settle(verdict for verdict in found if verdict.level == "error")


def settle(verdicts: Iterable[CheckResult]) -> None:
    """Log the warnings, and raise ValueError with every verdict that would ruin the run."""
    verdicts = list(verdicts)
    if errors := [f"{v.topic}: {v.text}" for v in verdicts if v.level == "error"]:
        raise ValueError(" ".join(errors))
    for verdict in verdicts:
        if verdict.level == "warning":
            _LOGGER.warning("%s: %s", verdict.topic, verdict.text)


def check_rows(datasets: Any, tokenizer: Any, models: Mapping[str, Any]) -> None:
    """Refuse rows with a token that a model has no embedding for, which would end training in an IndexError.

    Args:
        datasets: prepared rows, or several by name; streams are not read.
        tokenizer: the student's; where all of its tokens have embeddings, no row is read.
        models: that read the rows, by their role; None: there is none.

    Raises:
        ValueError: there is such a row.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    known = {
        role: model.get_input_embeddings().num_embeddings
        for role, model in models.items()
        if hasattr(model, "get_input_embeddings") and hasattr(model.get_input_embeddings(), "num_embeddings")
    }
    greatest_known = max(tokenizer.get_vocab().values(), default=0)
    parts = datasets.values() if isinstance(datasets, dict) else [datasets]
    for rows in parts:
        if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names or not len(rows):
            continue
        if all(greatest_known < limit for limit in known.values()):
            continue
        compute: Any = pyarrow.compute
        chunks = rows.data.column("input_ids").chunks
        greatest = max(compute.max(compute.list_flatten(chunk)).as_py() or 0 for chunk in chunks)
        for role, limit in known.items():
            if greatest >= limit:
                raise ValueError(f"vocabulary: {beyond_embeddings(tokenizer, greatest, role, limit)}")


def beyond_embeddings(tokenizer: Any, token: int, role: str, limit: int) -> str:
    """Say that a model cannot read a token of the rows."""
    name = tokenizer.convert_ids_to_tokens(token)
    return (
        f"the rows have the token {name!r} (number {token}), and the {role}'s embeddings have {limit} rows: "
        f"it was added to the tokenizer and not to the model. Call resize_token_embeddings({token + 1}) on "
        f"the {role} and save it (all models of a run need the token), or take the token out of rows, "
        "template and tokenizer."
    )


def check_writer(rows: Any, rollouts: RolloutConfig) -> None:
    """Refuse a teacher that reads prompts of its own and writes behind the student's.

    Raises:
        ValueError: both were asked for.
    """
    if rollouts.teacher_share and TEACHER_PREFIXES in (getattr(rows, "column_names", None) or ()):
        raise ValueError(
            "rollouts.teacher_share lets the teacher write behind the student's prompt, and its rows have "
            "another one: set it to 0, or leave out the teacher's own prompt."
        )


def check_seen(trainer: Any, teacher: Any, reads_alone: bool) -> None:
    """Refuse rows with images where student, teacher, or a student that writes, would not see them.

    Args:
        trainer: an `SFTTrainer`, which knows whether its rows have images.
        teacher: of the run.
        reads_alone: the student writes rows, from the text of their prompts.

    Raises:
        ValueError: the images would have no effect on one side.
    """
    if not getattr(trainer, "_is_vision_dataset", False):
        return
    batch = trainer.data_collator([next(iter(trainer.train_dataset))])
    if lost := sorted(batch.keys() - model_inputs(batch).keys() - {"labels"}):
        raise ValueError(
            f"The student's processor makes {', '.join(lost)} of the rows, which training does not pass on: "
            "take a student of another family, or rows without images."
        )
    start = "The rows have images, which the student sees"
    model = getattr(teacher, "model", None)
    if teacher.reads_as_student:
        pass
    elif model is None or "pixel_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{start} and the teacher, {type(model or teacher).__name__}, does not: give a vision-language "
            "model as the teacher, loaded in Python, or rows without images."
        )
    if reads_alone:
        raise ValueError(
            f"{start}, and a student that writes its own rows is shown the text of their prompts alone: take "
            "a method that learns from the dataset's rows."
        )
