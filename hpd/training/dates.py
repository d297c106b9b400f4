"""The first day of a run, which chat templates print: kept in the run's folder and in caches."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from hpd.config.schema import Recipe
from hpd.teachers.cache import ABOUT, PLAN

__all__ = ["DATE", "first_day"]

DATE = "date.json"
"""The file of a run's folder with its first day, as {"date": "2026-01-31"}."""


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
    for file in places:
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
