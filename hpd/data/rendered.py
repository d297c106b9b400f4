"""The rendered row beside the row: what a chat template dropped, trimmed or added, and how the row ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hpd.data.dates import prints_date
from hpd.data.differences import Findings
from hpd.data.rendering import Rendering, render
from hpd.data.repair import repaired
from hpd.models.pairing import CheckResult

__all__ = ["compare_rows"]

# Characters of a row's text that a verdict shows.
_SHOWN = 70

# Words that a template puts before a text to say whose it is.
_MARKS = re.compile(r"<[^<>\s]*>|\[/?\w+\]|<<\w+>>")
_WORD = re.compile(r"[^\W\d_]{2,}")
_EMPTY_THOUGHT = re.compile(r"<(\w+)>\s*</\1>\s*")
_REOPENED = re.compile(r"</(\w+)>\s*<\1>\s*$")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_ROLES = frozenset(
    {"system", "developer", "user", "human", "assistant", "model", "gpt", "start", "of", "turn"}
)

# Words before the first message that are more than its role.
_MANY_WORDS = 3


def compare_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, labels: str, ends: frozenset[int] | None = None
) -> list[CheckResult]:
    """Compare rows with what training makes of them.

    Args:
        rows: the first ones, as they were read.
        tokenizer: the student's, its date fixed.
        labels: the recipe's `data.labels`.
        ends: tokens that end the student's generation; None: not known.

    Returns:
        A verdict for every kind of difference, with its remedy.
    """
    findings, last = Findings(), {}
    open_ends: list[str] = []
    for given in rows:
        row = repaired(given, tokenizer)
        rendered = render(row, tokenizer, labels)
        found = dict(_doubled(given, row, tokenizer))
        if rendered.text is not None and isinstance(row.get("messages") or row.get("prompt"), list):
            found |= dict(_message_differences(row, rendered, tokenizer, labels))
        found |= dict(_seam(rendered, tokenizer))
        findings.add(found)
        token = _last_token(rendered, tokenizer)
        if token is not None:
            last[token] = last.get(token, 0) + 1
            if ends and rendered.text is not None and _is_text(token, tokenizer, ends):
                open_ends.append(tokenizer.decode([token]))
    return [
        *findings.verdicts(),
        *_stops(last, tokenizer, ends),
        *_open_ends(open_ends, sum(last.values()), tokenizer),
    ]


def _doubled(given: Mapping[str, Any], row: Mapping[str, Any], tokenizer: Any) -> Iterator[tuple[str, str]]:
    for name in ("text", "prompt", "completion", "messages"):
        before, after = given.get(name), row.get(name)
        if before == after:
            continue
        if (
            isinstance(before, str)
            and before.startswith(tokenizer.bos_token or "\0")
            and name != "completion"
        ):
            yield "begins", ""
        if name != "prompt" and _tail(before) != _tail(after):
            yield "ends", ""


def _tail(value: Any) -> str:
    return (value if isinstance(value, str) else str(value))[-8:]


def _message_differences(
    row: Mapping[str, Any], rendered: Rendering, tokenizer: Any, labels: str
) -> Iterator[tuple[str, str]]:
    text = rendered.text or ""
    whole = row.get("messages") is not None
    turns = row["messages"] if whole else [*row["prompt"], *(row.get("completion") or ())]
    first_learned = 0 if whole else len(row["prompt"])
    if rendered.cut:
        yield "restored", _short(rendered.cut)
    yield from _head(row, turns, text, tokenizer)
    cursor = 0
    for number, turn in enumerate(turns):
        if number == first_learned:
            cursor = max(cursor, rendered.begins)
        learned = number >= first_learned and (
            labels in ("all", "conversation") or turn.get("role") == "assistant"
        )
        answer = turn.get("role") == "assistant"
        for name, piece in _pieces(turn):
            # Some templates print the system message elsewhere; what is learned stands where it should.
            where = _find(piece, text, cursor) or (None if learned else _find(piece, text, 0))
            if where is None:
                thought = name in ("thought", *_THOUGHTS)
                kind = "dropped" if learned else "earlier" if answer and thought else "context"
                whose = f"the {name}" if name != "content" else f"{turn['role']}:"
                yield kind, f"{whose} {_short(piece)}"
                continue
            if learned and name == "thought" and (reopened := _REOPENED.search(text[cursor : where[0]])):
                yield "second thought", repr(reopened.group())
            if learned and answer and name == "content" and whole:
                yield from _lead(text[cursor : where[0]])
            if turn.get("role") not in ("system", "developer"):
                cursor = max(cursor, where[1])
        if learned and answer:
            yield from _trimmed(turn, text)
    if not whole and row.get("completion") and not rendered.cut:
        yield from _completion_frame(row, rendered, tokenizer)


def _pieces(turn: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The texts of a message, in the order in which templates print them."""
    for name in _THOUGHTS:
        if isinstance(turn.get(name), str) and turn[name].strip():
            yield name, turn[name]
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if isinstance(content, str) and content.strip():
        thought, found, answer = content.rpartition("</think>")
        inside = thought.replace("<think>", "", 1)
        if found and turn.get("role") == "assistant":
            yield from (
                (name, part) for name, part in (("thought", inside), ("content", answer)) if part.strip()
            )
        else:
            yield "content", content
    for call in turn.get("tool_calls") or ():
        function = (call.get("function") or call) if isinstance(call, Mapping) else {}
        if isinstance(function.get("name"), str):
            yield "tool call", function["name"]


def _find(piece: str, text: str, start: int) -> tuple[int, int] | None:
    """Where a piece is in a text, whatever the white space within it."""
    if (at := text.find(piece.strip(), start)) >= 0:
        return at, at + len(piece.strip())
    words = r"\s*".join(map(re.escape, piece.split()))
    found = re.compile(words).search(text, start)
    return (found.start(), found.end()) if found else None


def _trimmed(turn: Mapping[str, Any], text: str) -> Iterator[tuple[str, str]]:
    content = turn.get("content")
    if not isinstance(content, str) or content in text or content == content.strip():
        return
    answer = content.rpartition("</think>")[2] if content.endswith(content.rstrip()) else content
    if answer.strip() and answer.strip() in text and answer not in text:
        yield "trimmed", _short(content, end=content == content.lstrip())


def _lead(between: str) -> Iterator[tuple[str, str]]:
    """What is learned before an answer, in a conversation that is learned as a whole."""
    if found := _EMPTY_THOUGHT.search(between):
        yield "empty thought", repr(found.group())


def _completion_frame(
    row: Mapping[str, Any], rendered: Rendering, tokenizer: Any
) -> Iterator[tuple[str, str]]:
    """What is learned around the completion's messages."""
    learned = (rendered.text or "")[rendered.begins :]
    pieces = [piece for turn in row["completion"] for _, piece in _pieces(turn)]
    places = [where for piece in pieces if (where := _find(piece, learned, 0))]
    if not places:
        return
    before = learned[: min(start for start, _ in places)]
    behind = learned[max(end for _, end in places) :]
    if found := _EMPTY_THOUGHT.search(before):
        yield "empty thought", repr(found.group())
        before = before.replace(found.group(), "")
    # Calls of tools have a form of their own, and several messages what stands between them.
    calls = any(turn.get("tool_calls") for turn in row["completion"])
    for frame in (before, behind) if not calls else (before,):
        if len(_words(frame, tokenizer)) >= _MANY_WORDS:
            yield "added", _short(frame)


def _head(row: Mapping[str, Any], turns: list[Any], text: str, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """What the template prints before the first message."""
    first = next((piece for _, piece in _pieces(turns[0])), "") if turns else ""
    where = _find(first, text, 0) if first else None
    head = text[: where[0]] if where else ""
    dated = prints_date(tokenizer.chat_template)
    if dated and (printed := _date_line(text)):
        yield "date", printed
    if not row.get("tools") and len(_words(head, tokenizer)) >= _MANY_WORDS:
        yield "head", _short(_bare(head, tokenizer))


def _date_line(text: str) -> str | None:
    """The line of a rendered row that tells a date."""
    for line in text.splitlines():
        if (
            re.search(r"(?i)\bdate\b.*\d|\btoday\b.*\d|\b\d{4}-\d{2}-\d{2}\b", line)
            and "nowledge" not in line
        ):
            return _short(_MARKS.sub(" ", line))
    return None


def _bare(frame: str, tokenizer: Any) -> str:
    """A frame without tokens that are no text."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        frame = frame.replace(token, " ")
    words = _MARKS.sub(" ", frame).split()
    while words and words[0].lower() in _ROLES:
        words.pop(0)
    while words and words[-1].lower() in _ROLES:
        words.pop()
    return " ".join(words)


def _words(frame: str, tokenizer: Any) -> list[str]:
    return [word for word in _WORD.findall(_bare(frame, tokenizer)) if word.lower() not in _ROLES]


def _seam(rendered: Rendering, tokenizer: Any) -> Iterator[tuple[str, str]]:
    if not rendered.lost_prompt_ids:
        return
    lost = repr(tokenizer.decode(list(rendered.lost_prompt_ids)))
    yield "merged" if (rendered.text or "").startswith(rendered.prompt or "") else "other prompt", lost


def _last_token(rendered: Rendering, tokenizer: Any) -> int | None:
    """The token that a row's labels end with, but for white space behind it."""
    learned = [i for i, bit in zip(rendered.ids, rendered.mask, strict=True) if bit][-3:]
    while learned and not tokenizer.decode([learned[-1]]).strip():
        learned.pop()
    return learned[-1] if learned else None


def _is_text(token: int, tokenizer: Any, ends: frozenset[int]) -> bool:
    return token not in ends and tokenizer.convert_ids_to_tokens(token) not in tokenizer.get_added_vocab()


def _stops(last: Mapping[int, int], tokenizer: Any, ends: frozenset[int] | None) -> list[CheckResult]:
    """A warning where most rows end with a token of the template that generation goes on after."""
    if not last or not ends:
        return []
    token, count = max(last.items(), key=lambda item: item[1])
    if token in ends or _is_text(token, tokenizer, ends):
        return []
    name = tokenizer.convert_ids_to_tokens(token)
    known = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends))
    return [
        CheckResult(
            "warning",
            "end of generation",
            f"{count} of the first {sum(last.values())} rows end with {name!r}, and the student's generation "
            f"stops at {known} only: it would write on after its answer. Set train.eos_token: {name!r}, "
            "which is then saved with the student.",
        )
    ]


def _open_ends(open_ends: list[str], total: int, tokenizer: Any) -> list[CheckResult]:
    """A warning where most rows end with text: nothing tells the student that the answer is over."""
    if 2 * len(open_ends) <= total:
        return []
    return [
        CheckResult(
            "warning",
            "end of generation",
            f"{len(open_ends)} of the first {total} rows end with text, such as {open_ends[0]!r}, and not "
            "with a token that ends an answer: the student would not learn to stop. Name a template that "
            f"ends answers in train.chat_template_path, or write {tokenizer.eos_token!r} behind them.",
        )
    ]


def _short(text: str, end: bool = False) -> str:
    """A text's beginning (or end), quoted."""
    if len(text) > _SHOWN:
        text = f"...{text[-_SHOWN:]}" if end else f"{text[:_SHOWN]}..."
    return repr(text)
