r"""Boxes in free text: ``\boxed{...}`` and its like. Every step is one pass over the text."""

import re
from typing import NamedTuple

__all__ = ["OPEN_BOX", "Span", "after_cut_box", "all_boxes", "closed_boxes", "last_boxes"]

# Several backslashes: the text was escaped twice.
_BRACES = re.compile(r"\\+(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
OPEN_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BOX_AT_END = re.compile(r"\\+(?:boxed|fbox|framebox)\s*\Z")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s$\\{}]+)")
_CONNECTOR = re.compile(
    r"(?:\s[a-z]{2,12}(?=\sand\b))?[\s$,;.]*(?:\\[)\]][\s,;]*)?"
    r"(?:\\text\s*\{)?\s*(?:,|;|\band\b|\bor\b)\s*(?:and\b|or\b)?\s*\}?[\s$]*"
    r"(?:\\[(\[])?\s*(?:\\quad\s*)?(?:[A-Za-z](?:_\{?[0-9]\}?)?\s*=\s*)?"
    # A row of signs on one line, as in \boxed{3} +++ \boxed{4}.
    r"| *([+*=~|])\1{2,} *"
)


class Span(NamedTuple):
    """A piece of a text: a box or a formula, and what is in it."""

    start: int
    end: int
    content: str


def last_boxes(text: str) -> list[str]:
    r"""The last box of a text, and the boxes before it that "and", "or" or a comma joins to it; none where
    the last one was cut off.

    >>> last_boxes(r"\boxed{1} then $x = \boxed{2}$ or $x = \boxed{3}$."), last_boxes(r"\boxed{1}, \boxed{2")
    (['2', '3'], [])
    """
    if after_cut_box(text) is not None:
        return []
    boxes = closed_boxes(text)
    if not boxes:
        bare = _BARE_BOX.findall(text)
        return [bare[-1].rstrip(".,;:)")] if bare else []
    found = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box.end : found[0].start]
        joined = not between or _CONNECTOR.fullmatch(between)
        if box.end > found[0].start or len(between) > 60 or not joined:
            break
        found.insert(0, box)
    return list(dict.fromkeys(box.content for box in found))


def closed_boxes(text: str) -> list[Span]:
    """Non-empty boxes that close, in the order in which they open, without those that hold another."""
    return _scan_boxes(text)[0]


def all_boxes(text: str) -> list[str]:
    """The different boxes of a text."""
    return list(dict.fromkeys(box.content for box in closed_boxes(text)))


def after_cut_box(text: str) -> str | None:
    r"""The lines behind the last box of a text where that box was cut off or never closed, else None.

    >>> [after_cut_box(text) for text in ("\\boxed{41}, or \\boxed{4", "\\boxed{4\n#### 42", "\\boxed{4}")]
    ['', '#### 42', None]

    References:
        Hendrycks et al., MATH, 2021, and Lightman et al., PRM800K, 2023: their graders look for the last
        ``\boxed`` and read no answer where its braces do not close.
    """
    if _BOX_AT_END.search(text):
        return ""
    closed, opened = _scan_boxes(text)
    if opened is None or (closed and closed[-1].start > opened):
        return None
    return text[opened:].partition("\n")[2]


def _scan_boxes(text: str) -> tuple[list[Span], int | None]:
    """`closed_boxes`, and where the last box begins that stays open; one pass, so nesting costs nothing."""
    open_braces: list[tuple[int, int]] = []
    found = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            box, start = open_braces.pop() if open_braces else (-1, 0)
            content = text[start : match.start()].strip() if box >= 0 else ""
            # A box inside of this one has closed, and is in the list, already.
            if content and not (found and found[-1].start > box):
                found.append(Span(box, match.end(), content))
        elif token.endswith("{") and token != r"\{":
            open_braces.append((-1 if token == "{" else match.start(), match.end()))
    return sorted(found), max((box for box, _ in open_braces if box >= 0), default=None)
