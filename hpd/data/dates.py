"""Chat templates that print today's date, with the date of the run's first day.

A run that goes on after midnight, or trains from a cache of yesterday, would otherwise read other rows than
it began with.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

from hpd.data.templates import assistant_template

__all__ = ["dated_template", "own_template", "prints_date", "set_date"]

_CLOCK = "strftime_now"

# Parts of a date that strftime knows and that do not depend on the hour.
_PARTS = ("%-d", "%-m", "%-j", "%a", "%A", "%w", "%d", "%b", "%B", "%m", "%y", "%Y", "%j", "%U", "%W", "%x")
_MIDNIGHT = {"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM", "%f": "000000", "%Z": "", "%z": ""}


def prints_date(template: Any) -> bool:
    """True if a chat template asks for today's date."""
    return isinstance(template, str) and _CLOCK in template


def dated_template(template: str, date: datetime.date) -> str:
    """The template with a clock that stands still: midnight of `date`, whenever a row is rendered.

    The date becomes a part of the template's text, so that what was prepared under another date is not taken
    from a cache of datasets.
    """
    values = {part: date.strftime(part) for part in _PARTS} | _MIDNIGHT
    calls = "".join(f".replace({part!r}, {value!r})" for part, value in values.items())
    clock = f"{{%- macro {_CLOCK}(format) -%}}{{{{- format{calls} -}}}}{{%- endmacro -%}}"
    return clock + template


def set_date(tokenizer: Any, date: datetime.date) -> datetime.date | None:
    """Fix the date that the tokenizer's template prints, if it prints one and it is not fixed yet.

    `own_template` gives the template back.

    Args:
        tokenizer: the student's.
        date: the run's first day.

    Returns:
        The date that it prints; None: none.
    """
    if (fixed := getattr(tokenizer, "template_date", None)) is not None:
        return fixed
    own = tokenizer.chat_template
    if not prints_date(own):
        return None
    # TRL knows templates by their text: the variant is looked up before the date changes it.
    marks, variant = assistant_template(tokenizer)
    tokenizer.chat_template = dated_template(own, date)
    if marks and variant is not None:
        tokenizer.marked_chat_template = dated_template(variant, date)
    tokenizer.undated_chat_template, tokenizer.template_date = own, date
    return date


@contextlib.contextmanager
def own_template(tokenizer: Any) -> Iterator[None]:
    """A context in which the tokenizer has its template as it was, to be saved."""
    own = getattr(tokenizer, "undated_chat_template", None)
    if own is None:
        yield
        return
    dated, tokenizer.chat_template = tokenizer.chat_template, own
    try:
        yield
    finally:
        tokenizer.chat_template = dated
