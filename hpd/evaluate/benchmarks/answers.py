"""Answers in free text: where the final one is, and whether two of them are the same.

Plain string and rational arithmetic: no expression is ever evaluated, so a model's output cannot cost more
than a scan.
"""

import re
from fractions import Fraction
from typing import NamedTuple

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"

_NUMBER = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"

_MARKER = re.compile(r"\banswer\**\s*(?:is\b\s*:?|:)", re.IGNORECASE)

_SENTENCE_END = re.compile(r"""[.!?][*_"`)]*(?:\s|$)""")

# The look-behind keeps digits of identifiers (x2, v1.5) out, and reads the minus of 7-3 as an operator.
_NUMBER_IN_PROSE = re.compile(rf"(?<![0-9A-Za-z_./)\]])[-\u2212]?[$€£¥]?{_NUMBER}(?:/[0-9]+)?")

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)

_FORMULA = re.compile(r"(?<!\\)\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)

_SEPARATOR = re.compile(r"[\[\](){}]|,|;|\band\b|\bor\b")

# Words that change the number before them: what they follow is not "a number and its unit".
_VALUE_WORDS = (
    "and|or|to|over|plus|minus|times|half|pi|squared|cubed|dozen|hundred|thousand|million|billion|trillion"
)

_QUANTITY = re.compile(
    rf"(?P<number>[+-]?{_NUMBER})(?:/(?P<denominator>0*[1-9][0-9]*))?"
    rf"(?P<unit>\s?[%°]|(?!.*\b(?:{_VALUE_WORDS})\b),?\s+[a-z][a-z\s]*)?"
)

# Longer than any answer; Python refuses to read integers beyond 4,300 digits, and a looping model writes
# them.
_MAX_QUANTITY_CHARS = 200


class _Quantity(NamedTuple):
    value: Fraction
    unit: str


def final_answer(text: str) -> str | None:
    r"""The final answer that a text states, as written, or None where it states none.

    The first rule that finds something decides: the line after the last ``####`` (GSM8K), the last
    ``\boxed{...}`` with balanced braces (MATH), the sentence after the last "answer is" or "Answer:", the
    last number.

    >>> final_answer("12 + 30 = 42, so she has 42 apples.")
    '42'
    >>> final_answer(r"Thus $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    stated = stated_answer(text)
    if stated is not None:
        return stated
    numbers = _NUMBER_IN_PROSE.findall(text)
    return numbers[-1] if numbers else None


def stated_answer(text: str) -> str | None:
    """The answer that a text marks as final (`final_answer` without its last rule), or None where nothing is
    marked.

    This is the rule for references: an unmarked one such as ``(3, 4)`` is an answer as a whole.
    """
    _, hashes, tail = text.rpartition("####")
    line = _first_line(tail) if hashes else ""
    if line:
        return _last_boxed(line) or line
    boxed = _last_boxed(text)
    if boxed:
        return boxed
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    sentence = _SENTENCE_END.split(_first_line(text[markers[-1].end() :]), maxsplit=1)[0]
    return _strip_markup(sentence) or None


def same_answer(first: str, second: str) -> bool:
    r"""True if two answers are the same after normalisation; symmetric.

    Numbers are compared as exact rationals: ``1,234`` = ``$1234.00``, ``\frac{3}{4}`` = ``3/4`` = ``0.75``. A
    unit counts only where both have one: ``42 apples`` = ``42``, ``5 m`` != ``5 km``. Anything else is
    compared as text, without case, spaces, currency signs, LaTeX spacing and closing punctuation. An empty
    answer equals nothing.

    >>> same_answer("The Moon.", "the moon"), same_answer("2", "20"), same_answer("(1, 2)", "(1,2)")
    (True, False, True)
    """
    left = _normalise(first)
    right = _normalise(second)
    numbers = _quantity(left), _quantity(right)
    if numbers[0] and numbers[1]:
        units = {number.unit for number in numbers if number and number.unit}
        return numbers[0].value == numbers[1].value and len(units) < 2
    return _squeeze(left) == _squeeze(right) != ""


def plain_number(text: str) -> Fraction | None:
    """The value of an answer that is nothing but a number, perhaps with a unit; else None."""
    quantity = _quantity(_normalise(text))
    return quantity.value if quantity else None


def last_math(text: str) -> str | None:
    r"""The last formula (``$...$``, ``\(...\)``, ``\[...\]``) of a text, unless a number outside of formulas
    comes after it.

    >>> last_math("so $x = 1$, that is $y = x + 1$."), last_math("so $x = 1$, that is 2.")
    ('y = x + 1', None)
    """
    formulas = list(_FORMULA.finditer(text))
    if not formulas or _NUMBER_IN_PROSE.search(text, formulas[-1].end()):
        return None
    return next(part.strip() for part in formulas[-1].groups() if part is not None) or None


def split_answers(text: str) -> list[str]:
    r"""The answers of a list: parts between commas, semicolons, "and", "or" that are outside of brackets.

    Every such comma separates: in a list, ``1,234`` is two answers.

    >>> split_answers(r"$(0,2)$, $(0,-2)$ and $3$"), split_answers(r"\{1, 2\}")
    (['(0,2)', '(0,-2)', '3'], ['1', '2'])
    """
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\$|\\[,;:! ]", "", text).strip()
    text = re.sub(r"\\text\s*\{\s*(and|or|,)\s*\}", r" \1 ", text)
    outer = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    parts, depth, start = [], 0, 0
    text = outer[1] if outer else text
    for match in _SEPARATOR.finditer(text):
        token = match.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _first_line(text: str) -> str:
    return _strip_markup(_strip_markup(text).split("\n", 1)[0])


def _strip_markup(text: str) -> str:
    return text.strip("*_` \t\r\n")


def _last_boxed(text: str) -> str | None:
    r"""Content of the ``\boxed{`` that opens last among those that close; one pass, so nesting costs
    nothing."""
    open_braces: list[tuple[bool, int]] = []
    last_start, content = -1, None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            is_box, start = open_braces.pop() if open_braces else (False, 0)
            if is_box and start > last_start:
                last_start, content = start, text[start : match.start()].strip()
        elif token.endswith("{") and token != r"\{":
            open_braces.append((token != "{", match.end()))
    return content


def _normalise(answer: str) -> str:
    text = answer.replace("\u2212", "-").replace("{,}", ",")
    text = re.sub(r"\\(?:left|right)\b|\\[!,;: ]|[\\]?[$€£¥₹]", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[dt]frac\b", r"\\frac", text)
    text = re.sub(r"\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"\1/\2", text)
    text = text.replace(r"\%", "%").replace(r"^\circ", "°").replace(r"^{\circ}", "°")
    text = " ".join(text.casefold().split())
    return text.lstrip('*_`":= ').rstrip('*_`".,;: ')


def _squeeze(text: str) -> str:
    # A space between digits separates numbers: "1 1/2" is not "11/2".
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", text)


def _quantity(text: str) -> _Quantity | None:
    match = _QUANTITY.fullmatch(text) if len(text) <= _MAX_QUANTITY_CHARS else None
    if match is None:
        return None
    value = Fraction(match["number"].replace(",", "")) / int(match["denominator"] or 1)
    return _Quantity(value, (match["unit"] or "").strip(", "))
