"""Public names that changed: their earlier forms are read until the next release, and say so once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["TakesEarlierNames", "new_keys", "new_metrics", "new_name", "with_new_names"]

_LOGGER = logging.getLogger(__name__)

_KEYS = {"num_draws": "num_samples", "draw_share": "sample_fraction"}
_NAMES = {"hpd_exact": "hpd_expected"}
_METRICS = {
    "drawn_label": "sampled_label",
    "mass_moved": "total_weight",
    "punished": "sample_penalized",
    "suppressed": "label_penalized",
}


def new_keys(given: Mapping[str, Any], quiet: bool = False) -> dict[str, Any]:
    """Keys of a term, or parameters of a method, under the names of today.

    Raises:
        ValueError: a key under its earlier name and under today's.
    """
    found = dict(given)
    for old in [key for key in given if key in _KEYS]:
        new = _KEYS[old]
        if new in found:
            raise ValueError(f"{old} and {new} are one key, which was renamed: give {new} alone.")
        found = {new if key == old else key: value for key, value in found.items()}
        if not quiet:
            _say(old, new)
    return found


def new_name(name: str, quiet: bool = False) -> str:
    """A method's or objective's name of today."""
    new = _NAMES.get(name, name)
    if new != name and not quiet:
        _say(name, new)
    return new


def new_metrics(log: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl that may be of an earlier version, with the names of today."""
    return {f"{_before(key)}{_METRICS.get(_bare(key), _bare(key))}": value for key, value in log.items()}


def with_new_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that was kept, with the names of today, to be compared with one of today."""
    found = dict(tree)
    if isinstance(method := found.get("method"), str):
        found["method"] = new_name(method, quiet=True)
    if isinstance(kwargs := found.get("method_kwargs"), Mapping):
        found["method_kwargs"] = new_keys(kwargs, quiet=True)
    if isinstance(terms := found.get("terms"), (list, tuple)):
        found["terms"] = [_of_term(term) for term in terms]
    return found


class TakesEarlierNames(type):
    """Of a dataclass whose constructor takes its fields under their earlier names, too."""

    def __call__(cls, **given: Any) -> Any:
        return super().__call__(**new_keys(given))


def _of_term(term: Any) -> Any:
    if not isinstance(term, Mapping):
        return term
    found = new_keys(term, quiet=True)
    if isinstance(objective := found.get("objective"), str):
        found["objective"] = new_name(objective, quiet=True)
    return found


def _bare(key: str) -> str:
    """A metric without what says where it was measured."""
    return key.removeprefix("eval_")


def _before(key: str) -> str:
    return key[: len(key) - len(_bare(key))]


@functools.cache
def _say(old: str, new: str) -> None:
    _LOGGER.warning("%s is called %s now; the earlier name is read until the next release.", old, new)
