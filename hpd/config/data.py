"""Where rows come from and what they mean: the recipe's `data`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from hpd.methods.fields import STRICT, check_fields

__all__ = ["DataConfig", "data_shorthand"]

_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def data_shorthand(value: Any) -> Any:
    """A list of datasets as their mixture, and a path as its dataset."""
    if isinstance(value, (list, tuple)):
        return {"parts": value}
    return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset whose completions are the prefixes."""

    __pydantic_config__ = STRICT

    path: str = ""
    """Local .jsonl, .json, .csv, .tsv or .parquet file (also .gz or .zst), a folder of them, or a Hub dataset
    id."""
    name: str | None = None
    """Configuration of a Hub dataset, or of a folder that was downloaded from the Hub."""
    split: str = "train"
    """Split to train on; slices such as train[:1%] work."""
    validation: float | str | Mapping[str, str] | None = None
    """A share of the rows held out, in (0, 1); or a file; or the name of another split; null: none. Several,
    measured apart, as {name: file or split}: their metrics are eval_NAME_loss, eval_NAME_forward_kl, ..."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns by what they are, such as {prompt: question, completion: answer}; a column that is named here
    counts, whatever others are called (docs/guides/data.md)."""
    ignore: tuple[str, ...] = ()
    """Columns to train without, although they change what is learned."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """chat: text prompts and completions become user and assistant messages (the student's chat template is
    applied).
    plain: text as it is. auto: as the rows are."""
    labels: Literal["completion", "assistant", "last_turn", "all"] = "completion"
    """The tokens that are learned. completion: the completion; of `messages` the assistant's turns, of
    text all; assistant: the assistant's turns, of completions too; last_turn: only the last; all: prompt
    too."""
    system_prompt: str | None = None
    """System message put before each conversation that has none."""
    limit: int | None = None
    """Use only the first n rows."""
    streaming: bool = False
    """Read rows as training needs them instead of preparing all at start; needs train.max_steps."""
    parts: tuple[Annotated[DataConfig, BeforeValidator(data_shorthand)], ...] = ()
    """Several datasets instead of one, mixed; `data: [...]` is short for it."""
    share: float | None = None
    """Of a part: its share of the rows, > 0, divided by the sum of all; null for each: all their rows."""

    def __post_init__(self) -> None:
        if not self.path.strip() and not self.parts:
            raise ValueError("data.path is empty: give a path or a Hub id.")
        check_fields(
            self,
            "data",
            limit=(self.limit is None or self.limit >= 1, ">= 1"),
            share=(self.share is None or self.share > 0, "> 0"),
        )
        if self.parts:
            self._check_parts()
        if isinstance(self.validation, Mapping):
            _check_sets(self.validation)
        if isinstance(self.validation, float) and self.streaming:
            raise ValueError(
                "A stream has no known length to take a share of: give data.validation a file or a split."
            )
        if isinstance(self.validation, float) and not 0.0 < self.validation < 1.0:
            raise ValueError(f"data.validation as a share must be in (0, 1), got {self.validation}.")

    def _check_parts(self) -> None:
        if self.path or self.name or self.columns or self.ignore:
            raise ValueError(
                "data.parts stands for several datasets: move path, name, columns and ignore into its "
                "entries."
            )
        given = [part.share is not None for part in self.parts]
        if any(given) and not all(given):
            raise ValueError(
                "data.parts: give each entry a share, or none (then all rows of each are taken)."
            )
        for part in self.parts:
            if part.parts or part.validation is not None or part.streaming or part.labels != "completion":
                raise ValueError(
                    "data.parts: validation, streaming and labels are of all parts together: write them "
                    f"next to parts (data: {{parts: [...], labels: ...}}), not in the entry {part.path!r}."
                )


def _check_sets(sets: Mapping[str, str]) -> None:
    """Refuse validation sets that cannot be told apart, or by names that metrics cannot have."""
    if not sets:
        raise ValueError("data.validation is an empty mapping: name one set or more, or remove it.")
    for name, place in sets.items():
        if not _SET_NAME.fullmatch(name):
            raise ValueError(
                f"data.validation: {name!r} becomes part of the names of metrics (eval_{name}_loss): give a "
                "name of letters, digits, '_' and '-', such as math."
            )
        if not place.strip():
            raise ValueError(f"data.validation.{name} is empty: give a file, or the name of a split.")
    places = list(sets.values())
    if double := [place for place in dict.fromkeys(places) if places.count(place) > 1]:
        raise ValueError(f"data.validation names {double[0]} twice: one set is measured once.")
