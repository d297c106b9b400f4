"""The task for any file of questions and answers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from hpd.evaluate.benchmarks.answers import stated_answer
from hpd.evaluate.benchmarks.grading import grade_texts
from hpd.evaluate.benchmarks.quantities import same_answer
from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.task import Example, Verdict
from hpd.generation.texts import Answer, Message, Prompt

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "messages")

ANSWER_COLUMNS = ("answer", "solution", "target", "completion")


class ExactMatch:
    """Questions from a file; a text is correct if its final answer is the row's.

    Args:
        data: a .jsonl, .json, .csv or .parquet file, plain or compressed (.gz).
        prompt_column: the column of the question, text or chat messages; None takes the first of
            `PROMPT_COLUMNS`. Of chat messages, everything after the last user turn is dropped.
        answer_column: the column of the reference; None takes the first of `ANSWER_COLUMNS`. A reference that
            marks its final answer (``#### 42``, a box, "the answer is") is reduced to it.
        limit: number of rows to keep from the start of the file; None keeps all.
        prompt_template: the question as the model sees it. ``{prompt}`` is the question, ``{other}`` any
            other column.

    Raises:
        FileNotFoundError: `data` is not a file.
        ValueError: the file cannot be read as rows, or lacks a column, a question or an answer.
    """

    name = "exact-match"
    metric = "accuracy"
    defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        data: Data,
        *,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        limit: int | None = None,
        prompt_template: str = "{prompt}",
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(
                f"limit is {limit}; give the number of rows to keep (1 or more), or None for all."
            )
        rows = read_rows(data)[:limit]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        answer_column = _find_column(data, "answer", columns, answer_column, ANSWER_COLUMNS)
        fields = {column: column for column in columns if column != answer_column}
        if "{prompt}" in prompt_template:
            fields["prompt"] = _find_column(data, "prompt", columns, prompt_column, PROMPT_COLUMNS)
        elif prompt_column is not None:
            raise ValueError(
                f"prompt_column={prompt_column!r} has no effect: prompt_template={prompt_template!r} lacks "
                f"{{prompt}}; "
                "put {prompt} into the template, or leave out prompt_column."
            )
        _check_template(prompt_template, fields)
        question_column = fields["prompt"] if "{prompt}" in prompt_template else None
        for column in filter(None, (question_column, answer_column)):
            _require_values(data, rows, column)
        self.options: Mapping[str, Any] = {
            "data": str(data),
            "prompt_column": question_column,
            "answer_column": answer_column,
            "limit": limit,
            "prompt_template": prompt_template,
        }
        self._examples = tuple(
            Example(
                id=str(row.get("id", index)),
                prompt=_fill_template(prompt_template, fields, row),
                answer=_reference(row[answer_column]),
                solution=_text(row[answer_column]),
                metadata=row,
            )
            for index, row in enumerate(rows)
        )

    def examples(self) -> Sequence[Example]:
        return self._examples

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        verdicts = grade_texts([answer.text for answer in answers], [example.answer for example in examples])
        # The way of the comparison is of interest where it ended early.
        return [v if v.detail == "timeout" else replace(v, detail="") for v in verdicts]

    def same(self, first: str, second: str) -> bool:
        return same_answer(first, second)


def _find_column(
    data: Data, role: str, columns: Sequence[str], given: str | None, conventional: Sequence[str]
) -> str:
    candidates = conventional if given is None else (given,)
    found = next((column for column in candidates if column in columns), None)
    if found is None:
        raise ValueError(
            f"{data} has no {role} column {' | '.join(candidates)}; it has {', '.join(columns)}. Name the "
            f"right one with {role}_column."
        )
    return found


def _check_template(template: str, fields: Mapping[str, str]) -> None:
    r"""Every ``{word}`` must be a column; braces around anything else, as in ``\boxed{}``, are literal."""
    names = re.findall(r"\{(\w+)\}", template)
    unknown = [name for name in names if name not in fields]
    if unknown or not names:
        raise ValueError(
            f"the prompt_template {template!r} names {', '.join(unknown) or 'no column'}; "
            f"use {{prompt}} or columns of the data other than the answer: {', '.join(fields)}."
        )


def _require_values(data: Data, rows: Sequence[Row], column: str) -> None:
    values = [row.get(column) for row in rows]
    empty = [
        number
        for number, value in enumerate(values, start=1)
        if value in (None, []) or not str(value).strip()
    ]
    if empty:
        raise ValueError(
            f"{data}: {len(empty)} of {len(rows)} rows have no {column!r} (the first is row {empty[0]}); "
            "fill or remove these rows, or choose another column."
        )
    if objects := [number for number, value in enumerate(values, start=1) if isinstance(value, dict)]:
        raise ValueError(
            f"{data}: row {objects[0]} has an object as {column!r}; give text, a number or (prompts) a list "
            "of messages."
        )


def _fill_template(template: str, fields: Mapping[str, str], row: Row) -> Prompt:
    def fill(question: str) -> str:
        others = {
            name: "" if row.get(column) is None else str(row[column]) for name, column in fields.items()
        }
        return re.sub(r"\{(\w+)\}", lambda match: (others | {"prompt": question})[match[1]], template)

    question = row[fields["prompt"]] if "{prompt}" in template else ""
    if not isinstance(question, list):
        return fill(str(question))
    turns = _turns_to_answer(question)
    return [*turns[:-1], {"role": "user", "content": fill(turns[-1]["content"])}]


def _turns_to_answer(chat: list[Any]) -> list[Message]:
    """The chat up to its last user turn."""
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in chat):
        raise ValueError(f"the chat {chat!r} is not a list of turns; every turn needs a role and a content.")
    turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in chat]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns:
        raise ValueError(f"the chat {chat!r} has no turn of role 'user'; every row needs one to answer.")
    return turns


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        value = value[-1]["content"]  # a completion in chat form: its last turn
    if isinstance(value, (list, dict)):
        raise ValueError(
            f"the answer {value!r} is a {type(value).__name__}; exact match needs a text or a number in "
            "every row."
        )
    return str(value)


def _reference(value: Any) -> str:
    text = _text(value)
    return stated_answer(text) or text.strip()
