"""Prompts for judges, and the reading of their verdicts."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hpd.evaluate.benchmarks.answers import drop_thinking
from hpd.evaluate.benchmarks.rows import read_rows
from hpd.evaluate.benchmarks.win_rates import LABELS
from hpd.files import digest_text, whole_characters
from hpd.generation.texts import Message

__all__ = [
    "FIVE_POINTS",
    "PREFERENCE",
    "JudgePrompt",
    "load_fastchat_prompts",
    "load_prompt",
    "read_label",
    "read_rating",
]

_PLACEHOLDER = re.compile(r"\{(\w+)\}")

_BRACKETED = re.compile(r"\[\[([^\[\]\n]{1,40})\]\]")

_LOOSE_LABEL = re.compile(r"\[([^\[\]\n]{1,40})\]")

_ONLY_ON_ITS_LINE = re.compile(r"^\W*\[([^\[\]\n]{1,40})\]\W*$", re.MULTILINE)

# Markup and words around the letters, and signs that stand for > and =.
_AROUND_LABEL = re.compile(
    r"(?i:\\(?:text|mathbf|mathrm)|\b(?:answer|assistant|verdict|option)\b)|[\s*_$`{}:.\"']"
)

_SIGNS = {"≫": ">>", "≪": "<<", "»": ">>", "«": "<<", "＞": ">", "＜": "<", "≈": "=", "==": "=", "\\gg": ">>"}

_NUMBER = r"\s*\**\s*(?:(?i:rating|score)\s*[:=]?\s*)?(\d+(?:[.,]\d*)?)\s*(?:/\s*10|(?i:out of 10))?\s*\**\s*"

_RATING = re.compile(rf"\[\[{_NUMBER}\]\]")

_LOOSE_RATING = re.compile(rf"\[{_NUMBER}\]")


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """One way to ask a judge. `{name}` in a text is a place to fill; other braces are literal."""

    system: str
    prompt: str
    reminder: str
    """Sent where a reply held no verdict."""

    def messages(self, **fields: str) -> list[Message]:
        """The conversation that is sent; texts are filled in once, so that braces in an answer stay what they
        are."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        filled = _PLACEHOLDER.sub(lambda match: fields.get(match[1], match[0]), self.prompt)
        return whole_characters([*turns, {"role": "user", "content": filled}])

    def places(self) -> set[str]:
        """Names of the places to fill."""
        return set(_PLACEHOLDER.findall(self.prompt))

    def fingerprint(self) -> str:
        """Short hash of all texts: verdicts of other prompts are other verdicts."""
        return digest_text(repr(sorted(asdict(self).items())))[:12]


_PAIR = (
    "<question>\n{question}\n</question>\n\n"
    "<answer_a>\n{answer_a}\n</answer_a>\n\n"
    "<answer_b>\n{answer_b}\n</answer_b>"
)

PREFERENCE = JudgePrompt(
    system=(
        "You compare two answers to one instruction. Decide which of them a careful person who gave this "
        "instruction would rather receive: it does what was asked, is right, complete and clear, and wastes "
        "no words. Which answer comes first and which is longer must not matter. Reason in at most three "
        "sentences, then end with one line that holds nothing but your verdict: [[A]] if answer A is better, "
        "[[B]] if answer B is better, [[C]] if neither is."
    ),
    prompt=_PAIR,
    reminder=(
        "Your reply holds no single verdict. Write exactly one of [[A]], [[B]] or [[C]], and nothing else."
    ),
)
"""For AlpacaEval, in our words (upstream's prompt is its own)."""

FIVE_POINTS = JudgePrompt(
    system=(
        "You referee two answers to a demanding request. First work out for yourself, briefly, what a good "
        "answer must contain. Then check each answer against it: errors and omissions first, then relevance, "
        "and only then presentation. The order of the answers, their length and their formatting must not "
        "matter by themselves. End with one line that holds nothing but your verdict: [[A>>B]] answer A is "
        "much better, [[A>B]] answer A is better, [[A=B]] about equal, [[B>A]] answer B is better, [[B>>A]] "
        "answer B is much better."
    ),
    prompt=_PAIR,
    reminder=(
        "Your reply holds no single verdict. Write exactly one of [[A>>B]], [[A>B]], [[A=B]], [[B>A]] or "
        "[[B>>A]]."
    ),
)
"""For Arena-Hard, in our words; the five points are the benchmark's."""


def read_label(text: str) -> str | None:
    """The verdict between double brackets; None where there is none, or where different ones stand side by
    side.

    Without double brackets single ones count, where they hold a comparison or are alone on their line.

    >>> read_label("A is clearer. [[A>B]]"), read_label("[[A]] or [[B]]?"), read_label("I like both.")
    ('A>B', None, None)
    >>> read_label("A is clearer. [A > B]."), read_label("[A] is clearer.")
    ('A>B', None)
    """
    text = drop_thinking(text)
    labels = {_label(match) for match in _BRACKETED.findall(text)} - {None}
    if not labels:
        loose = {_label(match) for match in _LOOSE_LABEL.findall(text)} - {None}
        labels = {label for label in loose if label and len(label) > 1 and label != "TIE"}
        labels |= {_label(match) for match in _ONLY_ON_ITS_LINE.findall(text)} - {None}
    return labels.pop() if len(labels) == 1 else None


def _label(text: str) -> str | None:
    text = html.unescape(text)
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    label = _AROUND_LABEL.sub("", text).upper()
    return label if label in LABELS else None


def read_rating(text: str) -> float | None:
    """The rating from 1 to 10 between double brackets (or single ones, where there are no double ones).

    >>> read_rating("Clear and right. Rating: [[8]]"), read_rating("[[11]]"), read_rating("Rating: 8")
    (8.0, None, None)
    >>> read_rating("[[8.]]"), read_rating("[[ 7,5/10 ]]")
    (8.0, 7.5)
    """
    text = drop_thinking(text)
    found = _RATING.findall(text) or _LOOSE_RATING.findall(text)
    ratings = {float(number.replace(",", ".")) for number in found}
    rating = ratings.pop() if len(ratings) == 1 else None
    return rating if rating is not None and 1 <= rating <= 10 else None


def load_prompt(path: str | Path | None, default: JudgePrompt) -> JudgePrompt:
    """A pairwise prompt of the user's: YAML with `prompt`, and optionally `system` and `reminder`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, another key, or a place that is missing or unknown.
    """
    if path is None:
        return default
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if (
        not isinstance(content, dict)
        or "prompt" not in content
        or set(content) - {"system", "prompt", "reminder"}
    ):
        raise ValueError(f"{path} must hold prompt, and may hold system and reminder; nothing else.")
    prompt = JudgePrompt(
        system=str(content.get("system") or ""),
        prompt=str(content["prompt"]),
        reminder=str(content.get("reminder") or default.reminder),
    )
    wanted = {"question", "answer_a", "answer_b"}
    if prompt.places() != wanted:
        raise ValueError(
            f"{path}: the prompt has the places {', '.join(sorted(prompt.places())) or 'none'}; it needs "
            f"{{question}}, "
            "{answer_a} and {answer_b}, and its verdicts are [[A]] [[B]] [[C]] or [[A>>B]] ... [[B>>A]]."
        )
    return prompt


_RATING_REMINDER = (
    "Your reply holds no single rating. Write [[rating]] with a number from 1 to 10, and nothing else."
)


def load_fastchat_prompts(path: Path) -> Mapping[str, JudgePrompt]:
    """Single-answer prompts of a FastChat judge_prompts.jsonl, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: rows of another kind.
    """
    rows: list[dict[str, Any]] = read_rows(path)
    try:
        return {
            row["name"]: JudgePrompt(
                system=row["system_prompt"],
                prompt=row["prompt_template"],
                reminder=_RATING_REMINDER,
            )
            for row in rows
            if row["type"] == "single"
        }
    except KeyError as error:
        raise ValueError(f"{path} is not a judge_prompts.jsonl of FastChat: a row has no {error}.") from None
