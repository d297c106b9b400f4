"""Tasks: the examples that a model answers, and the grade of each answer."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from hpd.evaluate.answers import final_answer, same_answer, stated_answer

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
Row: TypeAlias = dict[str, Any]

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "messages")
ANSWER_COLUMNS = ("answer", "solution", "target", "completion")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its reference answer."""

    id: str
    prompt: Prompt
    """Plain text, or chat messages that end with the user's turn."""
    answer: str
    """What `Task.grade` compares with."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row as the data file holds it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The grade of one text."""

    correct: bool
    extracted: str | None
    """The answer found in the text; None where there is none."""


@runtime_checkable
class Task(Protocol):
    """What `hpd.evaluate.run.evaluate` needs to know of a benchmark: its examples, its grader and its identity."""

    @property
    def name(self) -> str:
        """The task's key in `TASKS`; part of file names."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Everything else that decides the examples and the grades, as JSON values."""
        ...

    def examples(self) -> Sequence[Example]: ...

    def grade(self, example: Example, text: str) -> Verdict: ...


class ExactMatch:
    """Questions from a file; a text is correct if its final answer is the row's.

    Args:
        data: a .jsonl, .json, .csv or .parquet file, plain or compressed (.gz).
        prompt_column: the column of the question, text or chat messages; None takes the first of `PROMPT_COLUMNS`. Of
            chat messages, everything after the last user turn is dropped.
        answer_column: the column of the reference; None takes the first of `ANSWER_COLUMNS`. A reference that marks its
            final answer (``#### 42``, a box, "the answer is") is reduced to it.
        limit: number of rows to keep from the start of the file; None keeps all.
        prompt_template: the question as the model sees it. ``{prompt}`` is the question, ``{other}`` any other column.

    Raises:
        FileNotFoundError: `data` is not a file.
        ValueError: the file cannot be read as rows, or lacks a column, a question or an answer.
    """

    name = "exact-match"

    def __init__(
        self,
        data: str | Path,
        *,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        limit: int | None = None,
        prompt_template: str = "{prompt}",
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; give the number of rows to keep (1 or more), or None for all.")
        rows = read_rows(data)[:limit]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        answer_column = _find_column(data, "answer", columns, answer_column, ANSWER_COLUMNS)
        fields = {column: column for column in columns if column != answer_column}
        if "{prompt}" in prompt_template:
            fields["prompt"] = _find_column(data, "prompt", columns, prompt_column, PROMPT_COLUMNS)
        elif prompt_column is not None:
            raise ValueError(
                f"prompt_column={prompt_column!r} has no effect: prompt_template={prompt_template!r} lacks {{prompt}}; "
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
                metadata=row,
            )
            for index, row in enumerate(rows)
        )

    def examples(self) -> Sequence[Example]:
        return self._examples

    def grade(self, example: Example, text: str) -> Verdict:
        """Compare the final answer of `text`, or `text` as a whole where it is nothing but the answer."""
        if same_answer(text, example.answer):
            return Verdict(correct=True, extracted=text.strip())
        extracted = final_answer(text)
        return Verdict(correct=extracted is not None and same_answer(extracted, example.answer), extracted=extracted)


TASKS: dict[str, Callable[..., Task]] = {"exact-match": ExactMatch}
"""Name -> factory; what a factory accepts are the options of its task."""


def read_rows(data: str | Path) -> list[Row]:
    """Rows of a .jsonl, .json, .csv or .parquet file, plain or .gz; nothing is cached anywhere.

    Not `datasets.load_dataset`: that one infers a single type per column (an answer 42 beside an answer "x + 1" fails)
    and keeps a copy of every file it was ever given.
    """
    path = Path(data).expanduser()
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if compressed else suffixes)[-1:]
    if not suffix or suffix[0] not in _READERS:
        raise ValueError(f"{path} has an unknown format; give a {', '.join(_READERS)} file, plain or with .gz after it.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}; check the path (it is relative to {Path.cwd()}).")
    try:
        content = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
        rows = _READERS[suffix[0]](content)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise ValueError(f"{path} is not a readable {suffix[0]} file: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows; give a file with at least one question and its answer.")
    return rows


def _json_rows(content: bytes) -> list[Row]:
    text = content.decode("utf-8-sig").strip()
    if text.startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}; every row must be an object with named columns.")
    return rows


def _csv_rows(content: bytes) -> list[Row]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"row {number} has more fields than the header; quote fields that hold commas.")
    return rows


def _parquet_rows(content: bytes) -> list[Row]:
    from pyarrow import parquet  # a tenth of a second that the text formats need not spend

    return parquet.read_table(io.BytesIO(content)).to_pylist()


_READERS: dict[str, Callable[[bytes], list[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _find_column(data: str | Path, role: str, columns: Sequence[str], given: str | None, conventional: Sequence[str]) -> str:
    candidates = conventional if given is None else (given,)
    found = next((column for column in candidates if column in columns), None)
    if found is None:
        raise ValueError(
            f"{data} has no {role} column {' | '.join(candidates)}; it has {', '.join(columns)}. "
            f"Name the right one with {role}_column."
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


def _require_values(data: str | Path, rows: Sequence[Row], column: str) -> None:
    values = [row.get(column) for row in rows]
    empty = [number for number, value in enumerate(values, start=1) if value in (None, []) or not str(value).strip()]
    if empty:
        raise ValueError(
            f"{data}: {len(empty)} of {len(rows)} rows have no {column!r} (the first is row {empty[0]}); "
            "fill or remove these rows, or choose another column."
        )


def _fill_template(template: str, fields: Mapping[str, str], row: Row) -> Prompt:
    def fill(question: str) -> str:
        others = {name: "" if row.get(column) is None else str(row[column]) for name, column in fields.items()}
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


def _reference(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        value = value[-1]["content"]  # a completion in chat form: its last turn
    if isinstance(value, (list, dict)):
        raise ValueError(
            f"the answer {value!r} is a {type(value).__name__}; exact match needs a text or a number in every row."
        )
    return stated_answer(str(value)) or str(value).strip()
