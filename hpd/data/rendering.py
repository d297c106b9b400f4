"""One row as text, tokens and labels: what training, the dry run, `hpd cache` and evaluation all read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trl.data_utils import common_prefix_length

from hpd.batch import IGNORE_INDEX
from hpd.data.repair import adds_eos, repaired
from hpd.data.templates import assistant_template, taken_by_template

__all__ = ["Rendering", "render", "tokenize"]

# Stands for the content of an answer while a template is asked for what is around it.
_PLACE = "PLACE-OF-THE-ANSWER"


class Rendering(NamedTuple):
    """A row as it is learned."""

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


def tokenize(row: Mapping[str, Any], tokenizer: Any, labels: str) -> tuple[list[int], list[bool]]:
    """Token ids and label mask of one row; see `render`."""
    rendered = render(row, tokenizer, labels)
    return rendered.ids, rendered.mask


def render(row: Mapping[str, Any], tokenizer: Any, labels: str) -> Rendering:
    """One row as training reads it, with one begin and one end (`repaired`).

    Args:
        row: in a format of TRL's: prompt and completion, messages, text, or input_ids; null where it has
            none of a part.
        tokenizer: the student's.
        labels: the recipe's `data.labels`; "conversation": as completion, and every token of `messages`.

    Raises:
        ValueError: a conversation whose template does not tell where the assistant's turns are.
    """
    if row.get("input_ids") is not None:
        given = row.get("labels") or row["input_ids"]
        return Rendering(list(row["input_ids"]), [label != IGNORE_INDEX for label in given])
    row = repaired(row, tokenizer)
    if row.get("messages") is not None:
        return _conversation(row, tokenizer, labels)
    if row.get("text") is not None:
        text = row["text"] + _missing_eos(row["text"], tokenizer)
        ids = _single_end(tokenizer(text)["input_ids"], tokenizer)
        return Rendering(ids, [True] * len(ids), text)
    if isinstance(row["prompt"], list):
        return _chat_pair(row, tokenizer, labels)
    return _text_pair(row, tokenizer, labels)


def _text_pair(row: Mapping[str, Any], tokenizer: Any, labels: str) -> Rendering:
    prompt, completion = row["prompt"], row.get("completion")
    before = tokenizer(prompt)["input_ids"]
    if adds_eos(tokenizer):
        before = before[:-1]
    if not completion:
        return _unanswered(prompt, before, tokenizer)
    text = prompt + completion + _missing_eos(completion, tokenizer)
    return _pair(prompt, text, before, _single_end(tokenizer(text)["input_ids"], tokenizer), labels)


def _chat_pair(row: Mapping[str, Any], tokenizer: Any, labels: str) -> Rendering:
    options, completion = _options(row), row.get("completion")
    if labels == "assistant":
        options["chat_template"] = assistant_template(tokenizer)[1]
    prompt = _render(row["prompt"], tokenizer, add_generation_prompt=True, **options)
    before = _ids(prompt, tokenizer)
    if not completion:
        return _unanswered(prompt, before, tokenizer)
    turns = [*row["prompt"], *completion]
    text = _ended(_render(turns, tokenizer, **options), turns, tokenizer, options)
    text, cut = _restored(text, turns, tokenizer, options, behind=_shared(prompt, text))
    rendered = _pair(prompt, text, before, _ids(text, tokenizer), labels)._replace(cut=cut)
    if labels != "assistant" or cut:
        return rendered
    ids, marked = _assistant(turns, tokenizer, options)
    start = common_prefix_length(before, ids)
    return rendered._replace(ids=ids, mask=[bit and i >= start for i, bit in enumerate(marked)])


def _unanswered(prompt: str, before: list[int], tokenizer: Any) -> Rendering:
    """A prompt whose completion the student writes: where it starts is the place of the first label."""
    ids = [*before, tokenizer.eos_token_id]
    return Rendering(ids, [False] * len(before) + [True], prompt, prompt, len(prompt))


def _pair(prompt: str, text: str, before: list[int], ids: list[int], labels: str) -> Rendering:
    """Prompt and completion: the completion begins where the prompt alone and both together differ."""
    shared = common_prefix_length(before, ids)
    mask = [labels == "all" or i >= shared for i in range(len(ids))]
    return Rendering(ids, mask, text, prompt, _shared(prompt, text), tuple(before[shared:]))


def _conversation(row: Mapping[str, Any], tokenizer: Any, labels: str) -> Rendering:
    turns, options = row["messages"], _options(row)
    whole = labels in ("all", "conversation")
    if not whole:
        # The template that marks turns may print what the tokenizer's own leaves out of them.
        options["chat_template"] = assistant_template(tokenizer)[1]
    text = _render(turns, tokenizer, **options)
    text = _ended(text, turns, tokenizer, options) if whole else text
    text, cut = _restored(text, turns, tokenizer, options, behind=0)
    if whole:
        ids = _ids(text, tokenizer)
        return Rendering(ids, [True] * len(ids), text, cut=cut)
    if not cut or turns[-1].get("weight") == 0:
        ids, mask = _assistant(turns, tokenizer, options)
        return Rendering(ids, mask, text)
    # Up to the last answer the text is the same; the answer is learned from where the prompt ends.
    earlier = _assistant([*turns[:-1], {**turns[-1], "weight": 0}], tokenizer, options)[1]
    ids = _ids(text, tokenizer)
    prompt = _render(turns[:-1], tokenizer, add_generation_prompt=True, **options)
    start = common_prefix_length(_ids(prompt, tokenizer), ids)
    mask = [i >= start or _at(earlier, i) for i in range(len(ids))]
    return Rendering(ids, mask, text, cut=cut)


def _assistant(
    turns: Sequence[Mapping[str, Any]], tokenizer: Any, options: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """A conversation whose labels are the assistant's turns of weight 1, as the template marks them; where
    it marks none, each turn is what its rendering adds to that of the turns before it."""
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    marked, template = assistant_template(tokenizer)
    if marked:
        marks: Any = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        rendered: Any = _render(turns, tokenizer, **{**options, **marks, "chat_template": template})
        ids, mask = rendered["input_ids"], [bool(bit) for bit in rendered["assistant_masks"]]
        bounds = [i for i in range(len(ids) + 1) if _at(mask, i) != _at(mask, i - 1)]
        spans = list(zip(bounds[::2], bounds[1::2], strict=True))
    else:
        ids = _ids(_render(turns, tokenizer, **options), tokenizer)
        spans = [_span(turns, place, ids, tokenizer, options) for place in places]
    learned = [turns[place].get("weight") != 0 for place in places]
    if not all(learned) and len(spans) != len(places):
        raise ValueError(
            f"A conversation has {len(places)} assistant turns, of which some have weight 0, and the "
            f"student's chat template marks {len(spans)}: split the conversation, or set data.labels: "
            "last_turn."
        )
    out = [False] * len(ids)
    for (start, end), bit in zip(
        spans, learned if len(spans) == len(places) else [True] * len(spans), strict=True
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
    before = _ids(_render(turns[:place], tokenizer, add_generation_prompt=True, **options), tokenizer)
    through = _ids(_render(turns[: place + 1], tokenizer, **options), tokenizer)
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


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a rendered conversation, which has its begin and end tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(turns: Sequence[Mapping[str, Any]], tokenizer: Any, **options: Any) -> Any:
    # A column holds the keys of all rows, and null where a turn has none; a template would print it.
    shown = [
        {k: v for k, v in turn.items() if k != "weight" and (v is not None or k == "content")}
        for turn in turns
    ]
    with taken_by_template("A row", turns, "student"):
        return tokenizer.apply_chat_template(shown, **{"tokenize": False, **options})


def _without_nulls(value: Any) -> Any:
    """Schemas without the nulls that a column puts where another row's schema has a key."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _ended(text: str, turns: Sequence[Any], tokenizer: Any, options: Mapping[str, Any]) -> str:
    """The text with the end of its last answer, which some templates print with the next turn only (GLM)."""
    content = turns[-1].get("content")
    if not isinstance(content, str) or not text.rstrip().endswith(content.rstrip()):
        return text
    template = assistant_template(tokenizer)[1]
    if template is None:
        return text
    marked = _render(turns, tokenizer, **{**options, "chat_template": template})
    return marked if marked.startswith(text) else text


def _restored(
    text: str, turns: Sequence[Any], tokenizer: Any, options: Mapping[str, Any], behind: int
) -> tuple[str, str]:
    """The text with the whole of its last answer, where the template leaves the answer's beginning out.

    Templates of reasoning models cut the thought off an answer, since earlier thoughts are not shown to the
    model again; in the answer that is learned, the thought is the lesson.

    Returns:
        The text, and what the template had left out; ("text", "") where it leaves out nothing.
    """
    last = turns[-1]
    content = last.get("content")
    if last.get("role") != "assistant" or not isinstance(content, str) or last.get("tool_calls"):
        return text, ""
    if not content.strip() or _squeeze(content) in _squeeze(text[behind:]):
        return text, ""
    frame = _render([*turns[:-1], {**last, "content": _PLACE}], tokenizer, **options)
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
    end = tokenizer.eos_token or ""
    return "" if text.endswith(end) else end


def _single_end(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens of a text that ends with an end token, without the one that the tokenizer adds."""
    end = tokenizer.eos_token_id
    return ids[:-1] if ids[-2:] == [end, end] and adds_eos(tokenizer) else ids
