"""From a model's answer to a program: fenced blocks, prose around code, bodies that continue a prompt, cut answers."""

import re
import textwrap
import warnings
from collections.abc import Iterator
from typing import NamedTuple

_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = {"", "python", "python3", "py", "python2", "py3"}
_CODE_START = re.compile(r"^(?:import |from \w[\w.]* import |def |async def |class |@\w)")
_THINKING_END = "</think>"
_MAX_TRIMS = 100  # ends tried of a text that is not Python as a whole
_MAX_CODE_CHARS = 200_000  # longer than any solution; Python's parser is slow on what loops


class _Block(NamedTuple):
    code: str
    language: str


def extract_program(text: str, entry_point: str, prompt: str = "") -> str | None:
    """The program in an answer, ready to run; None where there is no code.

    Of several fenced blocks the last that defines `entry_point` counts, else the longest. Without fences, the code is what
    lies between the first line that starts like Python and the last line up to which all parses. What a prompt in Python
    brings (imports, helpers, the head of the function) is put before code that lacks it.

    Args:
        text: the answer; what precedes ``</think>`` is dropped.
        entry_point: the function that the tests call.
        prompt: the prompt where it is Python that ends in the head of the function (HumanEval), else empty.
    """
    text = text.rpartition(_THINKING_END)[2].replace("\r\n", "\n")
    code = _best_block(text, entry_point)
    if code is None:
        code = _code_in_prose(text) if not _continues(text, prompt) else text
    if code is None or not code.strip():
        return None
    if _defines(code, entry_point):
        return _preamble(prompt, entry_point) + code
    if prompt:
        return complete(prompt, code)
    return code


def complete(prompt: str, body: str) -> str:
    """A prompt in Python and its continuation; a body that lost its indentation, or that of its first line, gets it back."""
    for restored in (body, "    " + body.lstrip(), textwrap.indent(textwrap.dedent(body), "    ")):
        if _parses(prompt + restored):
            return prompt + restored
    return _longest_prefix(prompt + body, keep=len(prompt.split("\n"))) or prompt + body


def _best_block(text: str, entry_point: str) -> str | None:
    blocks = list(_blocks(text))
    candidates = [block.code for block in blocks if block.language in _PYTHON] or [block.code for block in blocks]
    if not candidates:
        return None
    defining = [code for code in candidates if _defines(code, entry_point)]
    return defining[-1] if defining else max(candidates, key=len)


def _blocks(text: str) -> Iterator[_Block]:
    """Fenced blocks; one that is never closed reaches to the end, as far as it is Python."""
    position = 0
    while opening := _FENCE.search(text, position):
        mark = opening["mark"]
        closing = re.compile(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE).search(text, opening.end())
        code = textwrap.dedent(text[opening.end() + 1 : closing.start() if closing else len(text)])
        yield _Block(code if closing else (_longest_prefix(code) or code), opening["language"].lower())
        position = closing.end() if closing else len(text)


def _code_in_prose(text: str) -> str | None:
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if _CODE_START.match(line):
            found = _longest_prefix("\n".join(lines[number:]))
            if found is not None:
                return found
    return None


def _continues(text: str, prompt: str) -> bool:
    """Whether the answer is the rest of the prompt's function: it starts indented and parses behind it."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    return bool(prompt) and first[:1] in (" ", "\t") and (_longest_prefix(prompt + text, len(prompt.split("\n"))) is not None)


def _longest_prefix(code: str, keep: int = 1) -> str | None:
    """The longest prefix, in whole lines and of at least `keep`, that is Python."""
    lines = code.split("\n")
    end = len(lines)
    for _ in range(_MAX_TRIMS):
        if end < keep:
            break
        candidate = "\n".join(lines[:end])
        error_line = _error_line(candidate)
        if error_line is None:
            return candidate if candidate.strip() else None
        end = min(end, error_line) - 1  # what ends at the error or behind it has the error too
    return None


def _defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE)
        is not None
    )


def _preamble(prompt: str, entry_point: str) -> str:
    """The imports and helpers above the function's head."""
    match = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: match.start()] if match else ""


def _parses(code: str) -> bool:
    return _error_line(code) is None


def _error_line(code: str) -> int | None:
    """None where the code is Python, else the line that is not, from 1."""
    last = code.count("\n") + 1
    if len(code) > _MAX_CODE_CHARS:
        return last
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            compile(code, "<answer>", "exec", dont_inherit=True)  # more than parsing: a return needs its function
    except SyntaxError as error:
        return error.lineno or last
    except (ValueError, RecursionError, MemoryError):
        return last
    return None
