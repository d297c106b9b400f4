"""YAML files that people write: nothing in them is run, and errors name the place."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from hpd.files import look_beside

__all__ = ["parse_yaml", "read_text", "read_yaml", "shorten"]

# Values of a file once its aliases are followed. Recipes have hundreds; a few lines of nested aliases can
# make billions.
MAX_VALUES = 100_000

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3


def shorten(value: Any) -> str:
    """`repr`, cut to what an error message can hold."""
    return _SHORT.repr(value)


def read_yaml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError, ValueError: as `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, kind), str(path), kind, "student, teacher, data")


def read_text(path: Path, kind: str) -> str:
    """A file of text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or bytes that are not UTF-8.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the YAML file of the {kind}.")
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" YAML files there: {', '.join(known[:8])}." if known else ""
        raise FileNotFoundError(f"No {kind} at {path}.{hint}")
    look_beside(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): save the {kind} as UTF-8."
        ) from None


def parse_yaml(text: str, name: str, kind: str, keys: str) -> dict[str, Any]:
    """The mapping in a YAML text.

    Args:
        name: what the text is called in errors.
        kind: what it should be.
        keys: how such a mapping starts.

    Raises:
        ValueError: not YAML, YAML that would build Python objects, a key given twice, no mapping, or more
            values than any recipe has.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        # A date such as 2026-13-45 looks like one to the resolver and not to the constructor.
        raise ValueError(f"{name} is not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be a {kind}.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name} holds no mapping: a {kind} starts with keys such as {keys}.")
    _check_size(tree, name, kind)
    return tree


class _Loader(yaml.SafeLoader):
    """SafeLoader, which builds plain data only, that refuses a key given twice: the second would win
    silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _check_size(tree: Any, name: str, kind: str) -> None:
    waiting = [tree]
    num_values = 0
    while waiting:
        value = waiting.pop()
        num_values += 1
        if num_values > MAX_VALUES:
            raise ValueError(
                f"{name} has more than {MAX_VALUES} values with its aliases (*name) followed: that is not a "
                f"{kind}."
            )
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
