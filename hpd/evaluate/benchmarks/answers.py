"""Final answers in free text. Every step is one pass over the text."""

import re
from collections.abc import Iterator

from hpd.evaluate.benchmarks.boxes import OPEN_BOX, Span, after_cut_box, closed_boxes, last_boxes
from hpd.evaluate.benchmarks.quantities import DECIMAL, SCALES, VULGAR, quantity, same_answer

__all__ = [
    "drop_thinking",
    "final_answer",
    "last_math",
    "same_answer",
    "split_answers",
    "stated_answer",
    "unclosed_thinking",
]

_THINKING_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷")
_THINKING_START = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[THINK\]|◁think▷")

_MARKER = re.compile(
    r"<answer>|\banswers?\b[*_\"'`)]*\s*"
    r"(?:(?:to|for|of)\b[^.:\n]{0,80}?\s)?"
    r"(?:(?:is|are|was|must be|would be|should be|will be|becomes)\b[*_]*\s*:?|:|=|(?=\n))",
    re.IGNORECASE,
)
_FINAL = re.compile(r"\bfinal\W{1,4}$", re.IGNORECASE)
# A looping model repeats its marker; the answer is after one of the last.
_MAX_MARKERS = 50
_MAX_SENTENCE_CHARS = 1000

_SENTENCE_END = re.compile(r"""[.!?][*_"`)]*(?:\s|$)""")

_SCALE_WORDS = "|".join(SCALES)
# The look-behind keeps digits of identifiers (x2, v1.5) out, and reads the minus of 7-3 as an operator.
_NUMBER_IN_PROSE = re.compile(
    rf"(?<![0-9A-Za-z_./)\]])[-\u2212\u2013]?[$€£¥]?"
    rf"(?:[0-9]{{0,6}}\s?[{VULGAR}]|[0-9]{{1,6}}\s[0-9]{{1,4}}/[0-9]{{1,4}}(?![0-9])"
    rf"|(?:0,[0-9]+|[0-9]+,[0-9]{{1,2}})(?![0-9,]|\.[0-9])"
    rf"|\\[dt]?frac\s?\{{[0-9.]+\}}\s?\{{[0-9.]+\}}|{DECIMAL}(?:/[0-9]+)?)"
    rf"(?:\s?(?:{_SCALE_WORDS})(?![A-Za-z]))?(?:\s?\\?%)?"
)
# "the largest $n$ is 34": the formula before is what the answer is of.
_COPULA = re.compile(
    r"(?<!which)(?<!that)\s(?:is|are|equals)\s+(?=[-\u2212\u2013]?[$€£¥]?(?:\\\(|\\?[$]|\\[dt]?frac|[0-9.]))"
)

# x = 1 or x = 2, at the end of a text.
_ROOTS = re.compile(
    r"(?<![^\s:$])(([A-Za-z](?:\([a-z]\))?)\s*=\s*[-\u2212]?[0-9./]{1,20}"
    r"(?:\s*(?:or|and)\s*(?:\2\s*=\s*)?[-\u2212]?[0-9./]{1,20}){1,9})[\s.]*$"
)
_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")
_FENCES = re.compile(r"\\[()\[\]]|(?<!\\)\$\$?")

_SEPARATOR = re.compile(r"[\[\](){}]|,|;|\band\b|\bor\b")

_LEAD_IN = re.compile(
    r"(?:(?:therefore|thus|so|hence|then|now|about|approximately|approx\.?|roughly|around|simply|just|exactly"
    r"|indeed|clearly|only|also|still|nearly|almost|equal to|given by|a total of|the number|the value|that is"
    r")\b\s*[,:]?|[-_=]{3,}\s*(?=\n)|[:=≈~])\s*",
    re.IGNORECASE,
)
_MATH_START = re.compile(
    r"[-+\u2212\u2013±]?\s*[$€£¥]?\s*(?:[0-9.(\[{\\√π∞|]|[A-Za-z](?:\([A-Za-z]\))?\s*(?:[=<>≤≥^+*/\\∈-]|$))"
)
_PROSE = re.compile(
    r"(?:[,;:]?\s+(?:(?:because|since|which|where|as|when|after|if|so|therefore|thus|hence|we|i|that|by|from"
    r"|not|but|instead|rather|with)\b|(?:\u2014|--|→|⇒)\s)|,\s*\"[A-Za-z_ ]+\"\s*:).*",
    re.IGNORECASE | re.DOTALL,
)
# "(in dollars)", "(not 6)", "(confidence: 90%)" behind a formula; "(mod 5)" belongs to it.
_ASIDE = re.compile(r"\s*\((?!p?mod\b)[A-Za-z ]{2,40}(?:[:=,]?\s*[0-9.]+\s?%?)?\)$")
_NO_ANSWER = re.compile(
    r"(?:clear|correct|right|wrong|incorrect|helpful|final|obvious|unique|simple|below|above|as follows|let"
    r"|we|i|to|first|found|verified|given|straightforward|not|in|this|here|step|reasonable|consistent"
    r"|following|therefore|thus|so|useful|understandable|complete|now|it|you|your|for|what|explained"
    r"|okay|ok|alright|sure|well|hmm|wait|looking|using|considering|there)\b"
    r"|.*\b(?:let me|let us|let['\u2019]s|we|i['\u2019]ll|i will|i need)\b",
    re.IGNORECASE,
)
_MAX_WORDS = 8

# Emphasis, white space, the ends of proofs, dingbats and emoji.
_DECORATION = "*_` \t\r\n\u00a0\u220e\u25a0\u25a1\u2b50\ufe0f\u200d" + "".join(
    chr(code) for first, last in ((0x2700, 0x27BF), (0x1F300, 0x1FAFF)) for code in range(first, last + 1)
)


def drop_thinking(text: str) -> str:
    """What follows a reasoning model's thoughts; nothing where they were never closed.

    >>> drop_thinking("<think>3?</think>5"), drop_thinking("<think>it may be 3"), drop_thinking("5")
    ('5', '', '5')
    """
    ends = list(_THINKING_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    start = _THINKING_START.search(rest)
    return rest[: start.start()] if start else rest


def unclosed_thinking(text: str) -> bool:
    """True where a text is thoughts that were never closed, so that it holds no answer."""
    return bool(text.strip()) and _THINKING_START.search(text) is not None and not drop_thinking(text).strip()


def final_answer(text: str) -> str | None:
    r"""The final answer that a text states, as written, or None where it states none.

    The first rule that finds something decides: the last ``\boxed{...}`` with balanced braces, or several
    that "and", "or" or a comma joins; the line after the last ``####`` that something like a number follows;
    what follows the last "answer is" or "Answer:" with something like an answer behind it; a number in bold
    in the last line; the last number.
    Thoughts (``<think>``) are no part of the text. Where the last box was cut off, nothing before it is the
    answer, and what a later line marks as final is all that can be (`after_cut_box`).

    >>> final_answer("12 + 30 = 42, so she has 42 apples.")
    '42'
    >>> final_answer(r"Thus $x = \boxed{\frac{1}{2}}$."), final_answer(r"So \boxed{41}. No, \boxed{4")
    ('\\frac{1}{2}', None)
    """
    text = drop_thinking(text)
    stated = stated_answer(text)
    if stated is not None or after_cut_box(text) is not None:
        return stated
    if roots := _ROOTS.search(text):
        return roots[1]
    numbers = _NUMBER_IN_PROSE.findall(text)
    bold = [
        found for found in _BOLD.findall(text.rstrip().rsplit("\n", 1)[-1]) if quantity(found) or not numbers
    ]
    return bold[-1] if bold else numbers[-1] if numbers else None


def stated_answer(text: str) -> str | None:
    """The answer that a text marks as final (`final_answer` without its last rule), or None where nothing is
    marked.

    This is the rule for references: an unmarked one such as ``(3, 4)`` is an answer as a whole.
    """
    text = drop_thinking(text)
    boxes = final_boxes(text)
    if boxes:
        return ", ".join(boxes)
    rest = after_cut_box(text)
    text = text if rest is None else rest
    return _after_hashes(text) or _after_marker(text)


def final_boxes(text: str) -> list[str]:
    r"""The answers of `last_boxes`; of a step only where "final answer" with a number or a formula follows.

    >>> final_boxes(r"He earns \boxed{255}. The final answer is $10,455$."), final_boxes(r"\boxed{2}. Done.")
    (['10,455'], ['2'])
    """
    boxes = last_boxes(text)
    closed = closed_boxes(text) if boxes else []
    if not closed:
        return boxes
    behind = text[closed[-1].end :]
    final = [match for match in _MARKER.finditer(behind) if _FINAL.search(behind[: match.start()])]
    if not final:
        return boxes
    tail = behind[final[-1].end() :]
    found = _reduced(tail[:_MAX_SENTENCE_CHARS])
    plain = found is not None and (quantity(found) or _strip_markup(tail).startswith(("$", r"\(", r"\[")))
    return [found] if found is not None and plain else boxes


def last_math(text: str) -> str | None:
    r"""The last formula (``$...$``, ``\(...\)``, ``\[...\]``) of a text, unless a number outside of formulas
    comes after it.

    >>> last_math("so $x = 1$, that is $y = x + 1$."), last_math("so $x = 1$, that is 2.")
    ('y = x + 1', None)
    """
    formulas = list(_formulas(text))
    if not formulas or _NUMBER_IN_PROSE.search(text, formulas[-1].end):
        return None
    return _joined(text, formulas, len(formulas) - 1, backwards=True) or None


def split_answers(text: str) -> list[str]:
    r"""The answers of a list: parts between commas, semicolons, "and", "or" that are outside of brackets.

    Every such comma separates: in a list, ``1,234`` is two answers.

    >>> split_answers(r"$(0,2)$, $(0,-2)$ and $3$"), split_answers(r"\{1, 2\}")
    (['(0,2)', '(0,-2)', '3'], ['1', '2'])
    """
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\$|\\[,;:! ]", "", text).strip()
    text = re.sub(r"\\text\s*\{\s*(and|or|,)\s*\}", r" \1 ", text)
    text = re.sub(r"(?<=[0-9)])(and|or)(?=[A-Z(0-9])", r" \1 ", text)
    outer = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    parts, depth, start = [], 0, 0
    text = outer[1] if outer and is_balanced(outer[1]) else text
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


def is_balanced(text: str) -> bool:
    """True where no bracket closes that did not open, and none stays open."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _after_hashes(text: str) -> str | None:
    """The line after the last ``####`` that is like a number, or with which the text ends."""
    tails = text.split("####")
    for position in range(len(tails) - 1, max(0, len(tails) - 1 - _MAX_MARKERS), -1):
        line = _first_line(tails[position][:_MAX_SENTENCE_CHARS])
        enumerated = re.match(r"[0-9]+[.):]\s+[A-Za-z]", line)
        if line and not enumerated and (quantity(line) or _only_math(line)):
            return _reduced(line) or line
        if (
            position == len(tails) - 1
            and line
            and _strip_markup(tails[-1]) == line
            and not _MARKER.search(line)
        ):
            return line
    return None


def _only_math(line: str) -> bool:
    words = re.sub(r"\\(?:text|mathrm|textbf)\s*\{[^{}]*\}|\\[A-Za-z]+", "", line)
    return _MATH_START.match(line) is not None and not re.search(r"[A-Za-z]{3}", words)


def _after_marker(text: str) -> str | None:
    markers = list(_MARKER.finditer(text))
    for marker in reversed(markers[-_MAX_MARKERS:]):
        tail = text[marker.end() : marker.end() + _MAX_SENTENCE_CHARS]
        found = _reduced(tail.split("</answer>", 1)[0] if marker.group() == "<answer>" else tail)
        if found:
            return found
    return None


def _reduced(tail: str) -> str | None:
    """The answer at the start of what follows a marker; None where nothing like an answer does."""
    tail = _strip_markup(tail)
    while lead := _LEAD_IN.match(tail):
        tail = _strip_markup(tail[lead.end() :])
    sentence = _strip_markup(_SENTENCE_END.split(_first_line(tail), maxsplit=1)[0])
    formulas = list(_formulas(tail))
    limit = len(sentence) if tail.startswith(sentence) else 0
    said = [match for match in _COPULA.finditer(tail[:limit]) if _outside(formulas, match)]
    if said and formulas and formulas[0].end <= said[-1].start():
        return _reduced(tail[said[-1].end() :])
    if formulas and (
        formulas[0].start == 0 or (formulas[0].start < limit and not _NUMBER_IN_PROSE.match(tail))
    ):
        return _joined(tail, formulas, 0)
    if not sentence or OPEN_BOX.search(sentence):
        return None
    if quantity(sentence):
        return sentence
    if _MATH_START.match(sentence):
        return _without_prose(sentence)
    numbers = list(_NUMBER_IN_PROSE.finditer(sentence))
    if (numbers and not _NO_ANSWER.match(sentence)) or len(numbers) == 1:
        return _with_unit(sentence, numbers[-1])
    short = len(sentence.split()) <= _MAX_WORDS
    return sentence if short and not numbers and not _NO_ANSWER.match(sentence) else None


def _outside(formulas: list[Span], match: re.Match[str]) -> bool:
    return not any(formula.start < match.start() < formula.end for formula in formulas)


def _without_prose(sentence: str) -> str:
    """A formula in plain text without the explanation behind it."""
    head = _ASIDE.sub("", _PROSE.sub("", sentence, count=1).rstrip(" ,;:"))
    if quantity(head) or not re.search(r"(?<![\\A-Za-z{])[A-Za-z]{3,}\s+[A-Za-z]{2,}", head):
        return head
    number = _NUMBER_IN_PROSE.match(head)
    return number.group() if number else head


def _with_unit(sentence: str, number: re.Match[str]) -> str:
    """A number in prose, with what is behind it where that is its unit."""
    rest = sentence[number.start() :]
    return rest if quantity(rest) else number.group()


def _first_line(text: str) -> str:
    return _strip_markup(_strip_markup(text).split("\n", 1)[0])


def _strip_markup(text: str) -> str:
    return text.strip(_DECORATION)


def _formulas(text: str) -> Iterator[Span]:
    r"""Formulas; a dollar sign that no other one closes within its paragraph is a currency."""
    closing = {r"\(": r"\)", r"\[": r"\]", "$": "$", "$$": "$$"}
    opened: re.Match[str] | None = None
    for match in _FENCES.finditer(text):
        token = match.group()
        if opened is not None and closing[opened.group()] == token and _closes(text, opened, match):
            content = text[opened.end() : match.start()].strip()
            if content:
                yield Span(opened.start(), match.end(), content)
            opened = None
        elif token in closing and (opened is None or opened.group() == token or "$" in opened.group()):
            opened = match


def _closes(text: str, opened: re.Match[str], match: re.Match[str]) -> bool:
    if match.group() != "$":
        return match.start() > opened.end()
    content = text[opened.end() : match.start()]
    money = re.match(r"[0-9][0-9,.]*\s+[A-Za-z]{2}", content) or text[match.end() : match.end() + 1].isdigit()
    return bool(content.strip()) and "\n\n" not in content and not money


def _joined(text: str, formulas: list[Span], position: int, backwards: bool = False) -> str:
    """A formula with those that "and", "or" or a comma joins to it, and the unit behind a single one."""
    chosen = [formulas[position]]
    others = reversed(formulas[:position]) if backwards else formulas[position + 1 :]
    for other in others:
        first, second = (other, chosen[0]) if backwards else (chosen[-1], other)
        between = text[first.end : second.start]
        if len(between) > 20 or not re.fullmatch(r"\s*,?\s*(?:and|or|,)\s*", between):
            break
        chosen.insert(0 if backwards else len(chosen), other)
    if len(chosen) == 1:
        content = chosen[0].content
        behind = re.match(r"\s*[A-Za-z]+|\s*[%°]", text[chosen[0].end :])
        with_unit = content + (behind.group() if behind else "")
        return with_unit if behind and quantity(content) and quantity(with_unit) else content
    return ", ".join(span.content for span in chosen)
