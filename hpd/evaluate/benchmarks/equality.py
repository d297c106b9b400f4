"""Whether two answers are the same mathematics: math-verify, behind checks of what it is known to get wrong.

Imported by the worker only, which limits it: sympy may take hours, or all memory, over what a model writes.
"""

import re
from fractions import Fraction
from typing import Any, NamedTuple

from math_verify import parse, verify
from sympy import Basic, Expr, Float, I, Rational, Set

from hpd.evaluate.benchmarks.answers import is_balanced, split_answers
from hpd.evaluate.benchmarks.quantities import decide, normalize, quantity, rounds_to

__all__ = ["number", "same_mathematics"]

_DIGITS = 60  # of numbers that are no rationals
_SAME_DIGITS = 40

_MAX_LIST = 50

_PLAIN_DECIMAL = re.compile(
    r"[+-]?([0-9]*\.[0-9]+)"
    r"(?:\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*(-?[0-9]{1,3})\s*\}?|[eE]([+-]?[0-9]{1,3}))?"
)
_SCIENTIFIC = re.compile(r"([+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?)[eE]([+-]?[0-9]{1,3})")
_CLOCK = re.compile(
    r"(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2}))?"
    r"(?:\s*\\(?:text|mathrm)\s*\{)?\s*(?:(?P<half>[ap])\.?\s?m\.?)?\s*\}?",
    re.IGNORECASE,
)
_DOTS = re.compile(r"\\[lc]?dots(?:[bcimo]?)(?![A-Za-z])|\\cdots|\.\.\.|…")
_GROUPS = re.compile(r";|(?:\\q?quad\s*)?\\text\s*\{\s*(?:and|or)\s*\}(?:\s*\\q?quad)?|\b(?:and|or)\b")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])")
_RAY = re.compile(
    r"(?P<name>[A-Za-z])\s*"
    r"(?:(?P<below><|\\leq?(?:slant)?(?![A-Za-z]))|(?P<above>>|\\geq?(?:slant)?(?![A-Za-z])))"
    r"(?P<end>[^<>=,A-DF-Za-df-z]*(?:\\(?:frac|sqrt|pi)[^<>=,]*)?)"
)
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus|backslash|triangle)(?![A-Za-z])|∖")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_NAMED = re.compile(r"\s*(?:[A-Za-z]+|\\[A-Za-z]+)(?:_\{?\w+\}?)?\s*(?:\(\s*[A-Za-z]\s*\))?\s*")
_EQUALS = re.compile(r"(?<![\\<>!:])=(?!=)")
_UNIT = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*([A-Za-z/ .]{1,40})\s*\}\s*(\^\s*\{?[0-9]\}?)?\s*$")
_DEGREES = re.compile(r"([0-9.]+|\([^()]*\)|\{[^{}]*\}|\\[a-z]+)\s*\^?\s*\{?\s*(?:\\circ|°)\s*\}?")
_TRIGONOMETRIC = re.compile(r"(?<![A-Za-z])\\?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_BASE = re.compile(r"(?<![A-Za-z0-9_])([0-9]+[0-9A-F]*)_\{?\s*([0-9]+)\s*\}?")

# "f(x) = 2x for all real x" says no more than its equation.
_EVERYWHERE = re.compile(
    r"\s*,?\s*(?:\\q?quad\s*)?(?:\\text\s*\{)?\s*for (?:all|any|every)(?: real)?(?: numbers?| values? of)?"
    r"\s*\}?\s*[a-z](?:\s*\\in\s*\\(?:mathbb\s*)?\{?R\}?)?\s*\}?\s*$"
)

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
    is_set: bool = False


def same_mathematics(gold: str, answer: str) -> tuple[bool, str]:
    """Compare an answer with the reference; also how that was decided."""
    return _compare(_latex(gold), _latex(answer), depth=0)


def _compare(gold: str, answer: str, depth: int) -> tuple[bool, str]:
    clocks = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
    if clocks[0] and clocks[1]:
        return _same_time(clocks[0], clocks[1]), "times"
    gold, answer = (_rays(side) or side for side in (gold, answer))
    gold, answer = _without_unit_of_one(gold, answer)
    gold, answer = _right_sides(gold, answer)
    decided = decide(gold, answer)
    if decided is not None:
        return decided, "same" if decided else "different"
    if _bases(gold) and _bases(answer) and _bases(gold) != _bases(answer):
        return False, "bases"
    units = _UNIT.search(gold), _UNIT.search(answer)
    if units[0] and units[1]:
        same = decide(*(f"1 {unit[1].strip()}{unit[2] or ''}" for unit in units if unit))
        if same is False:
            return False, "units"
        if same and units[0].start() and units[1].start():
            gold, answer = gold[: units[0].start()], answer[: units[1].start()]
    listed = _lists(gold, answer, depth) if depth < 3 else None
    if listed is not None:
        return listed, "lists"
    numbers = _same_number(gold, answer)
    if numbers is not None:
        return numbers, "numbers"
    left, right = ([_done(found) for found in _parsed(side)] for side in (gold, answer))
    same = verify(left, right, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same), "math-verify"


def _rays(text: str) -> str | None:
    r"""``x < -1 \text{ or } x \ge 1`` as a union of intervals; None for anything else."""
    parts = [_RAY.fullmatch(part.strip()) for part in _OR.split(text)]
    rays = [part for part in parts if part]
    if len(rays) < 2 or len(rays) < len(parts) or len({ray["name"] for ray in rays}) > 1:
        return None
    return r" \cup ".join(
        f"(-\\infty, {ray['end']}{')' if ray['below'] == '<' else ']'}"
        if ray["below"]
        else f"{'(' if ray['above'] == '>' else '['}{ray['end']}, \\infty)"
        for ray in rays
    )


def _done(found: Any) -> Any:
    """What math-verify parsed; of sets what their unions and intersections are."""
    return found.doit() if isinstance(found, Set) else found


def _same_time(first: re.Match[str], second: re.Match[str]) -> bool:
    """Equality of times of day; one without "a.m." or "p.m." may be either where the other one has it."""
    halves = [(match["half"] or "").casefold() for match in (first, second)]
    times: list[set[int]] = []
    for match, half in zip((first, second), halves, strict=True):
        hour, rest = int(match["hour"]), int(match["minute"]) * 60 + int(match["second"] or 0)
        if half:
            hours = {hour % 12 + (12 if half == "p" else 0)}
        elif any(halves) and hour <= 12:
            hours = {hour % 12, hour % 12 + 12}
        else:
            hours = {hour}
        times.append({hour * 3600 + rest for hour in hours})
    return bool(times[0] & times[1])


def _latex(text: str) -> str:
    """An answer as math-verify reads it best: LaTeX without dollar signs, `e` and `i` upright or not."""
    text = text.replace(r"\$", "").replace("$", "").strip()
    if re.search(r"\\\\[A-Za-z]", text) and all(len(run) % 2 == 0 for run in re.findall(r"\\+", text)):
        text = text.replace("\\\\", "\\")  # escaped twice
    text = re.sub(r",\s*\\!\s*", ",", text).replace("{-}", "-")
    for sign, command in _SYMBOLS.items():
        text = text.replace(sign, command)
    text = _EVERYWHERE.sub("", text)
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"\\sqrt\s+([0-9]+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*\[([^\[\]]+)\]\s*([0-9A-Za-z])", r"\\sqrt[\1]{\2}", text)
    text = re.sub(r"\\sqrt\s+\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(?:mathrm|text|mathit|operatorname)\s*\{\s*([ei])\s*\}", r"\1", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"(?<![A-Za-z\\_])i\((?![A-Za-z]\))", r"i \\cdot (", text)
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
    if len(left) == len(right) == 2 and _is_function(left[0], right[0]):
        return left[1], right[1]
    member = re.compile(r"\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*")
    if bool(member.match(gold)) != bool(member.match(answer)) and len(left) == len(right) == 1:
        return member.sub("", gold, count=1), member.sub("", answer, count=1)
    return gold, answer


def _is_function(first: str, second: str) -> bool:
    """True for two ways to call one function's value: f(x), y and f(t)."""
    functions = [re.fullmatch(r"([A-Za-z])\s*\(\s*[a-z]\s*\)", side) for side in (first, second)]
    if functions[0] and functions[1]:
        return functions[0][1] == functions[1][1]
    return bool((functions[0] and second == "y") or (functions[1] and first == "y"))


def _sides(text: str) -> list[str]:
    """What the equals signs outside of braces separate: not that of a sum's first index."""
    marks = [match.start() for match in _EQUALS.finditer(text)]
    outer = [mark for mark in marks if text.count("{", 0, mark) - text.count("}", 0, mark) == 0]
    starts = [0, *(mark + 1 for mark in outer)]
    return [text[start:end].strip() for start, end in zip(starts, [*outer, len(text)], strict=True)]


def _bases(text: str) -> list[tuple[str, str]]:
    return _BASE.findall(text)


def _lists(gold: str, answer: str, depth: int) -> bool | None:
    """Compare two lists, sets, points or intervals part by part; None where they are none of these."""
    if bool(_DOTS.search(gold)) != bool(_DOTS.search(answer)) or _SET_OPERATION.search(gold + answer):
        return None
    sides = _unbracketed(gold), _unbracketed(answer)
    if (sides[0].opening == "") != (sides[1].opening == ""):
        bare, point = (gold, answer) if sides[0].opening == "" else (answer, gold)
        written = _points(bare)
        if written and sides[0].opening + sides[1].opening == "(":
            return any(_compare(one, point, depth + 1)[0] for one in written)
        return None  # (1, 2) against 1, 2: math-verify knows when that is the same
    brackets = [(side.opening, side.closing) for side in sides]
    if brackets[0] != brackets[1]:
        return None
    golds, answers = _groups(sides[0].text), _groups(sides[1].text)
    if not golds or len(golds) != len(answers):
        golds, answers = _parts(sides[0].text), _parts(sides[1].text)
    if len(golds) != len(answers):
        golds, answers = (_parts(_THOUSANDS.sub("", side.text)) for side in sides)
    if len(golds) < 2 and len(answers) < 2:
        both = all(side.is_set and side.text.strip() for side in sides)
        return _compare(sides[0].text, sides[1].text, depth + 1)[0] if both else None
    ordered = brackets[0][0] in ("(", "[") or bool(_DOTS.search(gold))
    if not ordered:
        golds, answers = _different(golds), _different(answers)
    if len(golds) != len(answers) or len(golds) > _MAX_LIST:
        return False
    left = list(answers)
    for position, part in enumerate(golds):
        candidates = [left[0]] if ordered else left
        match = next((other for other in candidates if _same_part(part, other, depth, position)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _groups(text: str) -> list[str]:
    """Points in a list that is written as (5, 2), (7, 2), as 5, 2; 7, 2 or as p = 5, q = 2; p = 7, q = 2;
    else nothing."""
    points = split_answers(text)
    if len(points) > 1 and all(point.startswith("(") and point.endswith(")") for point in points):
        return points
    groups = [group.strip(" ,") for group in _GROUPS.split(text) if group.strip(" ,")]
    sizes = {len(split_answers(group)) for group in groups}
    if len(groups) < 2 or len(sizes) != 1 or sizes == {1} or not all(map(is_balanced, groups)):
        return []
    if all({group.count("=")} == sizes for group in groups):
        return groups
    return [f"({group})" for group in groups] if len(text.split(";")) == len(groups) else []


def _points(text: str) -> list[str]:
    """x = 3, y = -2 as the point that it states: in the order of the names, and as written; else nothing."""
    parts = [re.fullmatch(r"([A-Za-z])\s*=\s*([^=]+)", part) for part in split_answers(text)]
    found = [part.groups() for part in parts if part]
    if len(found) < 2 or len(found) < len(parts) or len({name for name, _ in found}) < len(found):
        return []
    orders = (sorted(found), found)
    return list(dict.fromkeys("(" + ", ".join(value for _, value in order) + ")" for order in orders))


def _different(parts: list[str]) -> list[str]:
    """The parts of a set; one that is written twice counts once."""
    return list({re.sub(r"\s", "", part): part for part in parts}.values())


def _same_part(gold: str, answer: str, depth: int, position: int) -> bool:
    if _DOTS.fullmatch(gold.strip()) and _DOTS.fullmatch(answer.strip()):
        return True
    return _compare(gold, answer, depth + 1)[0]


def _unbracketed(text: str) -> _Side:
    """The inside of brackets that enclose all of a text."""
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", "", text).strip()
    for opening, closing in ((r"\{", r"\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        inside = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and is_balanced(inside):
            # A set is a list: braces around one say nothing.
            return _Side(inside, "", "", is_set=True) if "{" in opening else _Side(inside, opening, closing)
    return _Side(text, "", "")


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
        decimal = _PLAIN_DECIMAL.fullmatch(normalize(text))
        power = Fraction(10) ** int(decimal[2] or decimal[3] or 0) if decimal else Fraction(1)
        if decimal and rounds_to(decimal[1], Fraction(str(abs(other).evalf(_DIGITS))) / power):
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
    if not expressions or not isinstance(expressions[0], Expr):
        return None
    expression = expressions[0].subs(
        {symbol: I for symbol in expressions[0].free_symbols if str(symbol) == "i"}
    )
    if expression.free_symbols:
        return None
    exact = expression.replace(lambda node: isinstance(node, Float), lambda node: Rational(str(node)))
    value = exact.doit()
    return value if isinstance(value, Expr) and value.is_number and value.is_finite is not False else None


def _parsed(text: str) -> list[Any]:
    return parse(r"\boxed{" + text + "}", parsing_timeout=None)  # type: ignore[arg-type] (None: no alarm)
