"""Made word problems with checkable answers, as token ids: the text of scripts/gpu_evidence.py.

A prompt is a start, three events and a question, eight tokens each, so all prompts have one length:

    mokita has 34 dorubas in the box . then mokita finds 12 dorubas more today . ... how many dorubas does
    mokita have now ?

A solution works it out and ends in `#### 78`. Many are right: they differ in their opening, in the order of
operands and in what stands after an equation, each drawn with an uneven distribution. So the text has entropy
at known places, and the answer has none. Names and things are invented words that fill the vocabulary; a
number is one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from typing import NamedTuple

PAD, END = 0, 1
LARGEST = 99
NUM_EVENTS = 3
ANSWER = "####"

STARTS = ("{name} has {n} {thing} in the box .", "{name} owns {n} {thing} at the moment .")
EVENTS = {
    "+": ("then {name} finds {n} {thing} more today .", "a friend gives {name} {n} more {thing} ."),
    "-": ("then {name} loses {n} {thing} of them .", "{name} gives away {n} {thing} to {other} ."),
    "*": ("now {name} has {n} times as many .",),
}
QUESTION = "how many {thing} does {name} have now ?"
# What may be written, and how often (of 20).
OPENINGS = (
    ("", 11),
    ("let us count the {thing} :", 5),
    ("{name} starts with {n} {thing} :", 3),
    ("step by step :", 1),
)
LINKS = ((",", 10), ("so {name} has {n} ,", 6), ("which makes {n} ,", 3), ("that is {n} {thing} ,", 1))
_EQUATION = 5  # tokens of a + b = c
STRAIGHT_SHARE = 0.6
"""How often a sum or product is written in the order of the story."""


class Problem(NamedTuple):
    """A prompt, one of its solutions (both as token ids) and the right answer."""

    prompt: list[int]
    solution: list[int]
    answer: int


class WordProblems:
    """The language of a vocabulary size, and the problems in it.

    Args:
        vocab: tokens in all; half of what the templates leave are names, half are things.
    """

    def __init__(self, vocab: int):
        templates = [*STARTS, *(text for texts in EVENTS.values() for text in texts), QUESTION]
        templates += [text for text, _ in (*OPENINGS, *LINKS)]
        plain = sorted({word for text in templates for word in text.split() if "{" not in word})
        words = ["<pad>", "<end>", *map(str, range(LARGEST + 1)), *plain, *EVENTS, "=", ANSWER]
        invented = vocab - len(words)
        if invented < 4:
            raise ValueError(f"vocab must be at least {len(words) + 4}, got {vocab}.")
        made = [word for word, _ in zip(_invented_words(), range(invented), strict=False)]
        self.names, self.things = made[: invented // 2], made[invented // 2 :]
        self.words = [*words, *made]
        self.ids = {word: token for token, word in enumerate(self.words)}

    @cached_property
    def prompt_length(self) -> int:
        """Tokens of every prompt."""
        return len(self.draw(random.Random(0)).prompt)

    @cached_property
    def longest_solution(self) -> int:
        """Tokens of the longest solution, its end included."""
        opening, link = (max(len(text.split()) for text, _ in texts) for texts in (OPENINGS, LINKS))
        return opening + NUM_EVENTS * (_EQUATION + link) + len((ANSWER, "c", "<end>"))

    def draw(self, rng: random.Random) -> Problem:
        """A problem with a solution; equal states of `rng` give equal ones."""
        name, other = rng.sample(self.names, 2)
        slots = {"name": name, "other": other, "thing": rng.choice(self.things)}
        value = rng.randint(5, 60)
        prompt = [rng.choice(STARTS).format(n=value, **slots)]
        solution = [_chosen(rng, OPENINGS).format(n=value, **slots)]
        for _ in range(NUM_EVENTS):
            sign, number, result = _event(rng, value)
            prompt.append(rng.choice(EVENTS[sign]).format(n=number, **slots))
            pair = (value, number) if sign == "-" or rng.random() < STRAIGHT_SHARE else (number, value)
            solution.append(f"{pair[0]} {sign} {pair[1]} = {result}")
            solution.append(_chosen(rng, LINKS).format(n=result, **slots))
            value = result
        prompt.append(QUESTION.format(**slots))
        solution.append(f"{ANSWER} {value} <end>")
        return Problem(self.encode(" ".join(prompt)), self.encode(" ".join(solution)), value)

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.words[token] for token in tokens)

    def answer(self, tokens: Sequence[int]) -> int | None:
        """The number after the last answer mark of a text that ends there; None where there is none."""
        words = [self.words[token] for token in tokens]
        if "<end>" not in words:
            return None
        words = words[: words.index("<end>")]
        ended = len(words) >= 2 and words[-2] == ANSWER and words[-1].isdigit()
        return int(words[-1]) if ended else None


def _event(rng: random.Random, value: int) -> tuple[str, int, int]:
    """Sign, operand and result of an event whose result is a number of the vocabulary, above 0."""
    while True:
        sign = rng.choice(tuple(EVENTS))
        number = rng.randint(2, 4) if sign == "*" else rng.randint(2, 20)
        result = {"+": value + number, "-": value - number, "*": value * number}[sign]
        if 0 < result <= LARGEST:
            return sign, number, result


def _chosen(rng: random.Random, weighted: Sequence[tuple[str, int]]) -> str:
    texts, weights = zip(*weighted, strict=True)
    return rng.choices(texts, weights)[0]


def _invented_words() -> Iterator[str]:
    """Pronounceable words of three syllables, in a fixed order that mixes them; no English among them."""
    syllables = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(parts) + "x" for parts in product(syllables, repeat=3)]
    random.Random("words").shuffle(words)
    yield from words
