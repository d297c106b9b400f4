"""Chat templates beside the rows: they are programs that come with a tokenizer, and some refuse rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hpd.models.bounded import rendering

__all__ = ["assistant_template", "check_prompts", "check_templates", "read_template", "taken_by_template"]

# Characters of a conversation that an error shows, to find its row.
_SHOWN = 60


@contextlib.contextmanager
def taken_by_template(where: str, turns: Sequence[Mapping[str, Any]], owner: str) -> Iterator[None]:
    """Name a conversation for whatever its template raises, and bound what it takes (`rendering`).

    Args:
        where: which row it is.
        turns: the conversation.
        owner: whose template it is, such as "student".

    Raises:
        ValueError: with what the template said.
    """
    try:
        with rendering():
            yield
    except Exception as error:
        # raise_exception, undefined names, sums of text and null: a template raises anything.
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        roles = ", ".join(str(turn.get("role")) for turn in turns[:6]) + (", ..." if turns[6:] else "")
        text = str(turns[0].get("content") if turns else "")
        begin = text[:_SHOWN] + ("..." if text[_SHOWN:] else "")
        raise ValueError(
            f"{where} (turns: {roles}; it begins {begin!r}): the {owner}'s chat template refuses it: "
            f"{said[:300]}. Correct or remove the row, or use a tokenizer with another template."
        ) from None


def read_template(path: str) -> str:
    """The template that `train.chat_template_path` names, as TRL finds it: a .jinja file, or a tokenizer's.

    Raises:
        ValueError: there is none.
    """
    if path.endswith((".jinja", ".j2")) and Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    try:
        found = AutoTokenizer.from_pretrained(path).chat_template
    except Exception as error:  # tokenizers' parser raises a bare Exception
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"train.chat_template_path is {path!r}, and should be a .jinja file or the folder of a "
            f"tokenizer: {said}"
        ) from None
    if not isinstance(found, str):
        raise ValueError(
            f"train.chat_template_path: the tokenizer {path!r} has no chat template: name another."
        )
    return found


def assistant_template(tokenizer: Any) -> tuple[bool, str | None]:
    """Whether the assistant's turns are marked, and the template that does; None: the tokenizer's own."""
    if "{% generation %}" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        return True, None
    if (marked := getattr(tokenizer, "marked_chat_template", None)) is not None:
        return True, marked  # of a template whose date was fixed
    # Importing it takes a second, and evaluation needs none of it.
    from trl.chat_template_utils import get_training_chat_template

    try:
        with rendering():
            template = get_training_chat_template(tokenizer)
    except Exception:  # it renders conversations of its own, and a template raises anything
        return False, None
    return template is not None, template


def check_templates(
    rows: Any, tokenizer: PreTrainedTokenizerBase, labels: str, *, name: str = "", num_proc: int | None = None
) -> Any:
    """Render every conversation as training will, without tokens; `datasets` caches the outcome.

    Args:
        rows: conversations in TRL's formats: messages, or prompt and completion (or chosen and rejected).
        tokenizer: whose template is asked.
        labels: the recipe's `data.labels`.
        name: what the rows are called behind their number, such as "of the validation rows".
        num_proc: processes, as `train.dataset_num_proc` says.

    Returns:
        The rows; of a stream, one that checks each row when it is read.

    Raises:
        ValueError: with the number of the first row that the template refuses, and what it said.
    """
    given = {"tokenizer": tokenizer, "labels": labels, "name": name}
    if isinstance(rows, IterableDataset):
        return rows.map(_checked, with_indices=True, fn_kwargs=given)
    if isinstance(rows, Dataset) and len(rows):
        rows.map(
            _checked,
            with_indices=True,
            fn_kwargs={**given, "keep": False},
            remove_columns=rows.column_names,
            num_proc=num_proc,
        )
    return rows


def _checked(
    row: Mapping[str, Any], index: int, tokenizer: Any, labels: str, name: str, keep: bool = True
) -> dict[str, Any]:
    tools = row.get("tools")
    marks_turns = isinstance(row.get("messages"), list) and labels in ("completion", "assistant")
    options = {
        "tokenize": False,
        "chat_template": assistant_template(tokenizer)[1] if marks_turns else None,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    prompt = row.get("prompt")
    where = f"Row {index} {name}".rstrip()
    if isinstance(prompt, list):
        with taken_by_template(where, prompt, "student"):
            tokenizer.apply_chat_template(prompt, **{"add_generation_prompt": True, **options})
    for answer in ("completion", "chosen", "rejected"):
        if isinstance(prompt, list) and isinstance(row.get(answer), list):
            with taken_by_template(where, prompt + row[answer], "student"):
                tokenizer.apply_chat_template(prompt + row[answer], **options)
    if isinstance(row.get("messages"), list):
        with taken_by_template(where, row["messages"], "student"):
            tokenizer.apply_chat_template(row["messages"], **options)
    return dict(row) if keep else {"rendered": True}


def check_prompts(prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
    """Render the prompts that are conversations.

    Raises:
        ValueError: as `check_templates`. Where there is no template, `encode_prompt` says so.
    """
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and tokenizer.chat_template:
            with taken_by_template(f"Row {index}", prompt, owner):
                tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
