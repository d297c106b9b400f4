"""One malformed input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Case", "recipe_with"]


class Case(NamedTuple):
    """How the input is made and what must be said about it."""

    build: Callable[[Path], list[str]]
    """Makes the input in an empty folder; returns the arguments behind `hpd`. {recipe}, {student} and {rows}
    are good ones."""
    message: str
    """Pattern that the error matches."""


def recipe_with(*overrides: str) -> Callable[[Path], list[str]]:
    """`hpd train` of the good recipe with overrides, in which {here} is the case's folder."""
    return lambda folder: ["train", "{recipe}", *(text.replace("{here}", str(folder)) for text in overrides)]
