"""Token counts of the first rows, as training will make them: lengths, labels, ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from hpd.batch import IGNORE_INDEX
from hpd.data.reading import first_rows
from hpd.data.templates import training_template

__all__ = ["Lengths", "check_ids", "greatest_id", "measure", "tokenise"]

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
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, labels: str
) -> Lengths:
    """Tokenise the first rows as training will, to see lengths and labels before any model is loaded.

    Raises:
        ValueError: not a single label is left in the measured rows.
    """
    lengths: list[int] = []
    kept: list[int] = []
    finished: list[bool] = []
    for row in first_rows(rows, _MEASURED_ROWS):
        ids, mask = tokenise(dict(row), tokenizer, labels)
        lengths.append(len(ids))
        kept.append(sum(mask[:max_length]))
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


def tokenise(row: dict[str, Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """Token ids and label mask of one row."""
    if "input_ids" in row:
        given = row.get("labels", row["input_ids"])
        return list(row["input_ids"]), [label != IGNORE_INDEX for label in given]
    if "messages" in row:
        return _tokenise_messages(row["messages"], tokenizer, labels)
    if "text" in row:
        ids = tokenizer(row["text"] + _missing_eos(row["text"], tokenizer))["input_ids"]
        return ids, [True] * len(ids)
    if is_conversational(row):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=True
        )
        ids = tokenizer.apply_chat_template(
            row["prompt"] + row["completion"], tokenize=True, return_dict=True
        )["input_ids"]
        prompt = prompt["input_ids"]
    else:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + _missing_eos(row["completion"], tokenizer))[
            "input_ids"
        ]
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
    )
    return ids, [labels == "all" or i >= shared for i in range(len(ids))]


def _tokenise_messages(messages: list[Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """A whole conversation; with labels: assistant only the assistant's turns are labels, as the template
    marks them."""
    if labels != "assistant":
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        return ids, [True] * len(ids)
    rendered = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=training_template(tokenizer, labels),
    )
    return rendered["input_ids"], [bool(bit) for bit in rendered["assistant_masks"]]


def _missing_eos(text: str, tokenizer: Any) -> str:
    return "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token
