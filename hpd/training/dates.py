"""The first day of a run, which chat templates print: kept in the run's folder and in caches."""

from __future__ import annotations

import copy
import datetime
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from hpd.config.schema import Recipe
from hpd.data.dates import prints_date
from hpd.data.templates import read_template
from hpd.files import write_json
from hpd.teachers import CachedTeacher
from hpd.teachers.cache import ABOUT, PLAN
from hpd.training.checkpoints import newest_complete

__all__ = ["DATE", "first_day", "first_day_of_folder", "keep_day", "own_copy"]

DATE = "date.json"
"""The file of a run's folder with its first day, as {"date": "2026-01-31"}."""

_LOGGER = logging.getLogger(__name__)


def first_day(recipe: Recipe, fresh: bool = False) -> datetime.date:
    """The day that the run began, or that the cache it reads or goes on writing was begun; else today.

    Args:
        recipe: of the run.
        fresh: do not look into the run's folder.

    Raises:
        ValueError: a file that should hold the date does not.
    """
    run = Path(recipe.output_dir)
    # A stage has the day of its run, in whose folder it is.
    places = [] if fresh else [run / DATE, run.parent / DATE]
    caches = [t.path for t in (recipe.teacher, *recipe.teacher.teachers.values()) if t.type == "cached"]
    places += [Path(path) / ABOUT for path in caches if path]
    if not caches and recipe.cache is not None:
        places.append(Path(recipe.cache.path) / PLAN)
    return _first(places)


def first_day_of_folder(run: str, teacher: Any) -> datetime.date:
    """The same of a trainer without a recipe; a folder without a checkpoint to go on from holds no run.

    Processes that are asked on both sides of midnight take the main one's answer.

    Args:
        run: its output_dir.
        teacher: a `Teacher`, or what it is made from.

    Raises:
        ValueError: as `first_day`.
    """
    folder = Path(run)
    places = [folder / DATE] if newest_complete(folder, quiet=True) is not None else []
    places += [cached.cache.path / ABOUT for cached in _caches(teacher)]
    return broadcast_object_list([_first(places)])[0]


def keep_day(day: datetime.date, run: str, checkpoint: str | None, is_main: bool) -> None:
    """Note the day in a run's folder, after comparing it with the day of the checkpoint to go on from.

    Args:
        day: that the rows were rendered with.
        run: output_dir.
        checkpoint: None: the run begins.
        is_main: this process writes.

    Raises:
        ValueError: the checkpoint's run began on another day.
    """
    if checkpoint is not None:
        before = Path(checkpoint).parent
        began = _read(before / DATE) if (before / DATE).is_file() else None
        if began is None:
            _LOGGER.warning(
                "The chat template prints the date, and %s, whose checkpoint training resumes from, has no "
                "%s: rows are rendered with %s, and may have been with another day.",
                *(before, DATE, day),
            )
        elif began != day:
            raise ValueError(
                f"The chat template prints the date. The run of {checkpoint} began on {began}, and the rows "
                f"here are rendered with {day}: build the trainer with output_dir={str(before)!r}, where "
                f"that day is kept, or copy {before / DATE} and a checkpoint into {run} first."
            )
    file = Path(run) / DATE
    if is_main and (not file.is_file() or _read(file) != day):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"date": day.isoformat()})


def own_copy(processing_class: Any, template_path: str | None) -> Any:
    """A copy of a tokenizer (or processor) whose template prints the date: the caller's keeps its clock.

    Args:
        template_path: `args.chat_template_path`; None: the tokenizer has its own template.

    Raises:
        ValueError: no template there.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None or getattr(tokenizer, "template_date", None) is not None:
        return processing_class
    template = read_template(template_path) if template_path else tokenizer.chat_template
    return copy.deepcopy(processing_class) if prints_date(template) else processing_class


def _caches(teacher: Any) -> Iterator[CachedTeacher]:
    if isinstance(teacher, CachedTeacher):
        yield teacher
    for part in (getattr(teacher, "teachers", None) or {}).values():
        yield from _caches(part)


def _first(files: Iterable[Path]) -> datetime.date:
    """The day in the first file that has one; else today."""
    for file in files:
        if file.is_file() and (day := _read(file)) is not None:
            return day
    return datetime.date.today()


def _read(file: Path) -> datetime.date | None:
    """The date in a JSON file; None where it has none."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        day = content.get("date")
        return None if day is None else datetime.date.fromisoformat(day)
    except (ValueError, AttributeError, TypeError) as error:
        if file.name != DATE:
            return None  # a damaged cache is refused with its own message
        raise ValueError(f"{file} is damaged ({error}): delete it, and the date is today's.") from None
