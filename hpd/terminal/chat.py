"""`hpd chat`: a conversation with a model, in the terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from hpd.evaluate.command import check_dtype, load_on_device
from hpd.generation.engine import Request, TransformersEngine, encode_prompt
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Message
from hpd.progress import quiet_libraries
from hpd.terminal.console import console, remarks

__all__ = ["run_chat"]


def run_chat(model: str, settings: GenerationSettings, dtype: str) -> None:
    """Answer each line of standard input, with the conversation so far before it.

    A model without a chat template continues each line as plain text, on its own: it knows no turns.

    Raises:
        ValueError: a model that cannot be loaded, or a conversation that leaves no room for an answer.
    """
    check_dtype(dtype)
    quiet_libraries()
    engine = TransformersEngine(*load_on_device(model, dtype))
    talks = bool(engine.tokenizer.chat_template)
    if sys.stdin.isatty():
        kind = (
            "/new begins another conversation" if talks else "no chat template: each line is continued alone"
        )
        remarks.print(f"{model}: {kind}; an empty line ends.", highlight=False, markup=False)
    turns: list[Message] = []
    for count, line in enumerate(_lines()):
        if line == "/new":
            turns = []
            continue
        turns = [*(turns if talks else ()), {"role": "user", "content": line}]
        text, finished = _answer(engine, turns if talks else line, settings, count)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        if not finished:
            remarks.print(
                f"(cut at --max-new-tokens {settings.max_new_tokens})", highlight=False, markup=False
            )
        turns = [*turns, {"role": "assistant", "content": text}]


def _lines() -> Iterator[str]:
    """Lines of standard input, up to its end or an empty one."""
    while True:
        try:
            # The prompt goes where a pipe does not read it.
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
        except EOFError:
            return
        if not line.strip():
            return
        yield line.strip()


def _answer(
    engine: TransformersEngine, prompt: str | list[Message], settings: GenerationSettings, count: int
) -> tuple[str, bool]:
    """The reply, and whether the model ended it."""
    tokens = encode_prompt(engine.tokenizer, prompt, settings)
    limit = settings.max_new_tokens
    if engine.context is not None:
        limit = min(limit, engine.context - len(tokens))
    if limit < 1:
        raise ValueError(
            f"The conversation has {len(tokens)} tokens and the model reads {engine.context}: begin another "
            "one with /new."
        )
    (answer,) = engine.generate([Request(tokens, (settings.seed, count, 0, 0))], settings, limit)
    return answer.text, answer.finish_reason == "stop"
