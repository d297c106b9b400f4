"""One row as text, tokens and labels, as training makes them of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from trl.data_utils import common_prefix_length, is_conversational

from hpd.batch import IGNORE_INDEX
from hpd.data.templates import training_template

__all__ = ["Rendering", "adds_eos", "render", "tokenise"]

# Stands for the content of an answer while a template is asked for what is around it.
_PLACE = "PLACE-OF-THE-ANSWER"


class Rendering(NamedTuple):
    """A row as it is learnt."""

    ids: list[int]
    """Its tokens, before train.max_length."""
    mask: list[bool]
    """The tokens that are labels."""
    text: str | None = None
    """The whole text; None for a row that is given as tokens."""
    prompt: str | None = None
    """The text that the student would be asked to go on from; None where the row has no prompt."""
    begins: int = 0
    """Characters of the text that the prompt has too."""
    lost_prompt_ids: tuple[int, ...] = ()
    """Last tokens of the prompt alone that the row as a whole does not have."""
    cut: str = ""
    """Text of the answer that the template leaves out; the row keeps it all the same."""


def tokenise(row: dict[str, Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """Token ids and label mask of one row."""
    rendered = render(row, tokenizer, labels)
    return rendered.ids, rendered.mask


def render(row: Mapping[str, Any], tokenizer: Any, labels: str) -> Rendering:
    """One row as training reads it.

    Args:
        row: in one of TRL's formats: prompt and completion, messages, text, or input_ids.
        tokenizer: the student's.
        labels: the recipe's `data.labels`.
    """
    if "input_ids" in row:
        given = row.get("labels", row["input_ids"])
        return Rendering(list(row["input_ids"]), [label != IGNORE_INDEX for label in given])
    if "prompt" in row and "completion" in row:
        return _completion(row, tokenizer, labels)
    if "messages" in row:
        return _conversation(row, tokenizer, labels)
    text = row["text"] + _missing_eos(row["text"], tokenizer)
    ids = _single_end(tokenizer(text)["input_ids"], tokenizer)
    return Rendering(ids, [True] * len(ids), text)


def adds_eos(tokenizer: Any) -> bool:
    """True if the tokenizer puts an end token behind every text, where a row has its own."""
    ids = tokenizer("a")["input_ids"]
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def _completion(row: Mapping[str, Any], tokenizer: Any, labels: str) -> Rendering:
    cut = ""
    learnt: list[int] | None = None
    if is_conversational(dict(row)):
        options = _options(row, tokenizer, labels)
        turns = [*row["prompt"], *row["completion"]]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
        text = tokenizer.apply_chat_template(turns, **options)
        text, cut = _restored(text, turns, tokenizer, options, behind=_shared(prompt, text))
        prompt_ids, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
        if labels == "assistant" and not cut:
            learnt = _assistant_mask(turns, tokenizer, options)[1]
    else:
        prompt = row["prompt"]
        text = prompt + row["completion"] + _missing_eos(row["completion"], tokenizer)
        prompt_ids = tokenizer(prompt)["input_ids"]
        if adds_eos(tokenizer):
            prompt_ids = prompt_ids[:-1]
        ids = _single_end(tokenizer(text)["input_ids"], tokenizer)
    shared = common_prefix_length(prompt_ids, ids)
    mask = [labels == "all" or i >= shared for i in range(len(ids))]
    if learnt is not None:
        mask = [bit and bool(other) for bit, other in zip(mask, learnt, strict=True)]
    return Rendering(ids, mask, text, prompt, _shared(prompt, text), tuple(prompt_ids[shared:]), cut)


def _conversation(row: Mapping[str, Any], tokenizer: Any, labels: str) -> Rendering:
    """A whole conversation; with labels: assistant only the assistant's turns are labels, as the template
    marks them."""
    turns, options = row["messages"], _options(row, tokenizer, labels)
    text = tokenizer.apply_chat_template(turns, **options)
    if labels == "assistant":
        ids, marks = _assistant_mask(turns, tokenizer, options)
        return Rendering(ids, [bool(bit) for bit in marks], text)
    text, cut = _restored(text, turns, tokenizer, options, behind=0)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Rendering(ids, [True] * len(ids), text, cut=cut)


def _options(row: Mapping[str, Any], tokenizer: Any, labels: str) -> dict[str, Any]:
    tools = row.get("tools")
    return {
        "tokenize": False,
        "chat_template": training_template(tokenizer, labels),
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }


def _assistant_mask(
    turns: list[Any], tokenizer: Any, options: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    rendered = tokenizer.apply_chat_template(
        turns, **{**options, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    )
    return rendered["input_ids"], rendered["assistant_masks"]


def _restored(
    text: str, turns: list[Any], tokenizer: Any, options: Mapping[str, Any], behind: int
) -> tuple[str, str]:
    """The text with the whole of its last answer, where the template leaves the answer's beginning out.

    Templates of reasoning models cut the thought off an answer, since earlier thoughts are not shown to the
    model again; in the answer that is learnt, the thought is the lesson.

    Returns:
        The text, and what the template had left out; ("text", "") where it leaves out nothing.
    """
    last = turns[-1]
    content = last.get("content")
    if last.get("role") != "assistant" or not isinstance(content, str) or last.get("tool_calls"):
        return text, ""
    if not content.strip() or _squeeze(content) in _squeeze(text[behind:]):
        return text, ""
    frame = tokenizer.apply_chat_template([*turns[:-1], {**last, "content": _PLACE}], **options)
    before, found, after = frame.rpartition(_PLACE)
    if not (found and text.startswith(before) and text.endswith(after)):
        return text, ""
    kept = text[len(before) : len(text) - len(after)].strip()
    whole = content.rstrip()
    # A template that rewrites answers is not one that cuts them.
    if not kept or not whole.endswith(kept):
        return text, ""
    return before + content + after, whole[: len(whole) - len(kept)].strip()


def _shared(prompt: str, text: str) -> int:
    """Characters that a text begins with as the prompt does."""
    return next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _missing_eos(text: str, tokenizer: Any) -> str:
    return "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token


def _single_end(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens of a text that ends with an end token, without the one that the tokenizer adds."""
    end = tokenizer.eos_token_id
    return ids[:-1] if ids[-2:] == [end, end] and adds_eos(tokenizer) else ids
