"""The option that a text on a multiple-choice question chooses."""

import re

from hpd.evaluate.benchmarks.answers import drop_thinking
from hpd.evaluate.benchmarks.boxes import after_cut_box, last_boxes

__all__ = ["chosen_letter"]

# Behind "a" or "A" as an article comes a word; these may follow it as a letter.
_AFTER_LETTER = (
    r"is|was|are|because|since|as|and|or|but|with|for|from|by|given|due|not|rather|over|among|would|seems|has"
    r"|makes|matches|fits|gives|here|looks|appears|must|only|to|it"
)
_LETTER = (
    r"(?:[B-D](?![A-Za-z0-9'\u2019]|\s*[=+^]\s*[0-9A-Za-z]|-[0-9A-Za-z])"
    rf"|A(?![A-Za-z0-9'\u2019-])(?!\s+(?!(?:{_AFTER_LETTER})\b)[A-Za-z]))"
)
_ANY_CASE = rf"(?:{_LETTER}|[a-d](?=\s*(?:[).\]}}:,*]|$)))"

_FULL_WIDTH = str.maketrans("ＡＢＣＤ", "ABCD")
_WRAPPING = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathtt|mathit|bf|rm|operatorname|boxed)"
    r"(?![A-Za-z])\s*|\\[()\[\],;:! ]|\\left|\\right|[{}$*_`\"\u201c\u201d]"
)
_STATED = re.compile(
    rf"^\W*(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+|final\s+)?(?:option|choice|answer|letter)s?\s*"
    rf"(?:is\b)?\W*)*({_ANY_CASE})(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_PREFIX = (
    r"(?:[\s(\[:=-]|option\s|choice\s|letter\s|answer\s|therefore\b|thus\b|clearly\b|likely\b"
    r"|indeed\b|only\b|for sure\b|surely\b|certainly\b|definitely\b|probably\b|\bis\b|,){0,8}"
)
_CHOOSES = re.compile(
    rf"\b(?i:(?:answer|option|choice)(?:\s+(?:to|for|of)\b[^.\n]{{0,60}}?)?\s*"
    rf"(?:is|would be|must be|should be|=|:|-)"
    rf"|(?:choose|chose|pick|select|go with|going with|opt for|settle on|conclude)(?:\s+that)?"
    rf"|(?:answer|option|choice)\s*\n)"
    rf"(?i:{_PREFIX})({_ANY_CASE})"
)
_IS_RIGHT = re.compile(
    rf"(?<![A-Za-z0-9'])\(?({_LETTER})\)?\.?\s*(?:(?:is|must be|seems|looks)\s+"
    r"(?:therefore\s+|thus\s+|clearly\s+)?"
    r"(?:the\s+)?(?:correct|right|best|answer|true|most)|fits best|matches)"
)
_ALONE = re.compile(rf"(?<![A-Za-z0-9'\u2019_\\^+=])\(?({_LETTER})\)?(?![A-Za-z0-9'\u2019])")
_REFUSED_BEFORE = re.compile(
    r"(?:\bnot|\bnon|n't|n\u2019t|\bneither|\bnor|\bthan|\bover|\binstead of|\bexclude[sd]?|\beliminate[sd]?"
    r"|\breject(?:s|ed)?|\brule[sd]? out|\bunlike)\s*(?:be\s+|is\s+)?(?:option\s+|choice\s+)?"
    r"(?:(?:\(?[A-D]\)?\s*,\s*)*\(?[A-D]\)?,?\s*(?:\bor\b|\band\b|\bnor\b)\s*)?\(?$"
    r"|\bbetween\s+(?:\(?[A-D]\)?\s+and\s+)?\(?$|\beither\s+(?:\(?[A-D]\)?\s+or\s+)?\(?$",
    re.IGNORECASE,
)
_REFUSED_BEHIND = re.compile(
    r"^\)?(?:\s*(?:,|and|or)\s*\(?[A-D]\)?)*\s*"
    r"(?:(?:is|are|was|were)\s+(?:(?:all|both|also|clearly|thus)\s+)?"
    r"(?:not\b|wrong|incorrect|false|out\b|eliminated|excluded|impossible|too\b|ruled)"
    r"|isn't|isn\u2019t|aren't"
    r"|fails|can't|cannot|violates|contradicts|doesn't)"
)
# "A, C and D are wrong": a list, no choice.
_GOES_ON = re.compile(r"\s*\)?\s*,\s*(?:and\s+|or\s+)?\(?[A-D]\b(?!')")
# A list with one ticked box says which; ticks without empty boxes may be of anything.
_BOX = r"^[ \t]*(?:[-*+][ \t]+)?"
_TICKED = re.compile(rf"{_BOX}(?:\[[xX]\]|[☑✅✔])[^\w\n]{{0,8}}({_ANY_CASE})", re.MULTILINE)
_UNTICKED = re.compile(rf"{_BOX}(?:\[ \]|[☐❌✗✘])", re.MULTILINE)
_HASHES = re.compile(r"^#+[ \t]*(?:final\s+)?(?:answer\s*:?\s*)?(.{1,60})$", re.MULTILINE | re.IGNORECASE)


def chosen_letter(text: str) -> str | None:
    r"""The option that a text chooses: in its last box, after the last "the answer is", "I choose" or before
    "is correct", else the last letter that stands alone and is not refused.

    >>> [chosen_letter(text) for text in (r"so \boxed{\text{B}}.", "Answer: (c)", "A is wrong, so D.", "no")]
    ['B', 'C', 'D', None]
    """
    text = drop_thinking(text)
    rest = after_cut_box(text)
    text = (text if rest is None else rest).translate(_FULL_WIDTH)
    boxes = last_boxes(text)
    if boxes:
        found = _only_letter(boxes[-1]) if len(boxes) == 1 else None
        named = set(_ALONE.findall(_WRAPPING.sub("", ", ".join(boxes))))
        if found or len(named) > 1:
            return found
    plain, ticked = _WRAPPING.sub("", text), _TICKED.findall(text) if _UNTICKED.search(text) else []
    found = _only_letter(plain.strip()) if len(plain.strip()) < 200 and not ticked else None
    if found and len([match for match in _CHOOSES.finditer(plain) if not _refused(plain, match)]) < 2:
        return found
    for line in reversed(_HASHES.findall(plain)[-20:]):
        if re.fullmatch(rf"\W*(?:option\s*)?{_ANY_CASE}\W*", line):
            return _only_letter(line)
    chosen = [match for pattern in (_CHOOSES, _IS_RIGHT) for match in pattern.finditer(plain)]
    chosen = [match for match in chosen if not _refused(plain, match)]
    if chosen:
        return max(chosen, key=lambda match: match.start(1))[1].upper()
    if len(ticked) == 1:
        return ticked[0].upper()
    if re.search(r"\banswer\b\W{0,4}(?:is\b)?\s*:", plain, re.IGNORECASE) and not _ALONE.search(plain):
        return None
    alone = [match for match in _ALONE.finditer(plain) if not _refused(plain, match)]
    return alone[-1][1].upper() if alone else None


def _only_letter(text: str) -> str | None:
    """The letter at the start of an answer that is nothing more, or goes on with the option's own text."""
    plain = _WRAPPING.sub("", text).strip()
    match = _STATED.match(plain)
    if match is None or not re.match(rf"{_ANY_CASE}", match[1]):
        return None
    rest = match["rest"]
    ends = re.match(r"\s*\)?\s*$|\s*[).\]:,;-]|\s*[\u3000-\u9fff\uff00-\uff65]", rest)
    several = _GOES_ON.match(rest) or re.fullmatch(
        r"(?i)\)?(?:\s*(?:,|,?\s*(?:or|and)\b)\s*\(?[A-D]\)?)+\W*", rest
    )
    return match[1].upper() if ends and not several else None


def _refused(text: str, match: re.Match[str]) -> bool:
    before, behind = (
        text[max(0, match.start(1) - 40) : match.start(1)],
        text[match.end(1) : match.end(1) + 60],
    )
    return bool(_REFUSED_BEFORE.search(before) or _REFUSED_BEHIND.match(behind))
