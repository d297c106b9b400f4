"""Keys and passwords: not in recipes, which run folders keep, and not in what is printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["check_no_secrets", "redact", "redact_tree"]

REDACTED = "***"

# hub_token, api_key, client-secret; not eos_token, max_new_tokens, tokenizer, or api_key_env, which names a
# variable.
_NAMES = re.compile(
    r"(?i)(^|[_\-.])(hub_token|auth_token|access_token|api_?key|secret(_key)?|password|passwd|bearer)$"
    r"|^token$"
)

_VARIABLES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD)(_[A-Z0-9]+)?$")

# Prefixes that the services give their keys, so that nobody uses them for anything else.
_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}"
    r"|xox[bp]-[\w\-]{20,}|AKIA[0-9A-Z]{16}|wandb_v\d_[A-Za-z0-9_]{20,})"
)

_IN_URL = re.compile(r"(?<=://)([^/\s@'\"]+)@")

# Characters of a variable's value that are looked for in text: shorter ones would redact ordinary words.
_LEAST = 8


def check_no_secrets(tree: Mapping[str, Any]) -> None:
    """Refuse a recipe that holds a key or a password; the message does not repeat it.

    Raises:
        ValueError: a field named like a secret, a value with the shape of a service's key, an address with a
            password, or the value of an environment variable such as HF_TOKEN.
    """
    for path, value in _strings(tree):
        why = _why_secret(path.rpartition(".")[2], value)
        if why:
            raise ValueError(
                f"{path} {why}, and run folders keep recipes. Remove it: the Hub reads HF_TOKEN (or `hf auth "
                "login`), Weights & Biases WANDB_API_KEY, and servers the variable that their api_key_env "
                "or key_env names."
            )


def _why_secret(name: str, value: str) -> str | None:
    if _NAMES.search(name):
        return "is a secret"
    if _IN_URL.search(value):
        return "holds an address with a user name or password"
    return "holds what looks like an access key" if redact(value) != value else None


def redact(text: str) -> str:
    """`text` without access keys, passwords in addresses, and values of secret environment variables."""
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    return _SHAPES.sub(REDACTED, _IN_URL.sub(f"{REDACTED}@", text))


def redact_tree(tree: Any, name: str = "") -> Any:
    """Plain data with every secret in it replaced."""
    if isinstance(tree, Mapping):
        return {key: redact_tree(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return [redact_tree(value, name) for value in tree]
    if isinstance(tree, str):
        return REDACTED if tree and _NAMES.search(name) else redact(tree)
    return tree


def _environment_secrets() -> list[str]:
    found = {value for name, value in os.environ.items() if _VARIABLES.search(name) and len(value) >= _LEAST}
    return sorted(found, key=len, reverse=True)


def _strings(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, Sequence) and not isinstance(tree, (str, bytes)):
        for i, value in enumerate(tree):
            yield from _strings(value, f"{path}.{i}")
    elif isinstance(tree, str) and tree:
        yield path, tree
