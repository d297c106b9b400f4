"""What comes from a user's environment or from a stranger's server, held to what it can be."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import httpx2

__all__ = ["BadResponse", "check_url", "clean_key", "read_json", "read_key", "shown", "without_key"]

# Characters of a key that tell it: fewer in a row may be a word.
_TELLING = 8
# With fewer letters and digits than this, a key is taken out as it is only.
_FEWEST_LETTERS = 4


class BadResponse(ValueError):
    """The server responded, and the response cannot be right."""


def clean_key(text: str, what: str) -> str:
    """A key without the white space around it, which files and secret stores leave there.

    Args:
        text: as it was read.
        what: holds it, in messages, which never repeat it.

    Raises:
        ValueError: it is empty, or holds what a header cannot carry: anything but visible ASCII.
    """
    key = text.strip().strip("\ufeff\u200b")
    if not key:
        raise ValueError(f"{what} is empty: put the key into it, without quotes or line breaks.")
    wrong = re.search("[^!-~]", key)
    if wrong:
        raise ValueError(
            f"{what} holds a character that no key has (U+{ord(wrong[0]):04X}, at place {wrong.start() + 1} "
            f"of {len(key)}): a key is one word of ASCII letters, digits and signs. Put nothing else into it."
        )
    return key


def read_key(name: str | None, field: str = "api_key_env") -> str | None:
    """The key in the environment variable `name`, cleaned; None without a name.

    Args:
        field: of the recipe or command line that names the variable.

    Raises:
        ValueError: it is no variable's name, or not set, or holds what `clean_key` refuses.
    """
    if name is None:
        return None
    # A key in the place of its variable's name is not shown: the message may end up in a log.
    if not isinstance(name, str) or not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
        raise ValueError(
            f"{field} must name an environment variable in capitals, such as TEACHER_API_KEY, not be a key."
        )
    text = os.environ.get(name, "")
    if not text:
        raise ValueError(
            f"{field} names the environment variable {name}, which is not set: export it, or remove the "
            "field."
        )
    return clean_key(text, f"the environment variable {name}")


def check_url(url: Any, where: str, keys: str = "api_key_env") -> None:
    """Hold an address to what paths can be added to: http or https, a host, and no secret in it.

    Args:
        where: the field or option that gives it.
        keys: the field or option that names the environment variable of a key.

    Raises:
        ValueError: anything else; a secret in it is not repeated.
    """
    example = (
        f"{where} must be the server's base address: give an address such as http://127.0.0.1:8765, without "
        "a query"
    )
    text = url if isinstance(url, str) else ""
    authority = re.split(r"[/?#\\]", text.split("://", 1)[-1])[0]
    if "@" in authority:
        raise ValueError(
            f"{where} holds a user name or password, which run folders would keep: put a key into an "
            f"environment variable and name it in {keys}."
        )
    if "?" in text or "#" in text:
        raise ValueError(
            f"{example}: what follows ? or # would be kept in run folders. A key belongs into the "
            f"environment variable that {keys} names."
        )
    if re.search(r"[\s\\]", text) or not text.isprintable():
        raise ValueError(f"{example}: it holds white space, a backslash or a control character.")
    try:
        parts = httpx2.URL(text)
        if not 0 <= (parts.port or 0) < 2**16:
            raise ValueError("no such port")
    except (httpx2.InvalidURL, ValueError):  # its message would repeat what may be a password
        raise ValueError(f"{where} is not an address: its host or port cannot be read.") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"{example}.")


def read_json(body: bytes) -> Any:
    """A JSON body.

    It must be UTF-8, whatever charset its header names (RFC 8259, section 8.1). Half of a surrogate pair,
    which a server that cuts a text may send and no file or header can hold, is replaced by U+FFFD.

    Raises:
        BadResponse: it is not JSON, nested too deep, or in another charset.
    """
    try:
        text = body.decode("utf-8-sig")
        found = json.loads(text)
        return _without_halves(found) if re.search(r"\\u[dD][89a-fA-F]", text) else found
    except UnicodeDecodeError:
        raise BadResponse(f"{len(body)} bytes that are not UTF-8, as JSON must be") from None
    except (ValueError, RecursionError):
        raise BadResponse(f"{len(body)} bytes that are not JSON") from None


def _without_halves(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {_without_halves(name): _without_halves(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_without_halves(value) for value in tree]
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", tree) if isinstance(tree, str) else tree


def shown(value: Any, most: int = 100) -> str:
    """A stranger's value in a message: one line of printable characters, cut."""
    text = " ".join(str(value)[: 10 * most].split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:most]


def without_key(text: str, key: str) -> str:
    """`text` with ``[key]`` for a key, escaped (for JSON, an address, HTML), broken or cut as it may be.

    Letters and digits alone are compared, in either case: every stretch with eight in a row that the key has
    in a row as well, or with all of a shorter key's, is taken out.
    """
    wanted = "".join(letter for _, letter in _letters(key))
    if len(wanted) < _FEWEST_LETTERS:
        return text.replace(key, "[key]")
    size = min(_TELLING, len(wanted))
    pieces = {wanted[i : i + size] for i in range(len(wanted) - size + 1)}
    letters = _letters(text)
    told = "".join(letter for _, letter in letters)
    parts: list[str] = []
    end = 0  # of the last stretch that is not shown
    for i in range(len(told) - size + 1):
        if told[i : i + size] in pieces:
            first = letters[i][0]
            if first > end or not parts:
                parts.append(text[end:first])
            end = letters[i + size - 1][0] + 1
    return "[key]".join([*parts, text[end:]])


def _letters(text: str) -> list[tuple[int, str]]:
    """Places of the letters and digits of a text, and these in lower case."""
    return [(i, c.lower()) for i, c in enumerate(text) if c.isascii() and c.isalnum()]
