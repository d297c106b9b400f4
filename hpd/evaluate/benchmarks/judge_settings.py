"""Which judge is asked, how, and with which key."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from hpd.config.secrets import check_no_secrets
from hpd.http import check_url, clean_key, read_key, shown

__all__ = ["DEFAULT_KEY_ENV", "JudgeSettings", "key_of"]

_LOGGER = logging.getLogger("hpd")

DEFAULT_KEY_ENV = "OPENAI_API_KEY"
"""Read unasked, for OpenAI's own address."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """A judge, and the way it is asked."""

    url: str
    """Base of an OpenAI-compatible API, such as http://localhost:8000/v1; or the whole address of its chat
    completions."""
    model: str
    """The judge's name at that endpoint."""
    key_env: str | None = None
    """Environment variable that holds the key; None: OPENAI_API_KEY for OpenAI's own address, no key for any
    other. The key is never stored or shown."""
    temperature: float = 0.0
    max_tokens: int = 2048
    """Longest reply."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request; null removes one (``{"max_tokens": null, "max_completion_tokens":
    4096}``)."""
    concurrency: int = 8
    """Requests at a time."""
    timeout_seconds: float = 180.0
    max_retries: int = 6
    """Of one request, after 429, 5xx, time-outs and broken connections."""
    backoff_seconds: float = 1.0
    """First wait before a retry, doubled each time; a Retry-After of the server goes before it."""
    max_asks: int = 3
    """Most requests for one verdict; each time it is told that its last reply held none."""
    cache: Path | None = None
    """File of replies; None: a file per judge in the user's cache folder."""
    price_in: float | None = None
    """Per million prompt tokens, in any currency; None: unknown."""
    price_out: float | None = None
    """Per million reply tokens."""
    max_cost: float | None = None
    """Refuse to start where the estimate is above this, and stop where the sum is."""

    def __post_init__(self) -> None:
        check_url(self.url, "judge_url", "judge.key_env")
        try:
            json.dumps([self.model, dict(self.extra)], allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"judge_model and judge.extra must be JSON: {shown(error)}.") from None
        check_no_secrets({"judge_url": self.url, "judge_model": self.model, "judge.extra": dict(self.extra)})
        least = {
            "concurrency": 1,
            "max_asks": 1,
            "max_tokens": 1,
            "max_retries": 0,
            "backoff_seconds": 0.0,
            "temperature": 0.0,
            "price_in": 0.0,
            "price_out": 0.0,
            "max_cost": 0.0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            # A price that is NaN would let every cost through.
            if value is not None and not (_is_number(value) and low <= value < math.inf):
                raise ValueError(f"{name} is {value}; it must be {low:g} or more.")
        if not (_is_number(self.timeout_seconds) and 0 < self.timeout_seconds < math.inf):
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; it must be above 0.")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("the cost needs both prices: give price_in and price_out, per million tokens.")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError(
                "max_cost has no effect without prices: give price_in and price_out, per million tokens."
            )
        read_key(self.key_env, "judge.key_env")

    def identity(self) -> dict[str, Any]:
        """Everything that decides a verdict, for the record of an evaluation."""
        return {
            "judge_url": self.url,
            "judge_model": self.model,
            "judge_temperature": self.temperature,
            "judge_max_tokens": self.max_tokens,
            "judge_max_asks": self.max_asks,
            "judge_extra": dict(self.extra),
        }

    def cost(self, tokens_in: float, tokens_out: float) -> float | None:
        """Price of so many tokens; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def key_of(settings: JudgeSettings) -> str | None:
    """The key that the settings name, None for no key; OpenAI's goes unasked to nobody else."""
    if settings.key_env is not None:
        return read_key(settings.key_env, "judge.key_env")
    text = os.environ.get(DEFAULT_KEY_ENV, "")
    if not text.strip():
        return None
    if not _is_openai(settings.url):
        _LOGGER.warning(
            "%s is not sent to the judge at %s, which is not OpenAI's address: where that server takes this "
            "key, say so with judge.key_env=%s",
            DEFAULT_KEY_ENV,
            settings.url,
            DEFAULT_KEY_ENV,
        )
        return None
    return clean_key(text, f"the environment variable {DEFAULT_KEY_ENV}")


def _is_openai(url: str) -> bool:
    """True for api.openai.com and its regions (eu.api.openai.com), over TLS."""
    parts = httpx2.URL(url)
    return parts.scheme == "https" and f".{parts.host}".endswith(".api.openai.com")
