"""One row of any format as a row of TRL's: prompt and completion, messages, text, or input_ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpd.batch import IGNORE_INDEX
from hpd.data.checks import check_row, check_turns, check_types
from hpd.data.formats import FORMATS, RowFormat
from hpd.data.teacher_prompts import TEACHER_PROMPT, TeacherContext

__all__ = ["convert", "is_chat"]

# Whose words a turn of the ShareGPT format holds.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
# Names that libraries give the weight of a turn.
_WEIGHTS = ("weight", "loss", "train", "training")
# Parts that a CSV or Parquet file may hold as JSON text.
_STRUCTURED = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "history",
    "tools",
    "chat_template_kwargs",
    "input_ids",
    "labels",
    "completion_mask",
    "assistant_masks",
    "attention_mask",
)
_NOTHING = (None, "", [], {})


def convert(
    row: Mapping[str, Any],
    index: int,
    layout: RowFormat,
    labels: str,
    *,
    system_prompt: str | None = None,
    prompts: bool = False,
    kept: Sequence[str] = (),
    context: TeacherContext | None = None,
    whole: Sequence[str] = (),
) -> dict[str, Any]:
    """The row in a format of TRL's.

    Args:
        row: as the file holds it.
        index: its number, for errors.
        layout: of its dataset.
        labels: the recipe's `data.labels`.
        system_prompt: of conversations that have none.
        prompts: a prompt without a completion is enough.
        kept: columns that stay.
        context: of a teacher that reads a prompt of its own, which becomes the column `teacher_prompt`.
        whole: the columns of rows of all formats, null where this one has none.

    Raises:
        ValueError: with the number of the row: what is wrong with it.
    """
    layout = _of_row(row, layout)
    for name, remedy in layout.refused.items():
        value = row.get(name)
        if not any(value is nothing or value == nothing for nothing in _NOTHING) and value not in (1, True):
            raise ValueError(
                f"Row {index} has the column {name}, which changes what is learned and is not read in rows "
                f"of {' and '.join(layout.source.values())}; {remedy}. To train without it, name it in "
                "data.ignore, or remove the column."
            )
    parts = {part: _parsed(part, row.get(given)) for part, given in layout.source.items()}
    _check_before(parts, index)
    if layout.kind == "ids":
        out = _token_ids(parts, index, labels)
    elif layout.kind == "text":
        out = {"text": parts["text"]}
    else:
        out = _conversation(parts, index, layout, labels, prompts)
        out |= {name: parts[name] for name in ("tools", "chat_template_kwargs") if name in parts}
        first = "messages" if "messages" in out else "prompt"
        if system_prompt and first in out:
            out[first] = _with_system(out[first], system_prompt)
    unanswered = prompts and out.get("completion") is None
    check_row({k: v for k, v in out.items() if not (unanswered and k == "completion")}, index, labels)
    if context is not None:
        out[TEACHER_PROMPT] = context.prompt_of(row, out, index)
    out = {**dict.fromkeys(whole), **out}
    return {**out, **{name: row[name] for name in kept}}


def is_chat(rows: Any, layout: RowFormat, labels: str, *, prompts: bool = False) -> bool:
    """True if the prompts of a dataset are messages; by its first row, since a column has one type.

    Args:
        rows, layout, labels, prompts: as `convert` takes them.
    """
    first = next(iter(rows), None)
    return first is not None and isinstance(
        convert(first, 0, layout, labels, prompts=prompts).get("prompt"), list
    )


def _of_row(row: Mapping[str, Any], layout: RowFormat) -> RowFormat:
    """The format of this row: of those of its dataset, the first whose columns are not all null."""

    def is_empty(one: RowFormat) -> bool:
        return all(row.get(one.source[part]) is None for part in FORMATS[one.kind])

    return next((one for one in (layout, *layout.others) if not is_empty(one)), layout)


def _check_before(parts: Mapping[str, Any], index: int) -> None:
    """Refuse a system text that is none, and earlier turns that are not pairs of texts."""
    for name in ("system", "input"):
        if not isinstance(parts.get(name), str | None):
            raise ValueError(f"Row {index} has a {name} that is not text: correct or remove the row.")
    history = parts.get("history") or []
    if not isinstance(history, list) or not all(
        (isinstance(pair, Mapping) and "role" in pair and "content" in pair)
        or (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair))
        for pair in history
    ):
        raise ValueError(
            f"Row {index} has a history that is not a list of [question, answer] pairs of text: correct or "
            "remove the row."
        )


def _parsed(part: str, value: Any) -> Any:
    """A part that is JSON text, as what it says; a text prompt is no such part unless it holds messages."""
    if part not in _STRUCTURED or not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        read = json.loads(value)
    except ValueError:
        return value
    if part in ("prompt", "completion", "chosen", "rejected"):
        turns = isinstance(read, list) and all(isinstance(turn, dict) and "role" in turn for turn in read)
        return read if turns and read else value
    return read


def _conversation(
    parts: dict[str, Any], index: int, layout: RowFormat, labels: str, prompts: bool
) -> dict[str, Any]:
    """The row's turns or texts, without what its template takes besides."""
    kind = layout.kind
    if kind in ("messages", "sharegpt"):
        messages = parts["messages" if kind == "messages" else "conversations"]
        if kind == "sharegpt" and isinstance(messages, list):
            messages = [_spoken(turn) for turn in messages]
        check_types({"messages": messages}, index)
        return _split(_after(parts, messages), index, labels, prompts)
    if kind == "sharegpt preference":
        turns, chosen = parts["conversations"], parts["chosen"]
        turns = [_spoken(turn) for turn in turns] if isinstance(turns, list) else turns
        answers = [_spoken(turn) for turn in (chosen if isinstance(chosen, list) else [chosen])]
        check_types({"prompt": turns, "completion": answers}, index)
        return _split(_after(parts, [*turns, *answers]), index, "last_turn", prompts)
    if kind == "conversation preference":
        check_types({"completion": parts["chosen"]}, index)
        if isinstance(parts["chosen"], str):
            return {"text": parts["chosen"]}
        return _split(_after(parts, parts["chosen"]), index, "last_turn", prompts)
    named = {"pair": "completion", "preference": "chosen"}.get(kind, "output")
    prompt: Any = parts["instruction" if "instruction" in kind else "prompt"]
    completion: Any = parts.get(named)
    answered = kind not in ("prompt", "bare instruction") and not (prompts and completion is None)
    check_types({"prompt": prompt, **({"completion": completion} if answered else {})}, index)
    if kind == "preference" and isinstance(prompt, str) and isinstance(completion, list):
        # The prompt is the first turn of either answer.
        prompt, completion = completion[:-1], completion[-1:]
    elif layout.chat and isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": _joined([prompt, parts.get("input")])}]
        if completion and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
    elif isinstance(prompt, str):
        prompt = _plain(parts, prompt)
    elif kind == "preference" and isinstance(completion, list) and completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]
    turns = _weighed(prompt, index)
    if isinstance(turns, list):
        turns = _after(parts, turns)
    return {"prompt": turns, **({"completion": _weighed(completion, index, fixed=True)} if answered else {})}


def _plain(parts: Mapping[str, Any], prompt: str) -> str:
    """System text, earlier turns, instruction and input as lines; a prompt of its own as it is."""
    before = [turn["content"] for turn in _after(parts, [])]
    lines = _joined([*before, prompt, parts.get("input")])
    return lines + "\n" if "instruction" in parts else lines


def _joined(texts: Sequence[Any]) -> str:
    return "\n".join(text for text in texts if text)


def _after(parts: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """The turns behind the system text and the earlier turns of the row's other columns."""
    before: list[Any] = [{"role": "system", "content": parts["system"]}] if parts.get("system") else []
    for pair in parts.get("history") or []:
        if isinstance(pair, Mapping):
            before.append(pair)
        else:
            before += [
                {"role": r, "content": text} for r, text in zip(("user", "assistant"), pair, strict=True)
            ]
    return [*before, *turns]


def _spoken(turn: Any) -> Any:
    """A turn of the ShareGPT format as one with role and content."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    role = _SPEAKERS.get(turn["from"], turn["from"])
    if turn["from"] == "function_call":
        call = _parsed("tools", turn["value"])
        calls = call if isinstance(call, list) else [call]
        return {
            "role": role,
            "content": "",
            "tool_calls": [{"type": "function", "function": one} for one in calls],
            **rest,
        }
    return {"role": role, "content": turn["value"], **rest}


def _split(messages: list[Any], index: int, labels: str, prompts: bool) -> dict[str, Any]:
    """Messages, or prompt and last turn where only that is learned or written again."""
    messages = _weighed(messages, index)
    if not messages:
        return {"messages": messages}
    if prompts:
        answered = messages[-1]["role"] == "assistant"
        prompt = messages[:-1] if answered else messages
        return {"prompt": prompt, **({"completion": messages[-1:]} if answered else {"completion": None})}
    if labels == "last_turn":
        return {"prompt": messages[:-1], "completion": _weighed(messages[-1:], index, fixed=True)}
    return {"messages": messages}


def _weighed(turns: Any, index: int, fixed: bool = False) -> Any:
    """Turns whose content is text, and whose weight, if any has one, is called so and is 0 or 1.

    Args:
        fixed: all of the turns are learned, so none has the weight 0.
    """
    if not isinstance(turns, list):
        return turns
    check_turns(turns, "messages", index)
    out = []
    for number, turn in enumerate(turns):
        given = {name: turn[name] for name in _WEIGHTS if turn.get(name) is not None}
        kept = {name: value for name, value in turn.items() if name not in _WEIGHTS}
        name, weight = next(iter(given.items()), ("", None))
        if weight not in (None, 0, 1) or (fixed and weight == 0):
            allowed = "1, since it is all that is learned" if weight == 0 else "0 or 1"
            raise ValueError(
                f"Row {index}: turn {number} has {name} {weight}, and here it can be {allowed}: correct the "
                "row, or remove it."
            )
        if weight == 1 and turn["role"] != "assistant":
            raise ValueError(
                f"Row {index}: turn {number} has {name} {weight}, and a student learns the assistant's turns "
                "only: set it to 0, or data.labels: all."
            )
        if isinstance(kept.get("content"), list):
            # Templates of text models print a list as Python writes it.
            kept["content"] = "".join(part["text"] for part in kept["content"])
        out.append(kept if weight is None or turn["role"] != "assistant" else {**kept, "weight": int(weight)})
    return out


def _with_system(turns: Any, text: str) -> Any:
    if not isinstance(turns, list) or not turns or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text}, *turns]


def _token_ids(parts: dict[str, Any], index: int, labels: str) -> dict[str, Any]:
    """Token ids with labels, from whatever says which of them are learned."""
    ids = parts["input_ids"]
    if not isinstance(ids, list):
        return {"input_ids": ids}
    masks = {name: parts[name] for name in ("attention_mask", "completion_mask", "assistant_masks")
             if parts.get(name) is not None}  # fmt: skip
    for name, mask in masks.items():
        if not isinstance(mask, list) or len(mask) != len(ids) or not set(mask) <= {0, 1}:
            raise ValueError(
                f"Row {index} has {len(ids)} input_ids and a {name} that is not a list of as many zeros and "
                "ones: correct the row."
            )
    targets = parts.get("labels")
    if targets is not None:
        check_row({"input_ids": ids, "labels": targets}, index, labels)
    real = masks.pop("attention_mask", None) or [1] * len(ids)
    if labels == "all":
        masks.pop("completion_mask", None)
    learned = [all(bits) for bits in zip(*masks.values(), strict=True)] if masks else [True] * len(ids)
    targets = list(ids) if targets is None else targets
    targets = [target if bit else IGNORE_INDEX for target, bit in zip(targets, learned, strict=True)]
    return {
        "input_ids": [token for token, bit in zip(ids, real, strict=True) if bit],
        "labels": [target for target, bit in zip(targets, real, strict=True) if bit],
    }
