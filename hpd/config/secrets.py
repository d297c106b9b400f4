"""Keys and passwords: not in recipes, which run folders keep, and not in what is printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["check_no_secrets", "redact", "redact_tree"]

REDACTED = "***"

# What a key or password is called, as the last words of a name: hub_token, x-api-key, client_secret,
# aws_secret_access_key, db.pwd; not eos_token, max_new_tokens, tokenizer, key, or api_key_env, which names a
# variable.
_WORDS = (
    r"(?:hub|hf|auth|access|refresh|session|bearer|api|bot|secret|security|id)_?token"
    r"|(?:api|access|secret|private|account|subscription|signing|encryption|ssh|auth)_?key(?:_?id)?"
    r"|secret|client_?secret|password|passwd|passphrase|pwd|bearer|authorization|credentials?|cookie"
)
_NAMES = re.compile(rf"(?i)(?:^|_)(?:{_WORDS})$")

# Names of environment variables; PWD and OLDPWD are folders.
_VARIABLES = re.compile(
    r"(?i)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|CONNECTION_STRING|(?:^|_)PASS|[A-Z0-9]_PWD"
    r"|(?:^|[A-Z0-9]_?)KEY)(?:_?ID)?(?:_[A-Z0-9]+)?$"
)

# Prefixes that the services give their keys, so that nobody uses them for anything else.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}"
    r"|glpat-[A-Za-z0-9_\-]{20,}|xox[abeprs]-[\w\-]{10,}"
    r"|A[KS]IA[0-9A-Z]{16}|AIza[A-Za-z0-9_\-]{30,}|ya29\.[A-Za-z0-9_\-]{20,}|gsk_[A-Za-z0-9]{20,}"
    r"|nvapi-[A-Za-z0-9_\-]{20,}|xai-[A-Za-z0-9]{20,}|csk-[A-Za-z0-9]{20,}|pplx-[A-Za-z0-9]{20,}"
    r"|r8_[A-Za-z0-9]{20,}|tgp_v1_[A-Za-z0-9_\-]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_\-]{30,}"
    r"|wandb_v\d_[A-Za-z0-9_]{20,}|SG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{16,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
    re.DOTALL,
)

# A JSON web token: runs of these characters with points between them. Of a run only its first "eyJ" is looked
# at, since all that follow end where it ends: a run that holds many is read once, not once for each.
_WEB_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_\-])((?:(?!\beyJ[A-Za-z0-9_\-]{8})[A-Za-z0-9_\-])*+)"
    r"eyJ[A-Za-z0-9_\-]{8,}+\.eyJ[A-Za-z0-9_\-]{4,}+\.[A-Za-z0-9_\-]*"
)

# After the scheme up to the last @ before the path: a password may hold an @ itself.
_IN_URL = re.compile(r"(?<=://)[^/\s'\"?#]+@")

# A parameter of an address: ?api_key=..., &X-Amz-Signature=..., and the header that carries a key.
_IN_QUERY = re.compile(
    rf"(?i)(?<=[?&;#])((?:[a-z0-9]+[_\-])*(?:{_WORDS.replace('_?', '[_-]?')}|key|token|auth|sig|signature)=)"
    r"[^&;#\s'\"]+"
)
_IN_HEADER = re.compile(r"(?i)\b((?:bearer|basic)\s+)(?=[^\s'\"]*\d)[A-Za-z0-9+/=_\-.~]{16,}")

# Characters of a variable's value that are looked for in text: shorter ones would redact ordinary words.
_LEAST = 8


def check_no_secrets(tree: Mapping[str, Any]) -> None:
    """Refuse a recipe that holds a key or a password; the message does not repeat it.

    Raises:
        ValueError: a field named like a secret (or anything inside one), a value with the shape of a
            service's key, an address with a password or a key in its query, or the value of an environment
            variable such as HF_TOKEN.
    """
    values = _environment_secrets()
    for path, value in _leaves(tree):
        why = _why_secret(path, value, values)
        if why:
            raise ValueError(
                f"{_redact('.'.join(path), values)} {why}, and run folders keep recipes. Remove it: the Hub "
                "reads HF_TOKEN (or `hf auth login`), Weights & Biases WANDB_API_KEY, and servers the "
                "variable that their api_key_env or key_env names."
            )


def _why_secret(path: Sequence[str], value: Any, values: Sequence[str]) -> str | None:
    if any(_is_secret(name, value) for name in path):
        return "is a secret"
    text = str(value)
    if _IN_URL.search(text):
        return "holds an address with a user name or password"
    if _IN_QUERY.search(text):
        return "holds an address with a key in its query"
    found = any(_redact(part, values) != part for part in (text, *path))
    return "holds what looks like an access key" if found else None


def _is_secret(name: str, value: Any) -> bool:
    """Whether a field's name says that it holds a secret; a dotted one names fields inside each other."""
    if name == "token":  # a number is the id of a word
        return isinstance(value, str)
    return any(_NAMES.search(part.replace("-", "_")) for part in _snake(name).split("."))


def _snake(name: str) -> str:
    """apiKey, as api_Key."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)


def redact(text: str) -> str:
    """`text` without access keys, passwords and keys in addresses, and values of secret environment
    variables."""
    return _redact(text, _environment_secrets())


def _redact(text: str, values: Sequence[str]) -> str:
    for value in values:
        text = text.replace(value, REDACTED)
    text = _IN_QUERY.sub(rf"\g<1>{REDACTED}", _IN_URL.sub(f"{REDACTED}@", text))
    text = _WEB_TOKEN.sub(rf"\g<1>{REDACTED}", _IN_HEADER.sub(rf"\g<1>{REDACTED}", text))
    return _SHAPES.sub(REDACTED, text)


def redact_tree(tree: Any) -> Any:
    """Plain data with every secret in it replaced."""
    return _redact_tree(tree, False, _environment_secrets())


def _redact_tree(tree: Any, secret: bool, values: Sequence[str]) -> Any:
    if isinstance(tree, Mapping):
        return {
            _redact(key, values) if isinstance(key, str) else key: _redact_tree(
                value, secret or _is_secret(str(key), value), values
            )
            for key, value in tree.items()
        }
    if isinstance(tree, Sequence) and not isinstance(tree, (str, bytes)):
        return [_redact_tree(value, secret, values) for value in tree]
    if secret and _holds(tree):
        return REDACTED
    return _redact(tree, values) if isinstance(tree, str) else tree


def _environment_secrets() -> list[str]:
    """Values of secret variables, the longest first; read once for a whole tree, since finding them takes
    longer than using them."""
    values = (value.strip() for name, value in os.environ.items() if _VARIABLES.search(name))
    # The path of a file of keys is none.
    found = {value for value in values if len(value) >= _LEAST and not os.path.exists(value)}
    return sorted(found, key=len, reverse=True)


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Texts and numbers, with the names and places that lead to them."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(tree, Sequence) and not isinstance(tree, (str, bytes)):
        for i, value in enumerate(tree):
            yield from _leaves(value, (*path, str(i)))
    elif _holds(tree):
        yield path, tree


def _holds(value: Any) -> bool:
    """Whether a leaf says anything: a password may be a number, and is neither null nor a switch."""
    return value is not None and not isinstance(value, bool) and value != ""
