"""The formats that people have, and one function that makes TRL's of them.

The columns decide once what the rows of a dataset are (`choose_format`); every row is then converted alike
(`converted`), for training, the dry run, `hpd cache`, `hpd generate` and `DistillTrainer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hpd.methods.fields import nearest

__all__ = ["FORMATS", "READ", "RowFormat", "choose_format", "meaning_of"]

# What a row can be, by the columns that it needs; the first whose columns are there is taken, those that
# data.columns names before the others.
FORMATS: dict[str, tuple[str, ...]] = {
    "ids": ("input_ids",),
    "pair": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt preference": ("conversations", "chosen"),
    "sharegpt": ("conversations",),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "preference": ("prompt", "chosen"),
    "conversation preference": ("chosen", "rejected"),
    "prompt": ("prompt",),
    "bare instruction": ("instruction",),
}

_TEMPLATE = ("tools", "chat_template_kwargs")
_BEFORE = ("system", "history")
# Columns that a format takes where they are there.
_TAKEN: dict[str, tuple[str, ...]] = {
    "ids": ("labels", "completion_mask", "assistant_masks", "attention_mask"),
    "pair": (*_TEMPLATE, *_BEFORE),
    "messages": (*_TEMPLATE, "system"),
    "sharegpt preference": (*_TEMPLATE, "system", "rejected"),
    "sharegpt": (*_TEMPLATE, "system"),
    "instruction": (*_TEMPLATE, *_BEFORE, "input"),
    "text": (),
    "preference": (*_TEMPLATE, *_BEFORE),
    "conversation preference": (*_TEMPLATE, "system"),
    "prompt": (*_TEMPLATE, *_BEFORE),
    "bare instruction": (*_TEMPLATE, *_BEFORE, "input"),
}

READ = tuple(dict.fromkeys([name for group in (*FORMATS.values(), *_TAKEN.values()) for name in group]))
"""Every name that data.columns may give a column."""

# Names of the same thing in instruction data: Dolly's and those of LLaMA-Factory and ms-swift.
_ALIASES = {"context": "input", "response": "output", "query": "instruction"}

# Columns that change what is learned, and what to do about each where the format has no place for it.
_MEANING = {
    "input": "it belongs to the prompt: map data.columns: {instruction: ..., input: ..., output: ...}",
    "options": "it belongs to the prompt: write it there as text",
    "system": "it stands before the prompt: write the rows as messages",
    "history": "it stands before the prompt: write the rows as messages",
    "tools": "a chat template shows them: write the rows as messages",
    "weight": "rows are learned in full or not at all: remove the rows of weight 0, and the column",
    "label": "it tells good answers from bad ones: keep the rows that are true",
    "labels": "they belong to input_ids: see docs/reference/data-formats.md",
    "completions": "rows have one completion: make a row of each",
    "completion_mask": "masks belong to input_ids: see docs/reference/data-formats.md",
    "assistant_masks": "masks belong to input_ids: see docs/reference/data-formats.md",
    "loss_mask": "rename it: completion_mask, beside input_ids",
    "position_ids": "a row is one text: give texts a row each, and let train.packing pack them",
    "behavior_logprobs": "set prefixes: {student: 1, stored: true}, with a policy gradient, to use them",
    "seq_lengths": "a row is one text: give texts a row each, and let train.packing pack them",
    "reasoning": "a student learns it inside the answer: write rows as messages with reasoning_content",
}
_SAME_MEANING = {
    "weights": "weight",
    "sample_weight": "weight",
    "loss_weight": "weight",
    "loss_weights": "loss_mask",
    "train_mask": "loss_mask",
    "functions": "tools",
    "turn_weights": "weight",
    "is_correct": "label",
    "responses": "completions",
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
    **dict.fromkeys(("chat_history", "conversation_history"), "history"),
    **dict.fromkeys(("context", "passage", "document"), "input"),
    **dict.fromkeys(("documents", "choices"), "options"),
    **dict.fromkeys(
        ("reasoning_content", "thinking", "think", "thoughts", "chain_of_thought", "cot", "rationale"),
        "reasoning",
    ),
}
# What a column of this name is likely to be, for advice alone.
_LIKELY = {
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("prompt", "question", "problem", "query", "instruction", "input", "inputs", "source", "user"),
    "completion": (
        *("completion", "response", "generated_solution", "generation", "output", "solution", "answer"),
        *("target", "targets", "assistant", "reply"),
    ),
}
# Beside whole conversations and texts, these are copies of what they hold.
_COPIES = ("input", "options", "system", "history", "reasoning")


class RowFormat(NamedTuple):
    """What the rows of a dataset are, and where their parts stand."""

    kind: str
    """A key of FORMATS."""
    source: Mapping[str, str]
    """The column of each part that is read."""
    chat: bool
    """Text prompts and completions become messages."""
    refused: Mapping[str, str]
    """Columns that change what is learned and have no place here, with what to do; empty ones do no harm."""
    beside: tuple[str, ...]
    """Columns that hold another form of the rows, which is not learned."""
    unread: tuple[str, ...]
    """Columns that say nothing about what is learned."""
    others: tuple[RowFormat, ...] = ()
    """What a row is whose columns of this format are null."""
    writers: tuple[str, ...] = ()
    """Models that wrote the first rows, where hpd generate says so."""


def choose_format(
    found: Sequence[str],
    columns: Mapping[str, str],
    *,
    style: str = "auto",
    ignored: Sequence[str] = (),
    kept: Sequence[str] = (),
    prompts: bool = False,
    texts: bool = True,
) -> RowFormat:
    """The format of rows with these columns.

    Args:
        found: the columns.
        columns: `data.columns`: the column of a part; it counts more than a column of the part's own name.
        style: `data.format`.
        ignored: columns that are left out on purpose.
        kept: columns that are read beside the row, such as the one that names its teacher.
        prompts: prompts without completions are enough.
        texts: rows may be text or token ids.

    Raises:
        ValueError: no such format, an unknown part, or a column that is not there.
    """
    _check_names(found, columns, ignored)
    parts = dict(columns)
    for name in found:
        if name not in columns.values() and name not in ignored:
            parts.setdefault(name, name)
    if "instruction" in parts or "query" in parts:
        for alias, part in _ALIASES.items():
            if alias in parts and part not in parts:
                parts[part] = parts.pop(alias)
    kinds = [
        kind
        for kind, needed in FORMATS.items()
        if all(part in parts for part in needed)
        and (prompts or kind not in ("prompt", "bare instruction"))
        and (texts or kind not in ("ids", "text"))
    ]
    if not kinds:
        raise ValueError(_no_format(found, prompts))
    first = max(kinds, key=lambda kind: (sum(part in columns for part in FORMATS[kind]), -kinds.index(kind)))
    kinds.remove(first)
    chosen, *others = (_layout(kind, parts, found, style, (*ignored, *kept)) for kind in (first, *kinds))
    return chosen._replace(others=tuple(others))


def _layout(
    kind: str, parts: Mapping[str, str], found: Sequence[str], style: str, apart: Sequence[str]
) -> RowFormat:
    """The format of this kind, and what becomes of the columns that it does not read."""
    # With data.columns, a prompt can be the instruction of rows that have an input too.
    inputs = ("input",) if kind in ("pair", "prompt") and _is_instruction(parts.get("prompt"), parts) else ()
    taken = (*FORMATS[kind], *(part for part in (*_TAKEN[kind], *inputs) if part in parts))
    source = {part: parts[part] for part in taken}
    left = [name for name in found if name not in source.values() and name not in apart]
    refused = _refused(kind, left, source)
    beside = tuple(name for name in left if name in READ and name not in refused)
    unread = tuple(name for name in left if name not in beside and name not in refused)
    turned = kind in ("instruction", "bare instruction") or any(p in source for p in (*_BEFORE, "input"))
    chat = style == "chat" or (style == "auto" and turned)
    return RowFormat(kind, source, chat, refused, beside, unread)


def _is_instruction(column: str | None, parts: Mapping[str, str]) -> bool:
    named = parts.get("input")
    return named is not None and (named != "input" or column in ("instruction", "query", "question"))


def _refused(kind: str, left: Sequence[str], source: Mapping[str, str]) -> dict[str, str]:
    whole = kind in ("messages", "sharegpt", "sharegpt preference", "text", "ids", "conversation preference")
    meanings = {name: meaning_of(name) for name in left}
    places = {*_TAKEN[kind], *(("input",) if kind in ("pair", "prompt") else ())} - {*source}
    return {
        name: f"map it: data.columns: {{{meaning}: {name}}}" if meaning in places else _MEANING[meaning]
        for name, meaning in meanings.items()
        if meaning in _MEANING and not (whole and meaning in _COPIES)
    }


def meaning_of(name: str) -> str:
    """The part of a row that a column of this name is, whatever it is called elsewhere."""
    return _SAME_MEANING.get(name, name)


def _check_names(found: Sequence[str], columns: Mapping[str, str], ignored: Sequence[str]) -> None:
    listed = ", ".join(found)
    for part, given in columns.items():
        if part not in READ:
            raise ValueError(
                f"data.columns maps {part} to {given!r}, and rows have no part {part}. {nearest(part, READ)}"
            )
        if given not in found:
            raise ValueError(
                f"data.columns maps {part} to {given!r}, which the dataset does not have: {listed}."
            )
    if missing := [name for name in ignored if name not in found]:
        raise ValueError(
            f"data.ignore names {', '.join(missing)}, which the dataset does not have: {listed}."
        )


def _mapping(found: Sequence[str]) -> str:
    """What data.columns could be for these columns, by the usual names of parts."""
    named = {name.casefold(): name for name in found}
    likely = {
        part: next((named[name] for name in names if name in named), None) for part, names in _LIKELY.items()
    }
    if likely["messages"]:
        return f"perhaps data.columns: {{messages: {likely['messages']}}}"
    if likely["prompt"] and likely["completion"]:
        return f"perhaps data.columns: {{prompt: {likely['prompt']}, completion: {likely['completion']}}}"
    return "for example data.columns: {prompt: question, completion: answer}"


def _no_format(found: Sequence[str], prompts: bool) -> str:
    text = (
        f"The dataset has the columns {', '.join(found)}. Training needs prompt and completion, messages, "
        f"text, or input_ids: map them, {_mapping(found)} (docs/reference/data-formats.md lists every "
        "format)."
    )
    if not prompts and {"prompt", "instruction"} & set(found):
        text += " Prompts alone are enough where the student writes every row: prefixes: {student: 1}."
    return text
