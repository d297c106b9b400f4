"""Rows with one beginning, one end and whole answers, where they and the tokenizer would make it otherwise.

Text that holds its template already has begin and end tokens, which tokenizers and TRL add as well; and
templates of reasoning models cut thoughts off answers. `repair` is a pass over rows before TRL's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from trl.data_utils import is_conversational

from hpd.batch import IGNORE_INDEX
from hpd.data.rendering import adds_eos, render

__all__ = ["repair", "repaired"]

# What tokens and labels take the place of.
_COLUMNS = ("messages", "prompt", "completion", "text", "tools", "chat_template_kwargs")

# Rows that are rendered to see if a template cuts answers, and what most of those that it cuts have.
_LOOKED_AT = 64
_THOUGHT_ENDS = "</think>"


def repair(rows: Any, tokenizer: Any, labels: str, *, num_proc: int | None = None) -> Any:
    """`repaired` of all rows of a dataset or stream, before TRL prepares them.

    Where TRL would read some row otherwise, all become tokens and labels: a dataset has one format.

    Args:
        rows: in one of TRL's formats; others are returned as they are.
        tokenizer: the student's.
        labels: the recipe's `data.labels`.
        num_proc: processes, as `train.dataset_num_proc` says.
    """
    first = dict(next(iter(rows), {}))
    if "input_ids" in first or not _is_known(first):
        return rows
    options: dict[str, Any] = {"num_proc": num_proc} if isinstance(rows, Dataset) else {}
    turned = _cuts_answers(rows, tokenizer, labels) if is_conversational(first) else adds_eos(tokenizer)
    if turned:
        gone = [name for name in _COLUMNS if name in first]
        given = {"tokenizer": tokenizer, "labels": labels}
        return rows.map(_as_tokens, fn_kwargs=given, remove_columns=gone, **options)
    if not _may_have_tokens(rows, tokenizer):
        return rows
    return rows.map(repaired, fn_kwargs={"tokenizer": tokenizer}, **options)


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


def _is_known(row: Mapping[str, Any]) -> bool:
    """True for a row of text, of messages, or of prompt and completion."""
    whole = isinstance(row.get("text"), str) or isinstance(row.get("messages"), list)
    return whole or all(isinstance(row.get(name), (str, list)) for name in ("prompt", "completion"))


def _may_have_tokens(rows: Any, tokenizer: Any) -> bool:
    """True if a row may have a begin or end token in its text; of a stream, that is not known."""
    if not isinstance(rows, Dataset):
        return True
    tokens = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
    texts = [name for name in ("text", "prompt", "completion", "messages") if name in rows.column_names]
    return any(token in str(value) for name in texts for value in rows[name] for token in tokens)


def _cuts_answers(rows: Any, tokenizer: Any, labels: str) -> bool:
    """True if the template leaves out the beginning of an answer in one of the rows that are looked at: the
    first ones, and those with a thought."""
    if labels == "assistant" or not tokenizer.chat_template:
        return False
    looked_at = list(itertools.islice(rows, _LOOKED_AT))
    if isinstance(rows, Dataset):
        name = "completion" if "completion" in rows.column_names else "messages"
        thinking = (i for i, turns in enumerate(rows[name]) if turns and _THOUGHT_ENDS in str(turns[-1]))
        looked_at += [rows[i] for i in itertools.islice(thinking, _LOOKED_AT)]
    return any(render(repaired(row, tokenizer), tokenizer, labels).cut for row in looked_at)


def _as_tokens(row: Mapping[str, Any], tokenizer: Any, labels: str) -> dict[str, Any]:
    rendered = render(repaired(row, tokenizer), tokenizer, labels)
    learnt = zip(rendered.ids, rendered.mask, strict=True)
    return {"input_ids": rendered.ids, "labels": [i if bit else IGNORE_INDEX for i, bit in learnt]}


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
    if not tokenizer.chat_template or end + end not in tokenizer.apply_chat_template(example, tokenize=False):
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
