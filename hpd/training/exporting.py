"""`hpd export` of a cache: a teacher's stored answers in the formats of other trainers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpd.config.schema import Recipe
from hpd.data.rows import validation_sets
from hpd.models.export import check_new, new_folder
from hpd.progress import Progress
from hpd.teachers.cache import Cache, read_about
from hpd.teachers.foreign import FORMATS
from hpd.teachers.foreign.writing import AnsweredRow, write_rows
from hpd.teachers.limits import unread_labels
from hpd.training.caching import rows_trainer
from hpd.training.matching import recipe_rows
from hpd.training.plan import plan

__all__ = ["ExportSummary", "export_cache"]


class ExportSummary(NamedTuple):
    """Counts of what was written."""

    path: Path
    rows: int
    positions: int
    left_out: int
    """Rows that the format cannot say."""
    labels_lost: int
    """Labels that are none of the k, where the format has no place for their log-probability."""


def export_cache(recipe: Recipe, form: str, folder: Path, progress: Progress | None = None) -> ExportSummary:
    """Write the cache of a recipe's rows as `form`, a name of FORMATS.

    Args:
        recipe: its teacher is of type cached, kind top_k.
        form: the format.
        folder: a new folder, or an empty one. It appears whole or not at all.
        progress: hears of the rows.

    Raises:
        FileNotFoundError, ValueError: as `hpd.training.plan.plan`; another teacher or kind, or rows that are
            not in the cache.
    """
    if form not in FORMATS:
        raise ValueError(f"The format {form!r} is not known: {', '.join(FORMATS)}.")
    if recipe.teacher.type != "cached":
        raise ValueError(
            "hpd export writes what a cache holds: give teacher.type=cached and teacher.path=FOLDER."
        )
    about = read_about(str(recipe.teacher.path))
    if about["kind"] != "top_k":
        raise ValueError(
            f"The cache {recipe.teacher.path} is of kind {about['kind']}, and the formats of others hold the "
            "likeliest tokens: write one of kind top_k from it first (hpd cache with teacher.type=cached, "
            "cache.kind=top_k, cache.top_k=64)."
        )
    if form == "vllm" and unread_labels(about):
        raise ValueError(
            f"{unread_labels(about):,} labels of {recipe.teacher.path} are none of the k tokens, and the "
            "file that it was imported from does not say how likely they are; vllm's rows always do. Export "
            "as distillkit or axolotl."
        )
    check_new(folder)
    recipe = dataclasses.replace(recipe, train={**recipe.train, "packing": False})
    planned = plan(recipe)
    planned.require_sound()
    cache, trainer = Cache(str(recipe.teacher.path)), rows_trainer(planned)
    counts = {"rows": 0, "positions": 0, "lost": 0}
    bar = (progress or Progress()).bar("rows")
    datasets: Any = [trainer.train_dataset, *validation_sets(trainer.eval_dataset).values()]
    total = sum(map(len, datasets))

    def answered() -> Iterator[AnsweredRow]:
        for row in recipe_rows(trainer):
            found = cache.read(row.keys.numpy())
            counts["rows"] += 1
            counts["positions"] += len(row.keys)
            counts["lost"] += int((~(found["tokens"] == row.labels[:, None]).any(-1)).sum())
            bar(counts["rows"], total)
            told = (found[name] for name in ("tokens", "logprobs", "label_logprobs"))
            yield AnsweredRow(row.ids, row.places, row.labels, *told)

    dtype = getattr(torch, about["dtype"])
    with new_folder(folder) as draft:  # a part of an export looks like an export
        left_out = write_rows(form, draft, answered(), int(about["top_k"]), int(about["vocab"]), dtype)
    lost = 0 if form == "vllm" else counts["lost"]
    return ExportSummary(folder, counts["rows"] - left_out, counts["positions"], left_out, lost)
