"""What may change in a recipe whose run goes on, and what else differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hpd.config.load import is_push_key
from hpd.config.yaml_file import shorten

__all__ = ["Change", "changes_between", "raises_steps", "refused"]

# Sections that say nothing about what is learned.
_FREE = ("guards", "generate", "cache")

# Fields of `train` that say when something is written down, and for whom.
_FREE_OF_TRAIN = (
    "disable_tqdm",
    "log_level",
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)

_DEFAULT_EPOCHS = 3.0  # of TrainingArguments


class Change(NamedTuple):
    """A key that two recipes differ in."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("not given" if value is None else shorten(value) for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def changes_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The keys in which two resolved recipes differ; a key that is not there counts as null."""
    return list(_walk("", before, now))


def refused(
    changes: list[Change], before: Mapping[str, Any], now: Mapping[str, Any], *, may_raise: bool
) -> list[Change]:
    """The changes that make another run of it.

    Args:
        may_raise: more steps or epochs than before are allowed.
    """
    raised = may_raise and raises_steps(before, now)
    return [change for change in changes if not (_is_free(change.key) or (raised and _is_length(change.key)))]


def raises_steps(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """True if a recipe asks for more steps or epochs than an earlier form of it."""
    steps = [tree.get("train", {}).get("max_steps") or -1 for tree in (before, now)]
    epochs = [tree.get("train", {}).get("num_train_epochs", _DEFAULT_EPOCHS) for tree in (before, now)]
    if steps[1] > 0:  # the number of epochs then has no effect
        return steps[1] > steps[0] > 0
    return steps[0] <= 0 and epochs[1] > epochs[0]


def _is_free(key: str) -> bool:
    section, _, field = key.partition(".")
    is_free = field in _FREE_OF_TRAIN or is_push_key(field)
    return section in _FREE or (section == "train" and is_free)


def _is_length(key: str) -> bool:
    return key in ("train.max_steps", "train.num_train_epochs")


def _walk(prefix: str, before: Any, now: Any) -> Iterator[Change]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _walk(f"{prefix}.{key}".lstrip("."), before.get(key), now.get(key))
    elif before != now:
        yield Change(prefix, before, now)
