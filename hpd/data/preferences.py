"""Rows of two answers to one prompt, for preference optimization."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from hpd.config.schema import DataConfig
from hpd.data.checks import check_mixed
from hpd.data.convert import convert
from hpd.data.formats import RowFormat, choose_format
from hpd.data.reading import first_rows, read

__all__ = ["load_preferences"]


def load_preferences(config: DataConfig) -> Dataset:
    """Rows with prompt, chosen and rejected, for preference optimization.

    Raises:
        FileNotFoundError, ValueError: as `load_rows`; a column is missing, or text pairs are to be what only
            conversations are.
    """
    rows = read(config.path, config)
    wanted = ("prompt", "chosen", "rejected")
    given = {name: config.columns.get(name, name) for name in wanted}
    if missing := [name for name in given.values() if name not in rows.column_names]:
        raise ValueError(
            f"Preference pairs need the columns prompt, chosen and rejected, and {config.path} lacks "
            f"{', '.join(missing)} (found: {', '.join(rows.column_names)}): map them in data.columns."
        )
    kinds = choose_format(rows.column_names, config.columns, style=config.format, ignored=config.ignore)
    layout = next(one for one in (kinds, *kinds.others) if one.kind == "preference")
    check_mixed(rows, given)
    rows = rows.map(
        _preference_row,
        with_indices=True,
        fn_kwargs={"layout": layout, "rejected": given["rejected"], "system_prompt": config.system_prompt},
        remove_columns=rows.column_names,
    )
    _check_preferences(rows, config)
    return rows


def _check_preferences(rows: Any, config: DataConfig) -> None:
    """Refuse settings of `data` that pairs do not follow: TRL takes them as they are."""
    texts = any(isinstance(row["prompt"], str) for row in first_rows(rows, 64))
    asked = {
        "data.system_prompt": texts and bool(config.system_prompt),
        "data.format: plain": not texts and config.format == "plain",
    }
    for name, idle in asked.items():
        if idle:
            raise ValueError(
                f"{name} has no effect on preference pairs, which are learned as they are written, and those "
                f"of {config.path} are {'text' if texts else 'messages'}: write them as "
                f"{'messages' if texts else 'text'}, or remove it."
            )


def _preference_row(
    row: dict[str, Any], index: int, layout: RowFormat, rejected: str, system_prompt: str | None
) -> dict[str, Any]:
    """A pair as TRL reads it: either answer is that of a row which is learned."""
    other = {**row, layout.source["chosen"]: row[rejected]}
    better, worse = (
        convert(one, index, layout, "completion", system_prompt=system_prompt) for one in (row, other)
    )
    if better["prompt"] != worse["prompt"]:
        raise ValueError(
            f"Row {index} has a chosen and a rejected answer behind different prompts, and a preference is "
            "between answers to one prompt: correct or remove the row."
        )
    chosen = better.pop("completion")
    return {**better, "chosen": chosen, "rejected": worse["completion"]}
