"""Grades of texts against reference answers: the rule of math, exact match and `hpd generate`'s filter."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hpd.evaluate.benchmarks.answers import (
    drop_thinking,
    final_answer,
    final_boxes,
    last_math,
    split_answers,
    stated_answer,
)
from hpd.evaluate.benchmarks.boxes import after_cut_box, all_boxes
from hpd.evaluate.benchmarks.quantities import decide, is_words, normalize, quantity, same_text
from hpd.evaluate.benchmarks.verifier import AnswerPair, Equality, compare_all
from hpd.evaluate.task import Verdict

__all__ = ["Rule", "extract", "grade_texts", "reference_answer"]

_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")

# Longer answers are no answers, and cost sympy its time limit.
_MAX_ANSWER_CHARS = 2000


class Rule(NamedTuple):
    """When an answer counts as the reference."""

    relative: float = 0.0
    """Tolerance of numbers, as a share of the reference; 0: exact."""
    absolute: float = 0.0
    """Tolerance of numbers, as a distance."""
    multiple: bool = False
    """The reference lists several answers: the same number of answers must be given, in any order."""


def grade_texts(
    texts: Sequence[str], references: Sequence[str], rules: Sequence[Rule] | None = None
) -> list[Verdict]:
    """Verdicts on the final answers of texts.

    An answer is right if it equals the reference as text or as an exact number, and else if math-verify finds
    them equal, within 20 seconds in a process of its own.

    Args:
        texts: what a model wrote.
        references: right answers, one per text.
        rules: one per text; None is `Rule()` for all.
    """
    rules = rules or [Rule()] * len(texts)
    extracted = [extract(*parts) for parts in zip(texts, references, rules, strict=True)]
    pairs = [_pairs(*parts) for parts in zip(extracted, references, rules, strict=True)]
    outcomes = compare_all([pair for needed in pairs for pair in needed if _cheap(pair) is None])
    return [_verdict(*parts, outcomes) for parts in zip(extracted, references, rules, pairs, strict=True)]


def extract(text: str, reference: str, rule: Rule) -> str | None:
    """The final answer of a text; where several answers are wanted, all boxes of its last line with a box."""
    text = drop_thinking(text)
    if decide(text[:_MAX_ANSWER_CHARS], reference) and len(text) <= _MAX_ANSWER_CHARS:
        return text.strip()
    if after_cut_box(text) is not None:
        return stated_answer(text)
    boxes = final_boxes(text)
    if rule.multiple and "####" not in text:
        lines = [line for line in text.split("\n") if r"\boxed" in line]
        listed = all_boxes(lines[-1]) if lines else []
        boxes = listed if len(listed) > len(boxes) else boxes
    wanted = len(split_answers(reference))
    if len(boxes) == 1 and wanted > 1 and len(split_answers(boxes[0])) == 1:
        everywhere = all_boxes(text)
        boxes = everywhere if len(everywhere) == wanted else boxes
    if boxes:
        return ", ".join(boxes)
    stated = stated_answer(text)
    if stated is not None:
        return stated
    clause = re.split(r"[,.;:!\n]", text.strip(), maxsplit=1)[0]
    if is_words(normalize(f"{reference} word")) and same_text(normalize(clause), normalize(reference)):
        return clause  # "Yes, it is."
    plain = final_answer(text)
    formula = last_math(text) if plain is not None or r"\boxed" not in text else None
    # "20 solutions for $x$": a name is no answer where a number is asked for.
    return plain if formula is None or (quantity(reference) and not re.search("[0-9]", formula)) else formula


def reference_answer(value: object) -> str:
    """The answer of a data row: what its text marks as final, or the text as a whole."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return stated_answer(text) or re.sub(r"^\s*\\+boxed\s*\{", "", text).strip()


def _pairs(found: str | None, reference: str, rule: Rule) -> list[AnswerPair]:
    """Comparisons that may be needed to grade an answer: one, or of every listed answer with every
    reference."""
    if found is None:
        return []
    whole = AnswerPair(reference, found, rule.relative, rule.absolute)
    if not rule.multiple:
        return [whole]
    golds, answers = _lists(reference, found)
    if len(golds) != len(answers):
        return []
    return [AnswerPair(gold, answer, rule.relative, rule.absolute) for gold in golds for answer in answers]


def _lists(reference: str, found: str) -> tuple[list[str], list[str]]:
    """Both lists of answers; commas between thousands are taken for what they are where the numbers of
    answers then fit."""
    lists = split_answers(reference), split_answers(found)
    if len(lists[0]) == len(lists[1]):
        return lists
    return split_answers(_THOUSANDS.sub("", reference)), split_answers(_THOUSANDS.sub("", found))


def _cheap(pair: AnswerPair) -> Equality | None:
    """The outcome where strings and exact numbers decide it."""
    gold, answer = quantity(pair.gold), quantity(pair.answer)
    if len(pair.answer) > _MAX_ANSWER_CHARS:
        return Equality(False, "too long")
    same = decide(pair.gold, pair.answer)
    if same is None and gold and not re.search(r"[0-9\\πe]", normalize(pair.answer)):
        return Equality(False, "no number")
    if same or not (gold and answer):
        return None if same is None else Equality(same, "same" if same else "different")
    # Equal numbers that are not the same answer have different units.
    near = gold.value != answer.value and abs(gold.value - answer.value) <= max(
        pair.absolute, pair.relative * abs(gold.value)
    )
    return Equality(near, "numbers")


def _verdict(
    found: str | None,
    reference: str,
    rule: Rule,
    pairs: Sequence[AnswerPair],
    outcomes: Mapping[AnswerPair, Equality],
) -> Verdict:
    if found is None:
        return Verdict(correct=False, detail="no answer")
    if not pairs:
        return Verdict(correct=False, extracted=found, detail="another number of answers")
    decided = {pair: _cheap(pair) or outcomes[pair] for pair in pairs}
    if not rule.multiple:
        (outcome,) = decided.values()
        return Verdict(correct=outcome.same, extracted=found, detail=outcome.how)
    golds, left = _lists(reference, found)
    for gold in golds:
        match = next(
            (a for a in left if decided[AnswerPair(gold, a, rule.relative, rule.absolute)].same), None
        )
        if match is None:
            return Verdict(correct=False, extracted=found, detail=f"without {gold}")
        left.remove(match)
    return Verdict(correct=True, extracted=found, detail="all answers")
