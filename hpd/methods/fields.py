"""Checks that a configuration makes of its own fields, with errors that name the field."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["STRICT", "check_fields", "nearest"]

# Read by pydantic, for which this is a `ConfigDict`; configurations of this package do without it.
STRICT: Any = {"extra": "forbid", "allow_inf_nan": False}


def nearest(name: str, allowed: Sequence[str]) -> str:
    """The end of an error message: what was probably meant, or all that is allowed."""
    close = get_close_matches(name, allowed, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Allowed: {', '.join(allowed)}."


def check_fields(config: Any, where: str, **ranges: tuple[bool, str]) -> None:
    """Hold the fields of a dataclass to what they declare; called in its `__post_init__`.

    Args:
        config: the dataclass; a field annotated with a `Literal` must have one of its values.
        where: its place in a recipe, such as "rollouts".
        ranges: by field, if its value is in range, and the range in words.

    Raises:
        ValueError: the first value that is not allowed, by its place in the recipe.
    """
    for name, choices in _choices(type(config)).items():
        value = getattr(config, name)
        if value not in choices:
            allowed = [choice for choice in choices if choice is not None]
            raise ValueError(f"{where}.{name} is {value!r}. {nearest(str(value), allowed)}")
    for name, (valid, allowed) in ranges.items():
        if not valid:
            raise ValueError(f"{where}.{name} must be {allowed}, got {getattr(config, name)}.")


@functools.cache
def _choices(config: type) -> dict[str, tuple[Any, ...]]:
    """Fields whose type is a choice of literals, with or without None."""
    found = {}
    for name, hint in get_type_hints(config).items():
        options = (hint,) if get_origin(hint) is Literal else get_args(hint)
        literals = [option for option in options if get_origin(option) is Literal]
        others = [option for option in options if option not in (*literals, type(None))]
        if literals and not others:
            found[name] = (*get_args(literals[0]), *(None for option in options if option is type(None)))
    return found
