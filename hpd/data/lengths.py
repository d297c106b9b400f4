"""Token counts of the first rows, as training will make them: lengths, labels, ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hpd.data.reading import first_rows
from hpd.data.rendering import tokenize

__all__ = ["MEASURED_ROWS", "Cut", "Lengths", "check_ids", "greatest_id", "kept_part", "measure"]

MEASURED_ROWS = 256
"""Rows that are looked at before a run."""


class Cut(NamedTuple):
    """What a run does not read of the measured rows, and why."""

    masked_rows: int = 0
    """Rows without a label, whatever their length."""
    lost_rows: int = 0
    """Rows whose labels max_length cuts, all of them."""
    lost_tokens: int = 0
    """Tokens of these rows together."""
    cut_rows: int = 0
    """Rows that are shortened and stay."""
    cut_tokens: int = 0
    """Tokens that they lose."""
    cut_labels: int = 0
    """Labels that max_length cuts, of shortened and lost rows."""


class TeacherLengths(NamedTuple):
    """Tokens of the measured rows as a teacher reads them that has rows of its own."""

    percentiles: dict[int, int]
    """Tokens per row at the 50th, 90th, 99th and 100th percentile, as far as max_length leaves the answer."""
    tokens: float
    """Mean tokens per row."""
    label_tokens: float
    """Mean label tokens per row."""

    @classmethod
    def of(cls, rows: Any, measure: Callable[[Any, int], Mapping[str, Any]]) -> TeacherLengths:
        """From the first rows; `measure` takes one and its number to teacher_tokens and teacher_labels."""
        each = [measure(row, index) for index, row in enumerate(first_rows(rows, MEASURED_ROWS))]
        tokens, labels = ([one[name] for one in each] for name in ("teacher_tokens", "teacher_labels"))
        percentiles = {p: int(np.percentile(tokens, p)) for p in (50, 90, 99, 100)}
        return cls(percentiles, float(np.mean(tokens)), float(np.mean(labels)))


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
    """Share of rows with their end whose last label is an end-of-sequence token."""
    label_share: float
    """Labels among all tokens, after max_length."""
    kept_tokens: int = 0
    """Tokens of the measured rows that are read."""
    kept_labels: int = 0
    """Labels among them."""
    cut: Cut = Cut()
    """What is not read."""
    teacher: TeacherLengths | None = None
    """What the teacher reads; None: the same."""

    @property
    def tokens(self) -> float:
        """Mean tokens per row, after max_length."""
        return self.label_tokens / max(self.label_share, 1e-9)


def measure(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    labels: str,
    truncation_mode: str = "keep_start",
) -> Lengths:
    """Tokenize the first rows as training will, to see lengths and labels before any model is loaded.

    Args:
        rows: of training, in a format of TRL's.
        tokenizer: the student's.
        max_length: tokens that a row keeps; None: all.
        labels: as `tokenize` takes them.
        truncation_mode: keep_start or keep_end, the tokens that max_length keeps.

    Raises:
        ValueError: not a single label is left in the measured rows.
    """
    lengths: list[int] = []
    masks: list[np.ndarray] = []
    finished: list[bool] = []
    for row in first_rows(rows, MEASURED_ROWS):
        ids, mask = tokenize(dict(row), tokenizer, labels)
        lengths.append(len(ids))
        masks.append(np.array(mask, dtype=bool))
        if truncation_mode == "keep_end" or max_length is None or len(ids) <= max_length:
            last = max((i for i, bit in enumerate(mask) if bit), default=None)
            finished.append(last is not None and _is_end(ids, last, tokenizer))
    sizes = np.array(lengths)
    left = np.array([_num_labels(kept_part(mask, max_length, truncation_mode)) for mask in masks])
    if not left.any():
        raise ValueError(
            f"Every label is masked: none of the first {len(sizes)} rows has a completion token within "
            f"max_length={max_length} (median row: {int(np.median(sizes))} tokens). Raise train.max_length, "
            "or check data.labels and the columns."
        )
    read = np.minimum(sizes, max_length or np.inf)
    return Lengths(
        len(sizes),
        {p: int(np.percentile(sizes, p)) for p in (50, 90, 99, 100)},
        float(left.mean()),
        float((sizes > (max_length or np.inf)).mean()),
        float((left == 0).mean()),
        float(np.mean(finished or [0.0])),
        float(left.sum() / read.sum()),
        int(read[left > 0].sum()),
        int(left.sum()),
        _cut(sizes, np.array([_num_labels(mask) for mask in masks]), left, read),
    )


def _num_labels(mask: np.ndarray) -> int:
    """Labels of a row; its first token is none, since nothing predicts it."""
    return int(mask[1:].sum())


def kept_part(sequence: Any, max_length: int | None, truncation_mode: str) -> Any:
    """The tokens, labels or marks of a row that train.max_length and train.truncation_mode keep."""
    if max_length is None:
        return sequence
    return sequence[-max_length:] if truncation_mode == "keep_end" else sequence[:max_length]


def _cut(sizes: np.ndarray, labels: np.ndarray, left: np.ndarray, read: np.ndarray) -> Cut:
    """What is not read of rows.

    Args:
        sizes: tokens of each row.
        labels: its labels.
        left: those that max_length leaves.
        read: its tokens that max_length leaves.
    """
    masked, lost = labels == 0, (labels > 0) & (left == 0)
    shorter = (sizes > read) & (left > 0)
    return Cut(
        int(masked.sum()),
        int(lost.sum()),
        int(sizes[masked | lost].sum()),
        int(shorter.sum()),
        int((sizes - read)[shorter].sum()),
        int((labels - left).sum()),
    )


def greatest_id(rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, labels: str) -> int:
    """Return the greatest token id of the first rows; 0 without any."""
    tokenized = (tokenize(dict(row), tokenizer, labels)[0] for row in first_rows(rows, MEASURED_ROWS))
    return max((max(ids, default=0) for ids in tokenized), default=0)


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
                f"{vocab_size} tokens: the rows were tokenized for another model."
            )


def _is_end(ids: list[int], last: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the row's last label ends the turn; templates put a newline behind their end token."""
    tail = list(ids[max(0, last - 1) : last + 1])
    return any(i == tokenizer.eos_token_id or i in tokenizer.all_special_ids for i in tail)
