"""The task for any file of questions and answers."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from hpd.evaluate.benchmarks.forms import (
    ANSWERS,
    QUESTIONS,
    SOLUTIONS,
    answer_of,
    asked_turns,
    plain_text,
    question_of,
    reference_of,
)
from hpd.evaluate.benchmarks.grading import grade_texts
from hpd.evaluate.benchmarks.quantities import same_answer
from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.task import Example, Verdict
from hpd.generation.texts import Answer, Prompt

_QUESTIONS = ("prompt", *(name for name in QUESTIONS if name != "prompt"))


class ExactMatch:
    """Questions from a file; a text is correct if its final answer is the row's.

    Args:
        data: a .jsonl, .json, .csv or .parquet file, plain or compressed (.gz).
        prompt_column: the column of the question, text or chat messages; None knows the usual forms
            (`forms`). Of chat messages, everything after the last user turn is dropped.
        answer_column: the column of the reference; None knows the usual forms. A reference that marks its
            final answer (``#### 42``, a box, "the answer is") is reduced to it.
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
        asks = "{prompt}" in prompt_template
        if prompt_column is not None and not asks:
            raise ValueError(
                f"prompt_column={prompt_column!r} has no effect: prompt_template={prompt_template!r} lacks "
                "{prompt}; put {prompt} into the template, or leave out prompt_column."
            )
        for role, column in (("answer", answer_column), ("prompt", prompt_column)):
            if column is not None:
                _require_values(data, rows, columns, role, column)
        answers = _all(data, rows, "answer", columns, answer_column, _answer)
        questions = (
            _all(data, rows, "prompt", columns, prompt_column, _question) if asks else [""] * len(rows)
        )
        known = {*ANSWERS, *SOLUTIONS} if answer_column is None else {answer_column.lower()}
        fields = [column for column in columns if column.lower() not in known]
        _check_template(prompt_template, [*fields, *(["prompt"] if asks else [])])
        self.options: Mapping[str, Any] = {
            "data": str(data),
            "prompt_column": prompt_column,
            "answer_column": answer_column,
            "limit": limit,
            "prompt_template": prompt_template,
        }
        self._examples = tuple(
            Example(
                id=str(row.get("id", index)),
                prompt=_fill_template(prompt_template, fields, row, question),
                answer=reference_of(*answer),
                solution=str(answer[0]),
                metadata=row,
            )
            for index, (row, question, answer) in enumerate(zip(rows, questions, answers, strict=True))
        )

    def examples(self) -> Sequence[Example]:
        return self._examples

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        verdicts = grade_texts([answer.text for answer in answers], [example.answer for example in examples])
        # The way of the comparison is of interest where it ended early.
        return [v if v.detail == "timeout" else replace(v, detail="") for v in verdicts]

    def same(self, first: str, second: str) -> bool:
        return same_answer(first, second)


def _question(row: Row, column: str | None) -> Prompt | None:
    if column is None:
        return question_of(row, _QUESTIONS)
    value = row[column]
    return asked_turns(value) if isinstance(value, list) else str(value)


def _answer(row: Row, column: str | None) -> tuple[Any, bool] | None:
    if column is None:
        return answer_of(row)
    value = plain_text(row[column])
    return None if value is None else (value, False)


def _all(
    data: Data,
    rows: Sequence[Row],
    role: str,
    columns: Sequence[str],
    column: str | None,
    read: Callable[[Row, str | None], Any],
) -> list[Any]:
    """Questions or answers of all rows."""
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(read(row, column))
        except ValueError as error:
            raise ValueError(f"{data}: row {number}: {error}.") from None
    missing = [number for number, value in enumerate(found, start=1) if value is None]
    if missing:
        raise ValueError(
            f"{data}: {len(missing)} of {len(rows)} rows have no {role} in a column that is known as one (the"
            f" first is row {missing[0]}); the columns are {', '.join(columns)}. Name the right one with "
            f"{role}_column, or fill or remove these rows."
        )
    return found


def _check_template(template: str, fields: Sequence[str]) -> None:
    r"""Every ``{word}`` must be a column; braces around anything else, as in ``\boxed{}``, are literal."""
    names = re.findall(r"\{(\w+)\}", template)
    unknown = [name for name in names if name not in fields]
    if unknown or not names:
        raise ValueError(
            f"the prompt_template {template!r} names {', '.join(unknown) or 'no column'}; "
            f"use {{prompt}} or columns of the data other than the answer: {', '.join(fields)}."
        )


def _require_values(data: Data, rows: Sequence[Row], columns: Sequence[str], role: str, column: str) -> None:
    """Refuse a named column that is not there, or is empty in a row."""
    if column not in columns:
        raise ValueError(
            f"{data} has no {role} column {column}; it has {', '.join(columns)}. Name the right one with "
            f"{role}_column."
        )
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


def _fill_template(template: str, fields: Sequence[str], row: Row, question: Prompt) -> Prompt:
    def fill(text: str) -> str:
        others = {name: "" if row.get(name) is None else str(row[name]) for name in fields}
        return re.sub(r"\{(\w+)\}", lambda match: (others | {"prompt": text})[match[1]], template)

    if isinstance(question, str):
        return fill(question)
    return [*question[:-1], {"role": "user", "content": fill(question[-1]["content"])}]
