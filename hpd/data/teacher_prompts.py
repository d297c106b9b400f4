"""Prompts that the teacher alone reads, written over the columns of a row."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpd.config.models import TeacherConfig
from hpd.models.bounded import rendering

__all__ = ["TEACHER_PROMPT", "TeacherContext"]

TEACHER_PROMPT = "teacher_prompt"
"""The column of a row that holds the teacher's own prompt, in the form of the row's `prompt`."""

_NAME = re.compile(r"\{([^\W\d]\w*)\}")
_OF_ROWS = ("prompt", "completion")


class TeacherContext(NamedTuple):
    """The prompt and the system text of a teacher that reads its own rows.

    Each is text in which `{name}` stands for a column, and nothing else is special; or, where it holds `{{`
    or `{%`, a Jinja template over the columns. `prompt` and `completion` are those of the row as the student
    reads it: of a conversation, the last turn of the user and the answer's.
    """

    prompt: str | None = None
    """Instead of the student's prompt (of its last turn, where that is a conversation); None: the same."""
    system_prompt: str | None = None
    """Instead of a conversation's system turn; None: the same."""

    @classmethod
    def of(cls, teacher: TeacherConfig) -> TeacherContext | None:
        """The context that a recipe's teacher has; None: it reads the student's rows."""
        return cls(teacher.prompt, teacher.system_prompt) if teacher.reads_own_rows else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the dataset that are named."""
        named = {name for field, text in self._asdict().items() if text for name in _names(field, text)}
        return tuple(sorted(named - {*_OF_ROWS}))

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse templates that cannot be read, and names that are no column.

        Args:
            columns: of the dataset.
            where: what the dataset is called.

        Raises:
            ValueError: which name, and the columns there are.
        """
        for field, text in self._asdict().items():
            missing = sorted(_names(field, text) - {*columns, *_OF_ROWS}) if text is not None else []
            if missing:
                raise ValueError(
                    f"teacher.{field} names {', '.join(missing)}, which {where} does not have: it has the "
                    f"columns {', '.join(columns)}; prompt and completion are the row's own."
                )

    def prompt_of(self, row: Mapping[str, Any], converted: Mapping[str, Any], index: int) -> Any:
        """The teacher's prompt of a row.

        Args:
            row: as the file holds it.
            converted: the same in a format of TRL's.
            index: its number, for errors.

        Returns:
            Text where the row's prompt is text, else turns.

        Raises:
            ValueError: the row has no prompt, or a column that is named is empty or no text.
        """
        prompt = converted.get("prompt")
        if prompt is None:
            raise ValueError(
                f"Row {index} is not a prompt and its completion, so a prompt of the teacher's own has no "
                "place in it: set data.labels: last_turn for conversations, or map the columns prompt and "
                "completion."
            )
        texts = {
            "prompt": _text(prompt, "user"),
            "completion": _text(converted.get("completion"), "assistant"),
        }
        values = {**row, **texts}
        if isinstance(prompt, str):
            if self.system_prompt is not None:
                raise ValueError(
                    f"Row {index} is text, and teacher.system_prompt is a turn of a conversation: write it "
                    "into teacher.prompt, or set data.format: chat."
                )
            return _filled("prompt", self.prompt or "", values, index)
        turns = [dict(turn) for turn in prompt]
        if self.prompt is not None:
            last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
            if last is None:
                raise ValueError(f"Row {index} has no user turn that teacher.prompt could stand in.")
            turns[last]["content"] = _filled("prompt", self.prompt, values, index)
        if self.system_prompt is not None:
            system = {
                "role": "system",
                "content": _filled("system_prompt", self.system_prompt, values, index),
            }
            turns = [system, *(turns[1:] if turns[0]["role"] == "system" else turns)]
        return turns


def _text(part: Any, role: str) -> str | None:
    """A prompt or completion as text; of turns, the last one of `role`."""
    if not isinstance(part, list):
        return part
    texts = [turn.get("content") for turn in part if turn.get("role") == role]
    return texts[-1] if texts and isinstance(texts[-1], str) else None


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


@functools.lru_cache(maxsize=8)
def _template(field: str, text: str) -> tuple[Template, frozenset[str]]:
    """A Jinja template and the names that it reads, in an environment that reaches nothing else."""
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        names = meta.find_undeclared_variables(environment.parse(text))
        return environment.from_string(text), frozenset(names - environment.globals.keys())
    except TemplateError as error:
        raise ValueError(f"teacher.{field} is not a Jinja template: {error}. Correct it.") from None


def _names(field: str, text: str) -> set[str]:
    return set(_template(field, text)[1]) if _is_jinja(text) else set(_NAME.findall(text))


def _filled(field: str, text: str, values: Mapping[str, Any], index: int) -> str:
    if _is_jinja(text):
        template, _ = _template(field, text)
        try:
            with rendering():
                return template.render(**values)
        except Exception as error:  # a template raises anything
            said = " ".join(str(error).split()).rstrip(".")[:300]
            raise ValueError(f"Row {index}: teacher.{field} cannot be rendered: {said}.") from None

    def value_of(match: re.Match[str]) -> str:
        value = values.get(match[1])
        if isinstance(value, (str, int, float)):
            return str(value)
        given = "empty" if value is None else f"a {type(value).__name__}"
        raise ValueError(
            f"Row {index}: teacher.{field} names {match[1]}, which is {given} there, and should be text. "
            "Give the row one, or write a Jinja template: {% if "
            f"{match[1]} %}} ... {{% endif %}}."
        )

    return _NAME.sub(value_of, text)
