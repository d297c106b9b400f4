"""Rollouts that were written earlier, with how likely their writer found each token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from hpd.batch import BEHAVIOR_LOGPROBS, DATASET, IGNORE_INDEX, SOURCES, STUDENT

__all__ = ["mark_rollouts", "without_rollouts"]


def mark_rollouts(
    rows: Dataset | IterableDataset, *, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Prepared rows whose labels are the student's, with `behavior_logprobs` checked: a number for each
    token, NaN where it is no label, so that it survives cuts and packing as a label does.

    Args:
        rows: with `input_ids`, `labels` and `behavior_logprobs`, one entry for each token.
        num_proc: processes, as `train.dataset_num_proc` says.

    Raises:
        ValueError: a column is missing, or a row whose log-probabilities are not one for each token, finite
            and at most 0 at each label, and null elsewhere.
    """
    found = list(rows.column_names or next(iter(rows), {}))
    if missing := [name for name in ("input_ids", "labels", BEHAVIOR_LOGPROBS) if name not in found]:
        raise ValueError(
            f"prefixes.stored reads rollouts as token ids, and the rows lack {', '.join(missing)} (found: "
            f"{', '.join(found)}): write them with hpd generate and generate.logprobs: true."
        )
    options: Any = {} if isinstance(rows, IterableDataset) else {"num_proc": num_proc}
    return rows.map(_marked, with_indices=True, **options)


def without_rollouts(rows: Any) -> Any:
    """Rows for evaluation: whoever wrote them, no ratio is taken there."""
    names = [name for name in (BEHAVIOR_LOGPROBS, SOURCES) if name in (rows.column_names or ())]
    return rows.remove_columns(names) if names else rows


def _marked(row: Mapping[str, Any], index: int) -> dict[str, list[Any]]:
    labels, given = row["labels"], row[BEHAVIOR_LOGPROBS]
    if not isinstance(given, list) or len(given) != len(labels):
        size = f"{len(given)} entries" if isinstance(given, list) else f"{type(given).__name__}"
        raise ValueError(
            f"Row {index} has {len(labels)} tokens and a {BEHAVIOR_LOGPROBS} of {size}: it needs one for "
            "each token, null for those without a label."
        )
    out = []
    for place, (label, value) in enumerate(zip(labels, given, strict=True)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if label == IGNORE_INDEX:
            if value is not None and not (is_number and math.isnan(value)):
                raise ValueError(
                    f"Row {index} has {BEHAVIOR_LOGPROBS} {value!r} at token {place}, which has no label: "
                    "labels and log-probabilities belong to different rows. Write null there."
                )
            out.append(math.nan)
        elif not is_number or not math.isfinite(value) or value > 0:
            raise ValueError(
                f"Row {index} has {BEHAVIOR_LOGPROBS} {value!r} at token {place}, and the log-probability of "
                "a token that was drawn is a finite number <= 0, in nats: correct or remove the row."
            )
        else:
            out.append(float(value))
    sources = [DATASET if label == IGNORE_INDEX else STUDENT for label in labels]
    return {BEHAVIOR_LOGPROBS: out, SOURCES: sources}
