"""Rows that weigh differently in a term: the dataset's column, laid over the tokens of each row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from hpd.batch import IGNORE_INDEX, POSITION_WEIGHTS
from hpd.methods.terms import Term

__all__ = ["check_weighed", "weigh_rows", "weight_column"]


def weight_column(terms: Sequence[Term]) -> str | None:
    """The column that terms are weighed by; None: by none."""
    columns = [
        term.positions.column for term in terms if term.positions is not None and term.positions.column
    ]
    return columns[0] if columns else None


def weigh_rows(
    rows: Dataset | IterableDataset, column: str, *, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Prepared rows with `position_weights`: the row's number of `column`, once for each token, so that it
    survives cuts and packing as a label does.

    Args:
        rows: with `input_ids`.
        column: one number >= 0 a row.
        num_proc: processes, as `train.dataset_num_proc` says.

    Raises:
        ValueError: no such column, or a row whose weight is not a finite number >= 0.
    """
    found = list(rows.column_names or next(iter(rows), {}))
    if column not in found:
        raise ValueError(
            f"weight.column is {column!r}, which the dataset does not have: {', '.join(found)}. In rows from "
            "Python the column must stand among the others, for validation too."
        )
    options: Any = {} if isinstance(rows, IterableDataset) else {"num_proc": num_proc}
    return rows.map(_weighed, with_indices=True, fn_kwargs={"column": column}, **options)


def _weighed(row: Mapping[str, Any], index: int, column: str) -> dict[str, list[float]]:
    value = row[column]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(
            f"Row {index} has {column}: {value!r}, and what a row weighs is a finite number >= 0: correct or "
            "remove the row."
        )
    return {POSITION_WEIGHTS: [float(value)] * len(row["input_ids"])}


def check_weighed(terms: Sequence[Term], rows: Any) -> None:
    """Refuse rules over positions that no row gives anything to do; a stream's rows are not read.

    Args:
        terms: what is learned.
        rows: prepared for training.

    Raises:
        ValueError: every row weighs nothing, or every answer is one step.
    """
    if not isinstance(rows, Dataset) or not len(rows):
        return
    rules = [term.positions for term in terms if term.positions is not None]
    if any(rule.rule == "column" for rule in rules) and not any(map(any, rows[POSITION_WEIGHTS])):
        raise ValueError(
            "Every row weighs 0, so nothing would be learned: give some of them a weight above 0."
        )
    if any(rule.rule == "steps" for rule in rules) and not any(_has_steps(row) for row in rows):
        raise ValueError(
            "A term is weighed by steps, and in every row the labels are one stretch, whose weight is 1: "
            "give conversations with several turns of the assistant and set data.labels: assistant, or "
            "take another rule."
        )


def _has_steps(example: Any) -> bool:
    """True if something else stands between two labels of a row; an example may hold several, packed."""
    labels = example.get("labels") or example["input_ids"]
    begin = 0
    for length in example.get("seq_lengths") or [len(labels)]:
        labeled = [label != IGNORE_INDEX for label in labels[begin : begin + length]]
        if sum(bit and not before for bit, before in zip(labeled, [False, *labeled], strict=False)) > 1:
            return True
        begin += length
    return False
