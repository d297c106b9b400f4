"""Exact numbers with units, and what of two answers they and plain text decide.

Rational arithmetic and string comparison: no expression is ever evaluated, so a model's output cannot cost
more than a scan.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "lakh": 10**5,
    "crore": 10**7,
    "dozen": 12,
    "k": 10**3,
    "M": 10**6,
    "mn": 10**6,
    "bn": 10**9,
}
"""Words behind a number that multiply it; K alone is a kelvin."""

INTEGER = r"(?:[1-9][0-9]{0,2}(?:[,'\u2019][0-9]{3})+(?![0-9])|[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"

VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
"""Fractions of one character."""

_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
    | {"\u00ba": "°", "\uff05": "%", "\uff0c": ",", "\u2044": "/", "\u066b": ".", "\u066c": ","}
    | {sign: " " + unicodedata.normalize("NFKC", sign).replace("\u2044", "/") for sign in VULGAR}
)

_FRACTION = rf"\\frac\s*(?:\{{\s*(-?{DECIMAL})\s*\}}|([0-9]))\s*(?:\{{\s*({DECIMAL})\s*\}}|([0-9]))"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:"
    rf"(?P<whole>[0-9]+)?(?P<fraction>\s*{_FRACTION})"
    r"|(?P<mixed>[0-9]+)(?:\s+and)?\s+(?P<top>[0-9]+)\s?/\s?(?P<bottom>[0-9]+)"
    r"|(?P<start>[0-9]*)\.(?P<once>[0-9]*)(?:\\(?:overline|bar)\s*(?:\{(?P<again>[0-9]+)\}|(?P<digit>[0-9]))"
    r"|\((?P<round>[0-9]+)\))"
    rf"|(?P<decimal>{DECIMAL})\.?(?:\s?/\s?(?P<divisor>{DECIMAL}))?)"
)
_SCALE = re.compile(rf"\s*-?({'|'.join(SCALES)})(?![A-Za-z])")
_WORD_UNIT = re.compile(r"[A-Za-z](?:[A-Za-z'\u2019\s.,/%°²³·-]|\^\{?-?[0-9]\}?)*")
# Words that change the number before them: what they follow is not "a number and its unit".
_VALUE_WORD = re.compile(r"\b(?:and|or|to|over|plus|minus|times|half|pi|squared|cubed|factorial)\b")
_BASED = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\{?\s*([0-9]+|[a-z]+)\s*\}?")
_UPRIGHT = re.compile(
    r"\\(?:text|mathrm|textbf|mathbf|textrm|textit|emph|underline|boldsymbol|operatorname|mbox)\s*"
    r"\{([^{}]*)\}"
)
_REALS = re.compile(
    r"all (?:the )?real(?:s|(?: numbers?| values?)(?: of [a-z])?)|\\mathbb\s*\{?\s*R\s*\}?|ℝ", re.IGNORECASE
)
# 0.\dot{1}4\dot{2}; 0.1666...
_DOTTED = re.compile(r"\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?")
_REPEATED = re.compile(
    r"(?<![0-9.])([0-9]*\.[0-9]{0,9}?)([0-9]{1,6}?)\2{2,9}\s?(?:\.\.\.|…|\\[lc]?dots(?![A-Za-z]))"
)
_CURRENCY_CODE = re.compile(r"^(?:USD|EUR|GBP|INR|Rs\.?|US)\s*(?=[0-9])")
_INFINITY = re.compile(r"^(-?)\s*(?:infinity|\u221e)$", re.IGNORECASE)
_COLORED = re.compile(r"\\(?:textcolor|color|colorbox)\s*\{[^{}]*\}\s*\{([^{}]*)\}")
_DECIMAL_COMMA = re.compile(r"([+-]?(?:[0-9]{1,3}(?:[. ][0-9]{3})+|[0-9]+)),([0-9]+)")
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = (
    {word: value for value, word in enumerate(_ONES)}
    | {word: 10 * tens for tens, word in enumerate(_TENS, 2)}
    | {
        word + between + one: 10 * tens + value
        for tens, word in enumerate(_TENS, 2)
        for value, one in enumerate(_ONES[1:10], 1)
        for between in "- "
    }
)


_UNITS = {
    name: names.split()[0]
    for names in (
        "% percent percents percentage pct",
        "° degree degrees deg",
        "inch inches in",
        "foot feet ft",
        "yard yards yd",
        "mile miles mi",
        "mm millimeter millimetre",
        "cm centimeter centimetre",
        "m meter metre",
        "km kilometer kilometre",
        "g gram gm",
        "kg kilogram kilo",
        "mg milligram",
        "pound pounds lb lbs",
        "ounce ounces oz",
        "l liter litre",
        "ml milliliter millilitre",
        "s second sec",
        "min minute mins",
        "h hour hr hrs",
        "day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "cent cents",
        "dollar dollars usd bucks",
        "euro euros eur",
        "mph",
        "kelvin K",
    )
    for name in names.split()
}
_GLUED = {
    *["mm", "cm", "km", "kg", "mg", "ml", "ft", "lb", "lbs", "oz", "min", "hr", "mph"],
    *[name for name in _UNITS if len(name) > 3],
}
_CURRENCIES = {"$": "dollar", "€": "euro"}
_SPEEDS = {
    "mph": re.compile(r"^mi(?:les?)?\s?(?:per|/)\s?(?:hour|hr|h)\b"),
    "km/h": re.compile(r"^(?:kph|km(?:ph|h)|(?:km|kilomet(?:er|re)s?)\s?(?:per|/)\s?(?:hour|hr|h))\b"),
    "m/s": re.compile(r"^(?:m|met(?:er|re)s?)\s?(?:per|/)\s?(?:second|sec|s)\b"),
}
_POWERS = {"square": "^2", "sq": "^2", "sq.": "^2", "cubic": "^3", "cu": "^3"}

# Longer than any answer; Python refuses to read integers beyond 4,300 digits, and a looping model writes
# them.
_MAX_QUANTITY_CHARS = 200

# A decimal stands for the numbers that it is a rounding of from this many places and digits on.
_MIN_PLACES = 6
_MIN_DIGITS = 4


class Quantity(NamedTuple):
    """An exact number and what it counts."""

    value: Fraction
    unit: str
    """Singular and short where it is known; empty where none is given."""
    written: str = ""
    """The digits of a decimal; empty for other numbers."""


def same_answer(first: str, second: str) -> bool:
    r"""True if two answers are the same after normalization; symmetric.

    Numbers are compared as exact rationals: ``1,234`` = ``$1234.00``, ``1\frac{3}{4}`` = ``7/4`` = ``1.75``.
    A unit counts only where both have one: ``42 apples`` = ``42``, ``5 m`` != ``5 km``. Anything else is
    compared as text, without case, spaces, currency signs, LaTeX spacing and closing punctuation. An empty
    answer equals nothing.

    >>> same_answer("The Moon.", "the moon"), same_answer("2", "20"), same_answer("(1, 2)", "(1,2)")
    (True, False, True)
    """
    return bool(decide(first, second))


def decide(first: str, second: str) -> bool | None:
    """Whether two answers are the same; None where that takes mathematics."""
    left, right = quantity(first), quantity(second)
    if left and right:
        return _same_quantity(left, right)
    texts = normalize(first), normalize(second)
    if same_text(*texts):
        return True
    for number, other in ((left, texts[1]), (right, texts[0])):
        comma = _DECIMAL_COMMA.fullmatch(other) if len(other) <= _MAX_QUANTITY_CHARS else None
        if number and comma:
            value = Fraction(re.sub(r"[. ]", "", comma[1]) + "." + comma[2])
            return value == number.value or None
    based = [_based(text) for text in texts]
    if based[0] and based[1]:
        return based[0] == based[1]
    for base, other in ((based[0], texts[1]), (based[1], texts[0])):
        if base and re.fullmatch(r"[0-9A-Fa-f]{1,200}", other):
            return base[0] == other.casefold()
    if any(is_words(text) for text in texts) or not all(texts):
        return False
    return None


def quantity(answer: str) -> Quantity | None:
    """The value and the unit of an answer that is nothing but a number, perhaps with a unit; else None."""
    if len(answer) > 4 * _MAX_QUANTITY_CHARS:
        return None
    text = normalize(answer)
    if text.casefold() in _NUMBER_WORDS:
        return Quantity(Fraction(_NUMBER_WORDS[text.casefold()]), "")
    match = _NUMBER.match(text) if len(text) <= _MAX_QUANTITY_CHARS else None
    value = _value(match) if match else None
    if match is None or value is None:
        return None
    rest = text[match.end() :]
    while scale := _SCALE.match(rest):
        value *= SCALES[scale[1]]
        rest = rest[scale.end() :]
    unit = _unit(rest)
    if unit is None:
        return None
    currency = next((name for sign, name in _CURRENCIES.items() if sign in answer[:3]), "")
    plain = match["decimal"] if not match["divisor"] and rest == text[match.end() :] else ""
    return Quantity(value, unit or (currency if not answer.rstrip().endswith("$") else ""), plain or "")


def rounds_to(written: str, value: Fraction) -> bool:
    """True if a decimal of six places or more, four of its digits significant, is a number rounded, or cut at
    its end.

    >>> [rounds_to(written, Fraction(2, 3)) for written in ("0.666667", "0.666666", "0.67")]
    [True, True, False]
    """
    places = len(written.partition(".")[2])
    if places < _MIN_PLACES or len(re.sub(r"[^0-9]", "", written).lstrip("0")) < _MIN_DIGITS:
        return False
    beyond = (value - _plain(written)) * 10**places
    return Fraction(-1, 2) <= beyond < 1


def normalize(answer: str) -> str:
    """An answer without markup, LaTeX spacing and currency signs, and with one spelling of each sign."""
    text = re.sub(
        r",\s*\\!\s*", ",", answer.translate(_CHARACTERS).replace("{,}", ",").replace("{-}", "-")
    ).replace(r"\!", "")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\?[$€£¥₹]", "", text)
    text = _COLORED.sub(r"\1", text)
    text = _DOTTED.sub(r"\\overline{\1\2\3}", _REPEATED.sub(r"\1\\overline{\2}", text))
    text = re.sub(r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", " ", text)
    text = _UPRIGHT.sub(r" \1", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°", text.replace(r"\%", "%"))
    text = " ".join(text.split()).lstrip('*_`":= ').rstrip('*_`".,;: \\')
    text = _CURRENCY_CODE.sub("", text) if text[:1].isupper() else text
    text = _INFINITY.sub(r"\1\\infty", text)
    return r"(-\infty,\infty)" if _REALS.fullmatch(text) else text


def same_text(left: str, right: str) -> bool:
    """Equality of normalized texts; case counts where it may be mathematics (Δ and δ, N and n)."""
    if "\\" not in left + right and re.search(r"[A-Za-z]{2}|^\W*[A-Ea-e]\W*$", left):
        left, right = left.casefold(), right.casefold()
    # A space between digits separates numbers: "1 1/2" is not "11/2".
    left, right = (re.sub(r"(?<![0-9]) | (?![0-9])", "", text) for text in (left, right))
    return left == right != ""


def is_words(text: str) -> bool:
    """True for a normalized text that is language, which math-verify would read as a product of letters."""
    names = r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|infinity|inf|pi)"
    return (
        re.fullmatch(r"[A-Za-z][A-Za-z\s'\u2019,.!?-]*", text) is not None
        and re.search(r"[A-Za-z]{4}", text) is not None
        and re.search(rf"\b{names}", text) is None
    )


def _same_quantity(left: Quantity, right: Quantity) -> bool:
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if left.unit == right.unit or "%" not in (left.unit, right.unit):
        return left.value == right.value or any(
            number.value * other.value > 0 and rounds_to(number.written, abs(other.value))
            for number, other in ((left, right), (right, left))
        )
    percent, plain = (left.value, right.value) if left.unit == "%" else (right.value, left.value)
    return plain in (percent, percent / 100)


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that `_NUMBER` found; None where it divides by nothing."""
    parts = match.groupdict()
    sign = -1 if parts["sign"] == "-" else 1
    try:
        if parts["fraction"]:
            found = re.search(_FRACTION, parts["fraction"])
            assert found is not None
            ratio = _plain(found[1] or found[2]) / _plain(found[3] or found[4])
            return sign * (int(parts["whole"] or 0) + ratio)
        if parts["mixed"]:
            return sign * (int(parts["mixed"]) + Fraction(int(parts["top"]), int(parts["bottom"])))
        if again := parts["again"] or parts["digit"] or parts["round"]:
            once = parts["once"]
            repeated = Fraction(int(again), 10 ** len(again) - 1) / 10 ** len(once)
            return sign * (_plain(f"{parts['start'] or 0}.{once or 0}") + repeated)
        return sign * _plain(parts["decimal"]) / _plain(parts["divisor"] or "1")
    except ZeroDivisionError:
        return None


def _plain(text: str) -> Fraction:
    return Fraction(re.sub(r"[, '\u2019]", "", text))


def _unit(rest: str) -> str | None:
    """The unit that a text behind a number is; None where it is something else."""
    text = rest.strip(" ,.")
    for name, spelled in _SPEEDS.items():
        text = spelled.sub(name, text)
    if not text:
        return "" if not rest.strip(" ,") or rest.strip() == "." else None
    if text[0] in "%°":
        scale = text[1:].strip()
        return text[0] if not scale or (scale[0].isalpha() and _WORD_UNIT.fullmatch(scale)) else None
    if not _WORD_UNIT.fullmatch(text) or _VALUE_WORD.search(text.casefold()) or _SCALE.match(" " + text):
        return None
    words = text.split()
    power = _POWERS.get(words[0].casefold(), "") if len(words) > 1 else ""
    word = words[1 if power else 0].strip(",.")
    if rest[0] not in " ," and word not in _GLUED:
        return None
    stem, mark, exponent = word.replace("²", "^2").replace("³", "^3").partition("^")
    if (
        len(stem) == 1
        and stem.casefold() not in _UNITS
        and stem not in ("A", "C", "F", "J", "K", "N", "V", "W")
    ):
        return None  # a variable
    name = _UNITS.get(stem) or _singular(stem.casefold())
    return name + power + (mark + exponent.strip("{}") if mark else "")


def _singular(word: str) -> str:
    if word in _UNITS:
        return _UNITS[word]
    stem = word[:-1] if word.endswith("s") and not word.endswith("ss") else word
    return _UNITS.get(stem, stem)


def _based(text: str) -> tuple[str, int] | None:
    match = _BASED.fullmatch(text) if len(text) <= _MAX_QUANTITY_CHARS else None
    base = _NUMBER_WORDS.get(match[2]) or (int(match[2]) if match[2].isdigit() else None) if match else None
    return (match[1].casefold(), base) if match and base else None
