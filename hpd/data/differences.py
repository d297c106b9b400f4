"""What a rendered row may have that the row has not, and the other way round: levels, texts and counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from hpd.models.pairing import CheckResult

__all__ = ["Findings"]


class Difference(NamedTuple):
    """A difference between rows and their rendering."""

    level: Literal["ok", "warning"]
    topic: str
    text: str
    """With {share} of the rows and one {example}."""


_DIFFERENCES = {
    "restored": Difference(
        "warning",
        "thoughts",
        "the chat template cuts the beginning off the answers of {share} ({example}). hpd keeps it in the "
        "answer that is learned, as the student would write it. If it shall not be learned, remove it from "
        "the rows",
    ),
    "dropped": Difference(
        "warning",
        "dropped text",
        "the chat template drops text that should be learned from {share}: {example}. Put thoughts into the "
        "content as the student writes them (<think>...</think>), set data.labels: last_turn to learn the "
        "last answer whole, or choose a template that has a place for it (train.chat_template_path)",
    ),
    "context": Difference(
        "warning",
        "dropped text",
        "the chat template drops text that answers depend on from {share}: {example}. Move it into a message "
        "that the template prints, or choose another template (train.chat_template_path)",
    ),
    "earlier": Difference(
        "ok",
        "thoughts",
        "the chat template leaves the thoughts of earlier turns out of {share}, as it does when the student "
        "answers",
    ),
    "trimmed": Difference(
        "warning",
        "trimmed text",
        "the chat template strips spaces or line breaks at the ends of answers in {share}: {example}. The "
        "student does not learn them; strip the answers, or choose a template that keeps them "
        "(train.chat_template_path)",
    ),
    "empty thought": Difference(
        "warning",
        "added text",
        "the chat template adds an empty thought to answers without one in {share}: {example} is learned "
        "with the answer. To make it a part of the prompt, give the rows a column chat_template_kwargs with "
        "{{enable_thinking: false}} where the template knows it; or give the answers their thoughts",
    ),
    "second thought": Difference(
        "warning",
        "added text",
        "the chat template closes an empty thought before the thought that the answers of {share} begin with "
        "({example}). Give the answers their thoughts as reasoning_content, which it prints in their place",
    ),
    "added": Difference(
        "warning",
        "added text",
        "the chat template adds text to what is learned in {share}: {example}. Choose a template without it "
        "(train.chat_template_path) if the student shall not write it",
    ),
    "head": Difference(
        "warning",
        "added text",
        "the chat template puts a text of its own before the first message of {share}: {example}. Set "
        "data.system_prompt to a text of yours, or choose a template without it (train.chat_template_path), "
        "if the student will be asked without it",
    ),
    "begins": Difference(
        "warning",
        "begin token",
        "{share} hold the begin token in their text, and the tokenizer adds one: hpd leaves the text's out",
    ),
    "ends": Difference(
        "warning",
        "end token",
        "{share} end with an end token that is not the last of the row, and another would be added: hpd "
        "leaves one, and nothing behind it",
    ),
    "merged": Difference(
        "warning",
        "prompt and completion",
        "in {share} the last tokens of the prompt merge with the completion's first: {example} is asked "
        "otherwise than it is learned. End prompts on a token boundary: move a space at their end to the "
        "start of the completion, or use messages",
    ),
    "other prompt": Difference(
        "warning",
        "prompt and completion",
        "in {share} the chat template ends the prompt with {example} when the student is asked, and the row "
        "that is learned does not continue from there. Give the answers what the template begins for them "
        "(such as a thought), or choose another template (train.chat_template_path)",
    ),
    "date": Difference(
        "warning",
        "date",
        "the chat template prints today's date ({example}): every row has that of the run's first day, also "
        "where the run is resumed later or trains from a cache. Set data.system_prompt or another template "
        "(train.chat_template_path) if the student shall not learn it",
    ),
}


@dataclass
class Findings:
    """Rows of each kind of difference, and the first example."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, row: Mapping[str, str]) -> None:
        """Count a row's differences, each with an example."""
        self.rows += 1
        for kind, example in row.items():
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self.examples.setdefault(kind, example)

    def verdicts(self) -> list[CheckResult]:
        """One result for each kind of difference."""
        found = []
        for name, kind in _DIFFERENCES.items():
            if name in self.counts:
                share = f"{self.counts[name]} of the first {self.rows} rows"
                text = kind.text.format(share=share, example=self.examples[name])
                found.append(CheckResult(kind.level, kind.topic, text))
        return found
