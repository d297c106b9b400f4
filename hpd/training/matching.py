"""Rows of a recipe, looked up among the rows of other people's teacher data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpd.batch import TokenBatch
from hpd.data.rows import validation_sets
from hpd.progress import Progress
from hpd.teachers.foreign import PlaceAnswers, TeacherFile
from hpd.training.plan import Plan

__all__ = ["Match", "RecipeRow", "find_rows", "recipe_rows", "teacher_vocab", "why_unmatched"]

_SHOWN_TOKENS = 6
_LOOKED_AT = 2000


class RecipeRow(NamedTuple):
    """A row of the recipe as the student reads it."""

    ids: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    """Where the next token is a label."""
    keys: Tensor
    """Of each of them."""
    labels: Tensor


class Match(NamedTuple):
    """Rows of the recipe, and the row of the file for each."""

    rows: list[RecipeRow]
    numbers: npt.NDArray[np.int64]
    """-1: none."""
    incomplete: int
    """Rows that were found, and about some label of which the file says nothing."""


def recipe_rows(trainer: Any) -> Iterable[RecipeRow]:
    """Every prepared row of a trainer, those of validation behind."""
    for rows in (trainer.train_dataset, *validation_sets(trainer.eval_dataset).values()):
        for row in rows:
            inputs = trainer.data_collator([row])
            batch = TokenBatch.pop(inputs)
            mask = inputs.get("attention_mask")
            pads = 0 if mask is None else int((mask[0].cumsum(0) == 0).sum())
            ids = np.asarray(row["input_ids"], dtype=np.int64)
            yield RecipeRow(ids, (batch.index - pads).numpy(), batch.keys, batch.labels)


def _prefix_hashes(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A hash of the first 1, 2, ... tokens."""
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.arange(1, len(ids) + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).cumsum(dtype=np.uint64)


def find_rows(rows: list[RecipeRow], source: TeacherFile, planned: Plan, progress: Progress) -> Match:
    """Look every row up among the beginnings of the file's.

    Raises:
        ValueError: a row that is found is damaged, or has tokens that the teacher does not have.
    """
    wanted: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if len(row.ids):
            wanted.setdefault(int(_prefix_hashes(row.ids)[-1]), []).append(i)
    known = np.array(sorted(wanted), dtype=np.uint64)
    numbers = np.full(len(rows), -1, dtype=np.int64)
    incomplete = 0
    bar = progress.bar("rows of the file")
    for number in range(len(source)):
        ids = source.ids(number)
        hashes = _prefix_hashes(ids)
        answers: PlaceAnswers | None = None
        for end in np.flatnonzero(np.isin(hashes, known)).tolist():
            for i in wanted[int(hashes[end])]:
                if numbers[i] >= 0 or not np.array_equal(rows[i].ids, ids[: end + 1]):
                    continue
                if answers is None:
                    answers = source.answers(number)
                    _check_tokens(answers, number, source, planned)
                if _answered(rows[i], answers):
                    numbers[i] = number
                else:
                    incomplete += 1
        bar(number + 1, len(source))
    return Match(rows, numbers, incomplete)


def _check_tokens(answers: PlaceAnswers, number: int, source: TeacherFile, planned: Plan) -> None:
    told = answers.tokens[torch.isfinite(answers.logprobs)]
    vocab = teacher_vocab(planned)
    if len(told) and int(told.max()) >= vocab:
        raise ValueError(
            f"Row {number + 1:,} of {source.path} has the token {int(told.max())}, and the teacher "
            f"{planned.recipe.teacher.title} has {vocab}: the file is of another tokenizer, or damaged."
        )


def teacher_vocab(planned: Plan) -> int:
    """Tokens of the teacher, as its configuration says."""
    return int(planned.teacher_configs["teacher"].get_text_config().vocab_size)


def _answered(row: RecipeRow, answers: PlaceAnswers) -> bool:
    """True if there is an answer about every label."""
    if not len(row.places):
        return True
    return int(row.places.max()) < len(answers.known) and bool(answers.known[row.places].all())


def why_unmatched(match: Match, source: TeacherFile, planned: Plan) -> str | None:
    """Why rows were not found: what the first of them has, and the row of the file that agrees with it
    longest; None: all were."""
    missing = np.flatnonzero(match.numbers < 0)
    if not len(missing):
        return None
    if match.incomplete:
        return (
            f"{match.incomplete:,} rows are in the file without an answer about each of their labels (a "
            "file may hold answers about completions only, or shorter rows)."
        )
    first = match.rows[int(missing[0])].ids
    best, length = 0, -1
    for number in range(min(len(source), _LOOKED_AT)):
        ids = source.ids(number)
        size = min(len(ids), len(first))
        differ = np.flatnonzero(ids[:size] != first[:size])
        same = int(differ[0]) if len(differ) else size
        if same > length:
            best, length = number, same
    if length < 0:
        return f"{source.path} has no rows."
    here, there = (_shown(planned.tokenizer, ids, length) for ids in (first, source.ids(best)))
    return (
        f"Row {int(missing[0]) + 1} of the recipe is row {best + 1} of the file for {length} tokens, "
        f"then it has {here} and the file {there}. Other text, template, tokenizer or max_length make other "
        "tokens."
    )


def _shown(tokenizer: Any, ids: npt.NDArray[np.int64], start: int) -> str:
    part = [int(i) for i in ids[start : start + _SHOWN_TOKENS]]
    if not part:
        return "its end"
    return repr(tokenizer.decode(part)) if max(part) < len(tokenizer) else f"the ids {part}"
