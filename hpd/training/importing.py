"""`hpd import`: a teacher's answers from a file of others, written as a cache for a recipe's rows.

The rows are those that training would see, as in `hpd.training.caching`. A row of the recipe is found in the
file where a row there begins with all of its tokens, so a file may have more behind it (a pad token, an
answer that `max_length` cuts). Nothing of the teacher is loaded but its configuration and tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from hpd.config.schema import Recipe
from hpd.files import JsonLines, digest_text
from hpd.locks import holding
from hpd.models.load import load_tokenizer
from hpd.progress import Progress
from hpd.teachers.cache import ABOUT, FORMAT, TEACHER, read_json, save_index, save_shard, write_json
from hpd.teachers.fingerprints import tokenizer_fingerprint
from hpd.teachers.foreign import TeacherFile
from hpd.training.caching import check_disk, open_folder, rows_trainer, verify_own_share
from hpd.training.checkpoints import writing
from hpd.training.matching import Match, RecipeRow, find_rows, recipe_rows, teacher_vocab, why_unmatched
from hpd.training.plan import Plan, plan
from hpd.training.shards import Layout, index_bytes, lay_out, size_text

__all__ = ["ImportSummary", "import_cache"]

# The least tail of a place: below it, one minus a float32 sum of k numbers is rounding.
_LEAST_TAIL = 2.0**-20


class ImportSummary(NamedTuple):
    """Counts of what was imported."""

    path: Path
    rows: int
    matched: int
    positions: int
    mass_outside: float
    """Mean mass of the teacher that the k tokens of a position leave."""
    labels_outside: int
    """Positions whose label is none of the k, and the file does not say how likely it is."""
    places_short: int
    """Positions of which the file has fewer tokens; the others take an even share of the mass outside."""
    unmatched: str | None
    """Why rows were not found; None: all were."""


def import_cache(
    recipe: Recipe,
    source: TeacherFile,
    *,
    guesses_labels: bool = False,
    rows_path: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportSummary:
    """Write a cache of kind `top_k` from a file of others.

    Args:
        recipe: with `cache.path`; `cache.kind` top_k and `cache.top_k` keep fewer tokens than the file has.
        source: the file.
        guesses_labels: methods that read the label may take its share of the uniform tail where the file does
            not say how likely it is; else they are refused when training begins.
        rows_path: also write the rows that were found, as token ids, for `data.path`.
        overwrite: delete another cache at that place first.

    Raises:
        FileNotFoundError, ValueError: as `hpd.training.plan.plan`; the file is damaged, of another tokenizer,
            or holds none of the rows.
    """
    recipe = _as_imported(recipe)
    assert recipe.cache is not None
    with holding(Path(recipe.cache.path)):
        return _import(recipe, source, guesses_labels, rows_path, overwrite, progress or Progress())


def _as_imported(recipe: Recipe) -> Recipe:
    """The recipe without packing, whose keys are the same.

    Raises:
        ValueError: a setting that an import cannot follow.
    """
    if recipe.cache is None or "://" in recipe.cache.path:
        raise ValueError("cache.path is missing, or an address: give a folder, as cache.path=FOLDER.")
    if recipe.cache.dtype != "auto":
        raise ValueError("cache.dtype has no effect on an import, which keeps the file's numbers: remove it.")
    if recipe.teacher.type != "model" or recipe.teacher.reads_own_rows:
        raise ValueError(
            f"hpd import needs the teacher that wrote the file as teacher.model (type {recipe.teacher.type} "
            "was given), for its configuration and tokenizer alone, and without a prompt of its own."
        )
    if recipe.data.streaming or recipe.train.get("vocabulary") == "bytes":
        raise ValueError(
            "hpd import reads all rows, in the student's tokens: set data.streaming to false and "
            "train.vocabulary to error."
        )
    if recipe.train.get("packing") and recipe.train.get("packing_strategy", "bfd") != "bfd":
        raise ValueError("This train.packing_strategy splits rows, and a file answers about whole ones: bfd.")
    return dataclasses.replace(recipe, train={**recipe.train, "packing": False})


def _import(
    recipe: Recipe,
    source: TeacherFile,
    guesses: bool,
    rows_path: Path | None,
    overwrite: bool,
    progress: Progress,
) -> ImportSummary:
    planned = plan(recipe)
    planned.require_sound()
    planned.say_warnings(progress)
    trainer = rows_trainer(planned)
    rows = list(recipe_rows(trainer))
    match = find_rows(rows, source, planned, progress)
    found = [row for row, number in zip(rows, match.numbers, strict=True) if number >= 0]
    reason = why_unmatched(match, source, planned)
    if not found:
        raise ValueError(f"None of the {len(rows):,} rows of the recipe is in {source.path}. {reason}")
    assert recipe.cache is not None
    layout = lay_out(_for_layout(found), max(1, recipe.cache.shard_bytes // _bytes(recipe, source)))
    written = _ImportedShards(planned, source, match, layout, guesses)
    written.open(overwrite, trainer)
    summary = written.write(progress)
    if rows_path is not None:
        JsonLines(rows_path).write(
            {"input_ids": row.ids.tolist(), "labels": _labels(row)} for row in found if len(row.keys)
        )
    return summary._replace(rows=len(rows), matched=len(found), unmatched=reason)


def _for_layout(rows: list[RecipeRow]) -> Iterable[tuple[Mapping[str, Any], Tensor]]:
    return (({"input_ids": row.ids}, row.keys) for row in rows)


def _labels(row: RecipeRow) -> list[int]:
    labels = np.full(len(row.ids), -100)
    labels[row.places + 1] = row.labels.numpy()
    return labels.tolist()


def _kept(recipe: Recipe, source: TeacherFile) -> int:
    """Tokens of a position.

    Raises:
        ValueError: more than the file has.
    """
    asked = recipe.cache.top_k if recipe.cache is not None else None
    if asked is not None and asked > source.k:
        raise ValueError(f"cache.top_k is {asked}, and {source.path} has {source.k} tokens a place.")
    return asked or source.k


def _bytes(recipe: Recipe, source: TeacherFile) -> int:
    return _kept(recipe, source) * (4 + source.dtype.itemsize) + 8


class _ImportedShards:
    """Writes the shards of an import."""

    def __init__(self, planned: Plan, source: TeacherFile, match: Match, layout: Layout, guesses: bool):
        self._planned, self._source, self._layout, self._guesses = planned, source, layout, guesses
        assert planned.recipe.cache is not None
        self._folder = Path(planned.recipe.cache.path)
        self._k = _kept(planned.recipe, source)
        self._vocab = teacher_vocab(planned)
        pairs = [(row, n) for row, n in zip(match.rows, match.numbers.tolist(), strict=True) if n >= 0]
        self._rows = [row for row, _ in pairs]
        self._numbers = [number for _, number in pairs]
        self._outside, self._short, self._mass = 0, 0, 0.0

    def _target(self) -> dict[str, Any]:
        recipe, layout = self._planned.recipe, self._layout
        assert recipe.cache is not None
        imported = {
            "from": self._source.path,
            "digest": digest_text(self._source.digest()),
            "guesses_labels": self._guesses,
            "scaled": self._source.scaled,
        }
        return {
            "format": FORMAT,
            "kind": "top_k",
            "dtype": str(self._source.dtype).removeprefix("torch."),
            "top_k": self._k,
            "shard_bytes": recipe.cache.shard_bytes,
            "shards": len(layout.starts) - 1,
            "positions": len(layout.keys),
            "date": self._planned.date and self._planned.date.isoformat(),
            "fingerprint": {
                "name": recipe.teacher.title,
                "data": recipe.data.path,
                "teacher": {"imported": imported},
                "rows": xxhash.xxh3_128_hexdigest(np.sort(layout.keys).tobytes()),
                **tokenizer_fingerprint(load_tokenizer(recipe.student, "student"), self._planned.args),
            },
        }

    def open(self, overwrite: bool, trainer: Any) -> None:
        target = self._target()
        open_folder(self._folder, target, overwrite)
        verify_own_share(self._folder, target["shards"], trainer)
        check_disk(self._folder, self._size(), self._size())

    def _size(self) -> int:
        positions = len(self._layout.keys)
        return positions * _bytes(self._planned.recipe, self._source) + index_bytes(positions)

    def write(self, progress: Progress) -> ImportSummary:
        target, folder = self._target(), self._folder
        progress.say(
            f"{len(self._layout.keys):,} label positions of {len(self._rows):,} rows, {self._k} tokens each: "
            f"{size_text(self._size())}"
        )
        bar = progress.bar("shards")
        for number in range(target["shards"]):
            tensors = self._shard(number)  # read all of it, for the counts
            if not (folder / f"shard-{number:05d}.json").is_file():
                with writing(folder):
                    save_shard(folder, number, tensors)
            bar(number + 1, target["shards"])
        count = len(self._layout.keys)
        if not (folder / ABOUT).is_file():
            self._finish(target)
        return ImportSummary(
            folder, 0, 0, count, self._mass / max(count, 1), self._outside, self._short, None
        )

    def _finish(self, target: dict[str, Any]) -> None:
        folder, role = self._folder, "teacher"
        with writing(folder):
            load_tokenizer(self._planned.recipe.teacher, role).save_pretrained(folder / TEACHER)
            self._planned.teacher_configs[role].save_pretrained(folder / TEACHER)
            shards = [read_json(folder / f"shard-{number:05d}.json") for number in range(target["shards"])]
            about = {**target, "vocab": self._vocab, "head": None, "labels_outside": self._outside}
            about.pop("shards")
            save_index(folder, self._layout.keys, shards, about)
            write_json(folder / "teacher.json", {"vocab": self._vocab, "head": None})

    def _shard(self, number: int) -> dict[str, Tensor]:
        parts = []
        for place in self._layout.shard(number):
            row = int(self._layout.rows[place])
            parts.append(self._row(self._rows[row], self._numbers[row], self._layout.masks[place]))
        return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}

    def _row(self, row: RecipeRow, number: int, mask: npt.NDArray[np.bool_]) -> dict[str, Tensor]:
        """The stored tensors of a row."""
        places = torch.from_numpy(row.places[mask])
        found, labels = self._source.answers(number), row.labels[torch.from_numpy(mask)]
        tokens, logprobs = found.tokens[places, : self._k], found.logprobs[places, : self._k]
        told = torch.isfinite(logprobs)
        rest = (1.0 - logprobs.double().exp().sum(-1)).clamp_min(_LEAST_TAIL)
        self._mass += 0.0 if self._source.scaled else float(rest.sum())
        self._short += int((~told.all(-1)).sum())
        # An even share of what is left, as the tail rule has it.
        least = torch.where(told, logprobs.double(), 0.0).amin(-1)
        share = torch.log(rest / (self._vocab - told.sum(-1)).clamp_min(1)).minimum(least)
        if found.label_logprobs is None:
            at = told & (tokens == labels[:, None])
            known = at.any(-1)
            said = torch.where(at, logprobs.double(), 0.0).sum(-1)
            label_logprobs = torch.where(known, said, share)
            self._outside += int((~known).sum())
        else:
            label_logprobs = found.label_logprobs[places]
        logprobs = torch.where(told, logprobs, share[:, None].to(logprobs.dtype))
        tail = (1.0 - logprobs.double().exp().sum(-1)).clamp_min(_LEAST_TAIL)
        return {
            "tokens": _filled(tokens, told).int(),
            "logprobs": logprobs,
            "label_logprobs": label_logprobs.float(),
            "tail": tail.float(),
        }


def _filled(tokens: Tensor, told: Tensor) -> Tensor:
    """Tokens of a position that are all different: where none is told, the first that are not among them."""
    tokens = tokens.clone()
    for row, known in zip(tokens, told, strict=True):
        if not known.all():
            there = set(row[known].tolist())
            free = [token for token in range(2 * len(row)) if token not in there]
            row[~known] = torch.tensor(free[: int((~known).sum())])
    return tokens
