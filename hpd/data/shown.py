"""A row as it will be learned, to be looked at."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

from hpd.data.lengths import MEASURED_ROWS, kept_part
from hpd.data.reading import first_rows
from hpd.data.rendering import tokenize
from hpd.data.teacher_rows import teacher_prefix

__all__ = ["Part", "row_as_learned"]


class Part(NamedTuple):
    """Text of a row, all of it learned or none."""

    text: str
    learned: bool


def row_as_learned(
    rows: Any,
    tokenizer: Any,
    labels: str,
    max_length: int | None,
    truncation_mode: str,
    *,
    of_teacher: bool = False,
) -> list[Part]:
    """The first row with a label that stays, decoded from its tokens, in the order of the text.

    The first token is never learned: nothing comes before it that would predict it.

    Args:
        rows: of training.
        tokenizer, labels, max_length, truncation_mode: as training has them.
        of_teacher: as a teacher with a prompt of its own reads the same row.
    """
    for index, row in enumerate(first_rows(rows, MEASURED_ROWS)):
        ids, mask = (
            kept_part(part, max_length, truncation_mode) for part in tokenize(dict(row), tokenizer, labels)
        )
        learned = [False, *map(bool, mask[1:])]
        if any(learned) and of_teacher:
            prefix = teacher_prefix(row, tokenizer, labels, index)
            ids = [*prefix.ids, *ids[prefix.start :]]
            learned = [False] * len(prefix.ids) + learned[prefix.start :]
        if any(learned):
            return _parts(ids, learned, tokenizer)
    return []


def _parts(ids: list[int], learned: list[bool], tokenizer: Any) -> list[Part]:
    parts, start, shown = [], 0, ""
    for bit, group in groupby(learned):
        start += len(list(group))
        # A piece decoded by itself may lose its leading space.
        text = tokenizer.decode(ids[:start])
        parts.append(Part(text[len(shown) :], bit))
        shown = text
    return parts
