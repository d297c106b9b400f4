"""A row as token ids and labels: what training, the dry run, `hpd cache` and evaluation all read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import common_prefix_length

from hpd.batch import IGNORE_INDEX
from hpd.data.convert import convert
from hpd.data.formats import RowFormat
from hpd.data.templates import assistant_template, taken_by_template

__all__ = ["label_rows", "tokenise"]


def label_rows(
    rows: Dataset | IterableDataset,
    layout: RowFormat,
    tokenizer: Any,
    labels: str,
    *,
    prompts: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Rows with `input_ids` and `labels`, uncut.

    Args:
        rows: of any format.
        layout: which one.
        tokenizer: the student's.
        labels: as `tokenise` takes them.
        prompts: prompts without completions are enough.
        num_proc: processes, as `train.dataset_num_proc` says.

    Raises:
        ValueError: a row that cannot be learnt from.
    """
    given = {"layout": layout, "tokenizer": tokenizer, "labels": labels, "prompts": prompts}
    options: Any = {} if isinstance(rows, IterableDataset) else {"num_proc": num_proc}
    return rows.map(_labelled, with_indices=True, fn_kwargs=given, **options)


def _labelled(
    row: Mapping[str, Any], index: int, layout: RowFormat, tokenizer: Any, labels: str, prompts: bool
) -> dict[str, list[int]]:
    converted = convert(row, index, layout, labels, prompts=prompts)
    if "input_ids" in converted:
        return {name: converted[name] for name in ("input_ids", "labels")}
    ids, mask = tokenise(converted, tokenizer, labels)
    return {
        "input_ids": ids,
        "labels": [token if bit else IGNORE_INDEX for token, bit in zip(ids, mask, strict=True)],
    }


def tokenise(row: dict[str, Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """Token ids and label mask of one row.

    Args:
        row: in a format of TRL's.
        tokenizer: the student's.
        labels: the recipe's `data.labels`; "conversation": as completion, and every token of `messages`.

    Raises:
        ValueError: a conversation whose template does not tell where the assistant's turns are.
    """
    if row.get("input_ids") is not None:
        given = row.get("labels") or row["input_ids"]
        return list(row["input_ids"]), [label != IGNORE_INDEX for label in given]
    if row.get("messages") is not None:
        return _messages(row, tokenizer, labels)
    if row.get("text") is not None:
        ids = tokenizer(row["text"] + _missing_eos(row["text"], tokenizer))["input_ids"]
        return ids, [True] * len(ids)
    return _pair(row, tokenizer, labels)


def _pair(row: Mapping[str, Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """Prompt and completion: the completion begins where the prompt alone and both together differ."""
    prompt, completion = row["prompt"], row.get("completion")
    marked = None
    if isinstance(prompt, list):
        options = _options(row)
        before = _render(prompt, tokenizer, add_generation_prompt=True, **options)["input_ids"]
        if completion and labels == "assistant":
            ids, marked = _assistant(prompt + completion, tokenizer, options)
        elif completion:
            ids = _render(prompt + completion, tokenizer, **options)["input_ids"]
    else:
        before = tokenizer(prompt)["input_ids"]
        if completion:
            text = prompt + completion + _missing_eos(completion, tokenizer)
            ids = tokenizer(text)["input_ids"]
    if not completion:
        # The student writes the completion. Where it starts is the place of the first label.
        return [*before, tokenizer.eos_token_id], [False] * len(before) + [True]
    start = 0 if labels == "all" else common_prefix_length(before, ids)
    return ids, [i >= start and (marked is None or marked[i]) for i in range(len(ids))]


def _messages(row: Mapping[str, Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    options = _options(row)
    if labels in ("all", "conversation"):
        ids = _render(row["messages"], tokenizer, **options)["input_ids"]
        return ids, [True] * len(ids)
    return _assistant(row["messages"], tokenizer, options)


def _assistant(
    turns: Sequence[Mapping[str, Any]], tokenizer: Any, options: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """A conversation whose labels are the assistant's turns of weight 1, as the template marks them; where
    it marks none, each turn is what its rendering adds to that of the turns before it."""
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    marked, template = assistant_template(tokenizer)
    if marked:
        rendered = _render(
            turns, tokenizer, chat_template=template, return_assistant_tokens_mask=True, **options
        )
        ids, mask = rendered["input_ids"], [bool(bit) for bit in rendered["assistant_masks"]]
        bounds = [i for i in range(len(ids) + 1) if _at(mask, i) != _at(mask, i - 1)]
        spans = list(zip(bounds[::2], bounds[1::2], strict=True))
    else:
        ids = _render(turns, tokenizer, **options)["input_ids"]
        spans = [_span(turns, place, ids, tokenizer, options) for place in places]
    learnt = [turns[place].get("weight") != 0 for place in places]
    if not all(learnt) and len(spans) != len(places):
        raise ValueError(
            f"A conversation has {len(places)} assistant turns, of which some have weight 0, and the "
            f"student's chat template marks {len(spans)}: split the conversation, or set data.labels: "
            "last_turn."
        )
    out = [False] * len(ids)
    for (start, end), bit in zip(
        spans, learnt if len(spans) == len(places) else [True] * len(spans), strict=True
    ):
        out[start:end] = [bit] * (end - start)
    return ids, out


def _at(mask: Sequence[bool], place: int) -> bool:
    return 0 <= place < len(mask) and mask[place]


def _span(
    turns: Sequence[Mapping[str, Any]],
    place: int,
    ids: Sequence[int],
    tokenizer: Any,
    options: Mapping[str, Any],
) -> tuple[int, int]:
    """First and last token of a turn among the whole conversation's."""
    before = _render(turns[:place], tokenizer, add_generation_prompt=True, **options)["input_ids"]
    through = _render(turns[: place + 1], tokenizer, **options)["input_ids"]
    end = common_prefix_length(through, list(ids))
    # The last token may merge with what follows.
    if end < len(through) - 1:
        raise ValueError(
            f"The student's chat template renders turn {place} of a conversation in another way once other "
            "turns follow, so its labels are not to be found: set data.labels: last_turn, or name a template "
            "with generation marks in train.chat_template_path."
        )
    return common_prefix_length(before, list(ids)), end


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the template gets besides the turns."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": _without_nulls(tools), **_without_nulls(row.get("chat_template_kwargs") or {})}


def _render(turns: Sequence[Mapping[str, Any]], tokenizer: Any, **options: Any) -> Any:
    # A column holds the keys of all rows, and null where a turn has none; a template would print it.
    shown = [
        {k: v for k, v in turn.items() if k != "weight" and (v is not None or k == "content")}
        for turn in turns
    ]
    with taken_by_template("A row", turns, "student"):
        return tokenizer.apply_chat_template(shown, tokenize=True, return_dict=True, **options)


def _without_nulls(value: Any) -> Any:
    """Schemas without the nulls that a column puts where another row's schema has a key."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _missing_eos(text: str, tokenizer: Any) -> str:
    return "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token
