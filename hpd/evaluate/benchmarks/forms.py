"""Forms of rows that hold a question and its answer: columns of many names, instruction and input, chats, one
text with both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hpd.evaluate.benchmarks.answers import final_answer, stated_answer
from hpd.evaluate.benchmarks.rows import Row

__all__ = ["answer_of", "asked_turns", "chat_turns", "plain_text", "question_of", "reference_of"]

QUESTIONS = ("problem", "question", "prompt", "input", "question_concat", "query", "squestion", "task")

ANSWERS = (
    "answer",
    "final_answer",
    "target",
    "final_ans",
    "result",
    "expected_answer",
    "ground_truth",
    "gold",
    "lsolutions",
    "answers",
    "correct_answer",
    "reference_answer",
    "gold_answer",
    "answer_number",
    "numerical_answer",
)

SOLUTIONS = ("solution", "output", "response", "completion", "reasoning", "rationale", "chosen")

_SPELLED = {name.replace("_", ""): name for name in (*QUESTIONS, *ANSWERS)}
"""Names of columns without what "Final Answer", "final-answer" and "finalAnswer" write differently."""

_CHATS = ("messages", "conversations", "conversation", "dialog")

_TEXTS = ("text", *QUESTIONS[:3], "instruction")

_ASKED = ("user", "human")

# "Question: ... Answer: ...", "Q: ... A: ...", and the heads of Alpaca's prompt.
_QUESTION_MARK = re.compile(r"\A\s*(?:#{1,4}\s*)?(?:Question|Problem|Q|Instruction)\s*:\s*", re.IGNORECASE)
_ANSWER_MARK = re.compile(
    r"(?:\n\s*|(?<=[.?!])\s+)(?:#{1,4}\s*)?(?:Answer|Solution|Response|Output|A)\s*:\s*", re.IGNORECASE
)

# A solution that marks no answer has it at its end, if it is a sentence of such words ("7 apples" is none).
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def question_of(row: Row, names: Sequence[str] = QUESTIONS) -> str | list[dict[str, str]] | None:
    """The question of a row, text or chat turns that end with the user's; None where there is none.

    An instruction and its input, and SVAMP's body and question, are one text.

    Args:
        row: of a data set.
        names: columns of questions, the preferred first.

    Raises:
        ValueError: a chat that is not one; the message goes on after the row's number.
    """
    named = _filled(row)
    if "body" in named and "question" in named:
        body = str(named["body"]).rstrip()
        return f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {named['question']}"
    if "instruction" in named and not {"problem", "question", "prompt"} & named.keys():
        given = str(named.get("input", named.get("context", "")) or "")
        question: Any = "\n\n".join(filter(None, (str(named["instruction"]), given)))
    else:
        question = next((named[name] for name in names if name in named), None)
    if question is None:
        chat = next((named[name] for name in _CHATS if name in named), None)
        question = chat if chat is not None else named.get("text")
    if isinstance(question, list):
        return asked_turns(question)
    if question is None or isinstance(question, Mapping):
        return None
    return _parts(str(question))[0] if _direct(named) is None else str(question).strip()


def answer_of(row: Row) -> tuple[Any, bool] | None:
    """The answer of a row, and whether it is a worked solution that ends with it; None: there is none."""
    named = _filled(row)
    found = _direct(named)
    if found is not None:
        return found
    for name in _CHATS:
        turns = named.get(name)
        if isinstance(turns, list) and turns and _role(turns[-1]) not in _ASKED:
            return plain_text([turns[-1]]), True
    for name in _TEXTS:
        if isinstance(named.get(name), str) and (answer := _parts(named[name])[1]):
            return answer, True
    return None


def _filled(row: Row) -> dict[str, Any]:
    """Columns that hold something, by their names in lower case, known ones in our spelling."""
    return {
        _SPELLED.get(re.sub(r"[\s_-]", "", name).lower(), name.lower()): value
        for name, value in row.items()
        if value not in (None, []) and not (isinstance(value, str) and not value.strip())
    }


def _direct(named: Mapping[str, Any]) -> tuple[Any, bool] | None:
    """The answer that stands in a column of its own."""
    for name in ANSWERS:
        if name in named and (value := plain_text(named[name])) is not None:
            return value, False
    for outer, inner in (("reward_model", "ground_truth"), ("extra_info", "answer")):
        if isinstance(named.get(outer), Mapping) and named[outer].get(inner) is not None:
            return named[outer][inner], False
    for name in SOLUTIONS:
        if name in named and (value := plain_text(named[name])) is not None:
            return value, True
    return None


def reference_of(value: Any, solution: bool) -> str:
    """The reference that an answer amounts to: what it marks as final; of a worked solution without a mark
    its last number or formula; else the whole.

    >>> reference_of("3 + 4 = 7, so there are 7 apples.", True), reference_of("(3, 4)", True)
    ('7', '(3, 4)')
    """
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    stated = stated_answer(text)
    if stated or not solution or len(_WORD.findall(text)) < 2:
        return stated or text.strip()
    return final_answer(text) or text.strip()


def plain_text(value: Any) -> Any:
    """A text or number out of the wrappings that data sets put around it: a list of one, the last turn of a
    chat, a mapping with `text`, `value` or `content`; None where there is nothing of the kind."""
    while not isinstance(value, (str, int, float)):
        if isinstance(value, list) and value and (len(value) == 1 or isinstance(value[-1], Mapping)):
            value = value[-1]
        elif isinstance(value, Mapping):
            value = next((value[key] for key in ("text", "value", "content") if value.get(key)), None)
        elif isinstance(value, list) and value and all(isinstance(part, (str, int, float)) for part in value):
            return ", ".join(map(str, value))
        else:
            return None
    return value


def chat_turns(chat: Sequence[Any]) -> list[dict[str, str]]:
    """A chat as turns of role and text; text parts of one turn are joined.

    Raises:
        ValueError: something else, such as a turn whose content is null.
    """
    turns = []
    for number, turn in enumerate(chat, start=1):
        role = _role(turn)
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            content = "".join(map(str, parts)) if parts and all(isinstance(p, str) for p in parts) else None
        if not role or not isinstance(content, (str, int, float)):
            shown = repr(turn)[:80]
            raise ValueError(
                f"turn {number} of its chat is {shown}; every turn needs a role and a content that is a text "
                "(or a list of text parts)"
            )
        turns.append({"role": "user" if role in _ASKED else role, "content": str(content)})
    return turns


def asked_turns(chat: Sequence[Any]) -> list[dict[str, str]]:
    """A chat up to its last user turn.

    Raises:
        ValueError: it has none, or see `chat_turns`.
    """
    turns = chat_turns(chat)
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns:
        raise ValueError("its chat has no turn of role 'user' to answer")
    return turns


def _role(turn: Any) -> str:
    if not isinstance(turn, Mapping):
        return ""
    role = str(turn.get("role") or turn.get("from") or "").lower()
    return {"gpt": "assistant", "model": "assistant", "bot": "assistant"}.get(role, role)


def _parts(text: str) -> tuple[str, str]:
    """Question and answer of a text that holds both; no answer where it holds one of them."""
    marks = list(_ANSWER_MARK.finditer(text))
    if not marks:
        return text.strip(), ""
    question = _QUESTION_MARK.sub("", text[: marks[-1].start()])
    return question.strip(), text[marks[-1].end() :].strip()
