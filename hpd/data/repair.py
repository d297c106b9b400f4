"""Rows with one beginning and one end, where they and the tokenizer would make it otherwise.

Text that holds its template already has begin and end tokens, which tokenizers and templates add as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpd.data.templates import taken_by_template

__all__ = ["adds_eos", "repaired"]


def adds_eos(tokenizer: Any) -> bool:
    """True if the tokenizer puts an end token behind every text, where a row has its own."""
    ids = tokenizer("a")["input_ids"]
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def repaired(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """One row with at most one begin token before its text, and one end token behind it.

    A begin token is left out where the tokenizer adds one. Spaces behind an end token go: the end token would
    be added a second time.
    """
    out = dict(row)
    for name in ("text", "prompt"):
        if isinstance(out.get(name), str):
            out[name] = _one_begin(out[name], tokenizer)
    for name in ("text", "completion"):
        if isinstance(out.get(name), str):
            out[name] = _one_end(out[name], tokenizer)
    for name in ("messages", "completion"):
        turns = out.get(name)
        if isinstance(turns, list) and any(_ends_itself(turn, tokenizer) for turn in turns):
            out[name] = _without_ends(turns, tokenizer)
    return out


def _one_begin(text: str, tokenizer: Any) -> str:
    begin = tokenizer.bos_token
    if not begin or not text.startswith(begin):
        return text
    rest = text
    while rest.startswith(begin):
        rest = rest.removeprefix(begin)
    added = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return rest if added else begin + rest


def _one_end(text: str, tokenizer: Any) -> str:
    end, rest = tokenizer.eos_token, text.rstrip()
    if not end or not rest.endswith(end):
        return text
    while (before := rest.removesuffix(end).rstrip()).endswith(end):
        rest = before
    return rest


def _ends_itself(turn: Any, tokenizer: Any) -> bool:
    content = turn.get("content") if isinstance(turn, Mapping) else None
    return (
        isinstance(content, str)
        and turn.get("role") == "assistant"
        and bool(tokenizer.eos_token)
        and content.rstrip().endswith(tokenizer.eos_token)
    )


def _without_ends(turns: Sequence[Any], tokenizer: Any) -> list[Any]:
    """The turns without end tokens that the template adds itself."""
    end = tokenizer.eos_token
    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" + end}]
    if not tokenizer.chat_template:
        return list(turns)
    with taken_by_template("a plain conversation", example, "student"):
        shown = tokenizer.apply_chat_template(example, tokenize=False)
    if end + end not in shown:
        return list(turns)
    out = []
    for turn in turns:
        if _ends_itself(turn, tokenizer):
            content = turn["content"].rstrip()
            while content.endswith(end):
                content = content.removesuffix(end).rstrip()
            turn = {**turn, "content": content}
        out.append(turn)
    return out
