"""Whether two answers are the same mathematics: math-verify, behind checks of what it is known to get wrong.

Imported by the worker only: sympy may take hours, or all memory, over what a model writes.
"""

import re
from fractions import Fraction
from typing import Any, NamedTuple

from math_verify import parse, verify
from sympy import Basic, Expr, Float, Rational

from hpd.evaluate.benchmarks.answers import split_answers
from hpd.evaluate.benchmarks.quantities import decide, normalise, quantity, rounds_to

__all__ = ["number", "same_mathematics"]

_SECONDS = 5  # math-verify's own limit of each comparison, which leaves the process alive

_DIGITS = 60  # of numbers that are no rationals
_SAME_DIGITS = 40

_MAX_LIST = 50

_PLAIN_DECIMAL = re.compile(r"[+-]?([0-9]*\.[0-9]+)")
_SCIENTIFIC = re.compile(r"([+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?)[eE]([+-]?[0-9]{1,3})")
_CLOCK = re.compile(r"([0-9]{1,2}:[0-9]{2})(?:\s*\\text\s*\{)?\s*(?:[ap]\.?\s?m\.?)?\s*\}?", re.IGNORECASE)
_DOTS = re.compile(r"\\[lc]?dots(?:[bcimo]?)(?![A-Za-z])|\\cdots|\.\.\.|…")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_NAMED = re.compile(r"\s*(?:[A-Za-z]+|\\[A-Za-z]+)(?:_\{?\w+\}?)?\s*(?:\(\s*[A-Za-z]\s*\))?\s*")
_EQUALS = re.compile(r"(?<![\\<>!:])=(?!=)")
_UNIT = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*([A-Za-z/ .]{1,40})\s*\}\s*(\^\s*\{?[0-9]\}?)?\s*$")
_DEGREES = re.compile(r"([0-9.]+|\([^()]*\)|\{[^{}]*\}|\\[a-z]+)\s*\^?\s*\{?\s*(?:\\circ|°)\s*\}?")
_TRIGONOMETRIC = re.compile(r"(?<![A-Za-z])\\?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_BASE = re.compile(r"(?<![A-Za-z0-9_])([0-9]+[0-9A-F]*)_\{?\s*([0-9]+)\s*\}?")

_SYMBOLS = {
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "²": "^2",
    "³": "^3",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\neq ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∈": r"\in ",
    "±": r"\pm ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "°": r"^\circ ",
}


class _Side(NamedTuple):
    """One answer, and the brackets around it."""

    text: str
    opening: str
    closing: str


def same_mathematics(gold: str, answer: str) -> tuple[bool, str]:
    """Compare an answer with the reference; also how that was decided."""
    return _compare(_latex(gold), _latex(answer), depth=0)


def _compare(gold: str, answer: str, depth: int) -> tuple[bool, str]:
    gold, answer = _without_unit_of_one(gold, answer)
    gold, answer = _right_sides(gold, answer)
    decided = decide(gold, answer)
    if decided is not None:
        return decided, "same" if decided else "different"
    if _bases(gold) and _bases(answer) and _bases(gold) != _bases(answer):
        return False, "bases"
    clocks = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
    if clocks[0] and clocks[1]:
        return clocks[0][1].zfill(5) == clocks[1][1].zfill(5) and not _differ(gold, answer), "times"
    units = [match[1].strip() if match else "" for match in (_UNIT.search(gold), _UNIT.search(answer))]
    if all(units) and decide(f"1 {units[0]}", f"1 {units[1]}") is False:
        return False, "units"
    listed = _lists(gold, answer, depth) if depth < 3 else None
    if listed is not None:
        return listed, "lists"
    numbers = _same_number(gold, answer)
    if numbers is not None:
        return numbers, "numbers"
    left, right = _parsed(gold), _parsed(answer)
    return bool(verify(left, right, timeout_seconds=_SECONDS)), "math-verify"


def _differ(gold: str, answer: str) -> bool:
    """True if one time is before noon and the other after it."""
    halves = [re.search(r"([ap])\.?\s?m", side.casefold()) for side in (gold, answer)]
    return bool(halves[0] and halves[1] and halves[0][1] != halves[1][1])


def _latex(text: str) -> str:
    """An answer as math-verify reads it best: LaTeX without dollar signs, `e` and `i` upright or not."""
    text = text.replace(r"\$", "").replace("$", "").strip()
    for sign, command in _SYMBOLS.items():
        text = text.replace(sign, command)
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"\\sqrt\s+([0-9]+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s+\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(?:mathrm|text|mathit|operatorname)\s*\{\s*([ei])\s*\}", r"\1", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\1 \\cdot \\pi / 180)", text)
    return text.rstrip(". ")


def _without_unit_of_one(gold: str, answer: str) -> tuple[str, str]:
    """Both without a unit that one of them lacks."""
    sides = [gold, answer]
    found = [_UNIT.search(side) for side in sides]
    if bool(found[0]) != bool(found[1]):
        sides = [side[: match.start()] if match else side for side, match in zip(sides, found, strict=True)]
    return (sides[0].strip() or gold, sides[1].strip() or answer)


def _right_sides(gold: str, answer: str) -> tuple[str, str]:
    """What both say a name is, where one of them leaves the name out or both have the same."""
    left, right = _sides(gold), _sides(answer)
    if len(left) < 2 and len(right) >= 2 and len(split_answers(answer)) == 1:
        return gold, right[-1]
    if len(right) < 2 and len(left) == 2 and _NAMED.fullmatch(left[0]):
        return left[1], answer
    if len(left) == len(right) == 2 and _NAMED.fullmatch(left[0]) and left[0].split() == right[0].split():
        return left[1], right[1]
    member = re.compile(r"\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*")
    if bool(member.match(gold)) != bool(member.match(answer)) and len(left) == len(right) == 1:
        return member.sub("", gold, count=1), member.sub("", answer, count=1)
    return gold, answer


def _sides(text: str) -> list[str]:
    return [part.strip() for part in _EQUALS.split(text)]


def _bases(text: str) -> list[tuple[str, str]]:
    return _BASE.findall(text)


def _lists(gold: str, answer: str, depth: int) -> bool | None:
    """Compare two lists, sets, points or intervals part by part; None where they are none of these."""
    if bool(_DOTS.search(gold)) != bool(_DOTS.search(answer)):
        return None
    sides = _unbracketed(gold), _unbracketed(answer)
    if (sides[0].opening == "") != (sides[1].opening == ""):
        return None  # (1, 2) against 1, 2: math-verify knows when that is the same
    brackets = [(side.opening, side.closing) for side in sides]
    if brackets[0] != brackets[1]:
        return None
    golds, answers = _parts(sides[0].text), _parts(sides[1].text)
    if len(golds) != len(answers):
        golds, answers = (_parts(_THOUSANDS.sub("", side.text)) for side in sides)
    if len(golds) < 2 and len(answers) < 2:
        return None
    if len(golds) != len(answers) or len(golds) > _MAX_LIST:
        return False
    ordered = brackets[0][0] in ("(", "[") or bool(_DOTS.search(gold))
    left = list(answers)
    for position, part in enumerate(golds):
        candidates = [left[0]] if ordered else left
        match = next((other for other in candidates if _same_part(part, other, depth, position)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_part(gold: str, answer: str, depth: int, position: int) -> bool:
    if _DOTS.fullmatch(gold.strip()) and _DOTS.fullmatch(answer.strip()):
        return True
    return _compare(gold, answer, depth + 1)[0]


def _unbracketed(text: str) -> _Side:
    """The inside of brackets that enclose all of a text."""
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", "", text).strip()
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        inside = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and _balanced(inside):
            return _Side(inside, opening, closing)
    return _Side(text, "", "")


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _parts(text: str) -> list[str]:
    r"""Parts of a list; one ``\pm`` is two of them."""
    found = []
    for part in split_answers(text):
        signs = re.findall(r"\\(?:pm|mp)(?![A-Za-z])", part)
        if len(signs) == 1:
            found += [part.replace(signs[0], sign).strip().removeprefix("+") for sign in "+-"]
        else:
            found.append(part)
    return found


def _same_number(gold: str, answer: str) -> bool | None:
    """Compare two numbers by value; None where one is no number.

    Rationals are compared exactly, decimals as the rationals that they write. A decimal of six decimals or
    more also equals what it is a rounding of.
    """
    left, right = number(gold), number(answer)
    if left is None or right is None:
        return None
    if left.is_Rational and right.is_Rational:
        same = left == right
    else:
        distance = abs((left - right).evalf(_DIGITS))
        size = max(abs(left.evalf(_DIGITS)), abs(right.evalf(_DIGITS)))
        if 0 in (left, right) and size < Rational(1, 10**_SAME_DIGITS):
            return None
        same = bool(distance <= size * Rational(1, 10**_SAME_DIGITS))
    return same or _rounded(gold, answer, left, right)


def _rounded(gold: str, answer: str, left: Expr, right: Expr) -> bool:
    """True if one is written as a decimal that is the other one, rounded or cut at its end."""
    if not (left.is_real and right.is_real) or (left > 0) != (right > 0):
        return False
    for text, other in ((gold, right), (answer, left)):
        decimal = _PLAIN_DECIMAL.fullmatch(normalise(text))
        if decimal and rounds_to(decimal[1], Fraction(str(abs(other).evalf(_DIGITS)))):
            return True
    return False


def number(text: str) -> Expr | None:
    """The value of an expression without symbols, exact; None for anything else."""
    plain = quantity(text)
    if plain is not None and plain.unit in ("", "%"):
        value = Rational(plain.value.numerator, plain.value.denominator)
        return value / 100 if plain.unit == "%" else value
    if scientific := _SCIENTIFIC.fullmatch(text.strip()):
        return Rational(scientific[1]) * Rational(10) ** int(scientific[2])
    if "%" in text or not re.search(r"[0-9]|\\pi|\\sqrt|(?<![A-Za-z\\])e(?![A-Za-z])", text):
        return None
    if re.search(r":|\\(?:pm|mp|ldots|dots|cdots|text)(?![A-Za-z])|\.\.\.|_", text):
        return None
    expressions = [found for found in _parsed(text) if isinstance(found, Basic)]
    if not expressions or not isinstance(expressions[0], Expr) or expressions[0].free_symbols:
        return None
    exact = expressions[0].replace(lambda node: isinstance(node, Float), lambda node: Rational(str(node)))
    value = exact.doit()
    return value if isinstance(value, Expr) and value.is_number and value.is_finite is not False else None


def _parsed(text: str) -> list[Any]:
    return parse(r"\boxed{" + text + "}", parsing_timeout=_SECONDS)
