"""Token counts of the first rows, as training will make them: lengths, labels, ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow.compute
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hpd.data.reading import first_rows
from hpd.data.tokens import tokenise

__all__ = ["Lengths", "check_ids", "greatest_id", "measure"]

_MEASURED_ROWS = 256


class Lengths(NamedTuple):
    """Tokens of the measured rows."""

    num_rows: int
    percentiles: dict[int, int]
    """Tokens per row at the 50th, 90th, 99th and 100th percentile."""
    label_tokens: float
    """Mean label tokens per row, after max_length."""
    cut_rows: float
    """Share of rows that max_length cuts."""
    lost_rows: float
    """Share of rows left without any label by it."""
    ends_with_eos: float
    """Share of uncut rows whose last label is an end-of-sequence token."""
    label_share: float
    """Labels among all tokens, after max_length."""


def measure(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    labels: str,
    truncation_mode: str = "keep_start",
) -> Lengths:
    """Tokenise the first rows as training will, to see lengths and labels before any model is loaded.

    Args:
        rows: in a format of TRL's.
        tokenizer: the student's.
        max_length: longest row, in tokens; None: rows are not cut.
        labels: as `tokenise` takes them.
        truncation_mode: the end of a long row that stays, keep_start or keep_end.

    Raises:
        ValueError: not a single label is left in the measured rows.
    """
    lengths: list[int] = []
    kept: list[int] = []
    finished: list[bool] = []
    from_end = truncation_mode == "keep_end"
    for row in first_rows(rows, _MEASURED_ROWS):
        ids, mask = tokenise(dict(row), tokenizer, labels)
        lengths.append(len(ids))
        kept.append(sum(mask[-max_length:] if max_length and from_end else mask[:max_length]))
        if max_length is None or len(ids) <= max_length:
            last = max((i for i, bit in enumerate(mask) if bit), default=None)
            finished.append(last is not None and _is_end(ids, last, tokenizer))
    sizes = np.array(lengths)
    left = np.array(kept)
    if not left.any():
        raise ValueError(
            f"Every label is masked: none of the first {len(sizes)} rows has a completion token within "
            f"max_length={max_length} (median row: {int(np.median(sizes))} tokens). Raise train.max_length, "
            "or check data.labels and the columns."
        )
    return Lengths(
        len(sizes),
        {p: int(np.percentile(sizes, p)) for p in (50, 90, 99, 100)},
        float(left.mean()),
        float((sizes > (max_length or np.inf)).mean()),
        float((left == 0).mean()),
        float(np.mean(finished or [0.0])),
        float(left.sum() / np.minimum(sizes, max_length or np.inf).sum()),
    )


def greatest_id(rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, labels: str) -> int:
    """Return the greatest token id of the first rows; 0 without any."""
    tokenised = (tokenise(dict(row), tokenizer, labels)[0] for row in first_rows(rows, _MEASURED_ROWS))
    return max((max(ids, default=0) for ids in tokenised), default=0)


def check_ids(rows: Dataset | IterableDataset, vocab_size: int) -> None:
    """Refuse rows of token ids of another vocabulary.

    Raises:
        ValueError: an id that the student has no row for, with the number of the first such row.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    tokens = rows.data.column("input_ids").combine_chunks().flatten()
    greatest = pyarrow.compute.max(tokens).as_py()  # type: ignore[attr-defined]
    if greatest is None or greatest < vocab_size:
        return
    for index, ids in enumerate(rows["input_ids"]):
        if ids and max(ids) >= vocab_size:
            raise ValueError(
                f"Row {index} has the token {max(ids)} among its input_ids, and the student's head has "
                f"{vocab_size} tokens: the rows were tokenised for another model."
            )


def _is_end(ids: list[int], last: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the row's last label ends the turn; templates put a newline behind their end token."""
    tail = list(ids[max(0, last - 1) : last + 1])
    return any(i == tokenizer.eos_token_id or i in tokenizer.all_special_ids for i in tail)
