"""Several datasets as one: shares of rows, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pyarrow
from datasets import Dataset, concatenate_datasets, interleave_datasets

from hpd.config.schema import DataConfig
from hpd.data.formats import RowFormat
from hpd.data.reading import first_rows

__all__ = ["mix"]


def mix(
    config: DataConfig, load: Callable[[DataConfig], tuple[Any, RowFormat]]
) -> tuple[Any, list[RowFormat], str]:
    """The rows of `config.parts`, mixed; each part's format; and how many rows each gave, in words.

    With shares, part i gives the same number of rows as the others per unit of its share, and the part that
    is used up first ends the mixture: no row comes twice. Of a longer part, a draw with seed 0 is taken.

    Args:
        config: with `parts`.
        load: reads a part, in a format of TRL's.

    Raises:
        ValueError: as `load`; or parts whose columns hold different things.
    """
    parts = [
        replace(
            part,
            labels=config.labels,
            streaming=config.streaming,
            system_prompt=part.system_prompt or config.system_prompt,
            format=config.format if part.format == "auto" else part.format,
        )
        for part in config.parts
    ]
    loaded = [load(part) for part in parts]
    layouts = [layout for _, layout in loaded]
    rows = [one for one, _ in loaded]
    shares = [part.share for part in parts if part.share is not None]
    if config.streaming:
        probabilities = [share / sum(shares) for share in shares] or None
        mixed = interleave_datasets(rows, probabilities=probabilities, seed=0)
        given = [f"{part.path}: {part.share or 'in turn'}" for part in parts]
    else:
        per_share = min((len(one) / share for one, share in zip(rows, shares, strict=False)), default=0.0)
        counts = [max(1, int(per_share * share)) for share in shares] or [len(one) for one in rows]
        taken = [
            one if count == len(one) else one.shuffle(seed=0).select(range(count))
            for one, count in zip(rows, counts, strict=True)
        ]
        mixed = _together(taken).shuffle(seed=0)
        given = [
            f"{part.path}: {count:,} of {len(one):,} rows ({count / sum(counts):.0%})"
            for part, one, count in zip(parts, rows, counts, strict=True)
        ]
    limited = mixed if config.limit is None else first_rows(mixed, config.limit)
    return limited, layouts, "; ".join(given)


def _together(parts: list[Dataset]) -> Dataset:
    """The parts below each other; turns of different keys get the keys of all."""
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError, pyarrow.ArrowInvalid):
        listed = [cast("dict[str, Any]", row) for part in parts for row in part]
        names = dict.fromkeys(name for part in parts for name in part.column_names)
        return Dataset.from_dict({name: [row.get(name) for row in listed] for name in names})
