"""A judge behind any OpenAI-compatible chat endpoint: cached, bounded in concurrency and cost."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from hpd.config.secrets import check_no_secrets, redact
from hpd.evaluate.task import CannotGrade
from hpd.files import JsonLines, digest_json, whole_characters
from hpd.generation.texts import Message
from hpd.http import (
    BadResponse,
    Connection,
    ServerUnavailable,
    check_url,
    clean_key,
    read_json,
    read_key,
    shown,
)
from hpd.progress import Progress

__all__ = ["Judge", "JudgeSettings", "Ruling", "Usage", "tokens_of"]

_LOGGER = logging.getLogger("hpd")

_CHARACTERS_PER_TOKEN = 4
"""For estimates only; English text in current vocabularies."""
_LONGEST_WAIT_SECONDS = 120.0
_PATH = "/chat/completions"
_DEFAULT_KEY_ENV = "OPENAI_API_KEY"
_MAX_REPLY_BYTES = 16 * 2**20
_MOST_TOKENS = 10**8
"""Of one request; a count above is a mistake of the server."""


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


class Ruling(NamedTuple):
    """A judge's verdict on one question."""

    verdict: Any
    """As the parser reads it; None where no reply held one."""
    text: str
    """The last reply."""
    asks: int


@dataclass
class Usage:
    """Count of a judge's requests in this process."""

    calls: int = 0
    cached: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class Judge:
    """Asks the endpoint, remembers every reply by the hash of its request.

    Args:
        settings: endpoint and limits.
        progress: gets a bar for each task.

    Raises:
        ValueError: the cache is not a file of replies.
    """

    def __init__(self, settings: JudgeSettings, progress: Progress | None = None) -> None:
        self.settings = settings
        self.usage = Usage()
        self._progress = progress or Progress()
        self._usage_missing = False
        self._lock = threading.Lock()
        self._lines = JsonLines(settings.cache or _default_cache(settings.model))
        self._cache = _read_cache(self._lines)
        self._key = _key_of(settings)

    @property
    def cache_file(self) -> Path:
        return self._lines.path

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    def check(self) -> None:
        """One free request, so that a wrong address or key is noticed before hours of generation.

        Raises:
            ConnectionError: nobody answers.
            ValueError: the key is refused.
        """
        connection = self._connect()
        try:
            status = connection.attempt("GET", "/models", max_bytes=_MAX_REPLY_BYTES)[0].status_code
        except (httpx2.RequestError, httpx2.StreamError, OSError, ValueError) as error:
            raise ConnectionError(
                f"the judge at {self.settings.url} does not answer ({connection.explained(error)}); is it "
                "running?"
            ) from None
        finally:
            connection.close()
        if status in (401, 403):
            name = self.settings.key_env or _DEFAULT_KEY_ENV
            todo = f"refuses the key (status {status}); put the right one into {name}."
            if self._key is None:
                todo = (
                    f"wants a key (status {status}); name the environment variable that holds it with "
                    "judge.key_env."
                )
            raise ValueError(f"the judge at {self.settings.url} {todo}")

    def rule(
        self,
        questions: Sequence[list[Message]],
        parse: Callable[[str], Any],
        reminder: str,
        name: str = "judge",
    ) -> list[Ruling]:
        """The judge's verdicts, in the order of the questions.

        A reply that `parse` reads nothing in is answered with `reminder`, at most `max_asks` times in all;
        what then still is no verdict comes back as None.

        Raises:
            ConnectionError: the judge stopped answering; what it said so far is in the cache, so that a
                repeated run goes on.
            ValueError: it refuses the request, or the cost passes `max_cost`.
        """
        rulings: dict[int, Ruling] = {}
        bar = self._progress.bar(f"{name} verdicts")
        connection = self._connect()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = {
                pool.submit(self._rule, connection, question, parse, reminder): number
                for number, question in enumerate(questions)
            }
            try:
                for future in as_completed(futures):
                    rulings[futures[future]] = future.result()
                    bar(len(rulings), len(questions))
            except BaseException as error:
                connection.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                if not isinstance(error, ServerUnavailable):
                    raise
                if error.final:
                    raise CannotGrade(str(error)) from None
                # Every reply so far is on disk, also of verdicts that were still under way.
                kept = f"{len(rulings)} of {len(questions)} verdicts are in {self.cache_file}"
                raise ConnectionError(f"{error}; {kept}; run it again to continue.") from None
            finally:
                connection.close()
                self.usage.retries += connection.num_retries
        return [rulings[number] for number in range(len(questions))]

    def _rule(
        self, connection: Connection, question: list[Message], parse: Callable[[str], Any], reminder: str
    ) -> Ruling:
        messages = list(question)
        text = ""
        for ask in range(1, self.settings.max_asks + 1):
            text = self._reply(connection, messages)
            verdict = parse(text)
            if verdict is not None:
                return Ruling(verdict, text, ask)
            # An empty assistant turn is refused by some servers.
            messages += [
                {"role": "assistant", "content": whole_characters(text) or "(no answer)"},
                {"role": "user", "content": reminder},
            ]
        return Ruling(None, text, self.settings.max_asks)

    def _reply(self, connection: Connection, messages: list[Message]) -> str:
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        } | dict(self.settings.extra)
        request = {name: value for name, value in request.items() if value is not None}
        # The address belongs to the key: local servers like to call every model "default".
        key = digest_json([self.settings.url, request], ensure_ascii=False)
        with self._lock:
            if key in self._cache:
                self.usage.cached += 1
                return self._cache[key]
        text, usage = connection.request("POST", _PATH, _read_reply, json=request, max_bytes=_MAX_REPLY_BYTES)
        tokens_in = self._tokens(usage, "prompt_tokens", "".join(m["content"] for m in messages))
        tokens_out = self._tokens(usage, "completion_tokens", text)
        with self._lock:
            self._cache[key] = text
            self.cache_file.parent.mkdir(parents=True, exist_ok=True)
            self._lines.append({"key": key, "model": self.settings.model, "reply": text})
            self.usage.calls += 1
            self.usage.tokens_in += tokens_in
            self.usage.tokens_out += tokens_out
            cost = self.settings.cost(self.usage.tokens_in, self.usage.tokens_out)
        if cost is not None and self.settings.max_cost is not None and cost > self.settings.max_cost:
            raise CannotGrade(
                f"the judge has cost {cost:.2f}, above max_cost={self.settings.max_cost:g}; raise it to "
                "continue."
            )
        return text

    def _tokens(self, usage: Any, name: str, text: str) -> int:
        """Tokens that the judge says it counted; estimated from the text where it says nothing that can be,
        so that `max_cost` holds all the same."""
        count = usage.get(name) if isinstance(usage, Mapping) else None
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= _MOST_TOKENS:
            return count
        with self._lock:
            first, self._usage_missing = not self._usage_missing, True
        if first:
            _LOGGER.warning(
                "the judge at %s says usage.%s is %s: tokens are counted from here on as %d characters each "
                "where it gives no possible number",
                self.settings.url,
                name,
                redact(shown(count)),
                _CHARACTERS_PER_TOKEN,
            )
        return tokens_of(text)

    def _connect(self) -> Connection:
        base = self.settings.url.rstrip("/").removesuffix(_PATH)
        return Connection(
            base,
            name="The judge",
            api_key=self._key,
            hide=redact,
            timeout_seconds=self.settings.timeout_seconds,
            wait_seconds=self.settings.max_retries * (self.settings.timeout_seconds + _LONGEST_WAIT_SECONDS),
            max_attempts=self.settings.max_retries + 1,
            first_pause_seconds=self.settings.backoff_seconds,
            connections=self.settings.concurrency,
        )


def tokens_of(text: str) -> int:
    """About how many tokens a text has, for estimates."""
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _key_of(settings: JudgeSettings) -> str | None:
    """The key that the settings name; OpenAI's goes unasked to nobody else."""
    if settings.key_env is not None:
        return read_key(settings.key_env, "judge.key_env")
    text = os.environ.get(_DEFAULT_KEY_ENV, "")
    if not text.strip():
        return None
    if not _is_openai(settings.url):
        _LOGGER.warning(
            "%s is not sent to the judge at %s, which is not OpenAI's address: where that server takes this "
            "key, say so with judge.key_env=%s",
            _DEFAULT_KEY_ENV,
            settings.url,
            _DEFAULT_KEY_ENV,
        )
        return None
    return clean_key(text, f"the environment variable {_DEFAULT_KEY_ENV}")


def _is_openai(url: str) -> bool:
    """True for api.openai.com and its regions (eu.api.openai.com), over TLS."""
    parts = httpx2.URL(url)
    return parts.scheme == "https" and f".{parts.host}".endswith(".api.openai.com")


def _read_reply(response: Any, content: bytes) -> tuple[str, Any]:
    """Reply and usage of a chat completion."""
    body = read_json(content)
    try:
        text = body["choices"][0]["message"].get("content")
        if isinstance(text, list):  # in parts, as some servers send it
            text = "".join(part["text"] for part in text if part["type"] == "text")
        usage = body.get("usage")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadResponse(f"not a chat completion: {shown(content[:200].decode(errors='replace'))}") from None
    if text is not None and not isinstance(text, str):
        raise BadResponse(f"the reply's content is of type {type(text).__name__}")
    return text or "", usage


def _default_cache(model: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in model)
    return root / "hpd" / "judge" / f"{name}.jsonl"


def _read_cache(lines: JsonLines) -> dict[str, str]:
    replies = {}
    for entry in lines.read():
        if not isinstance(entry, dict) or not {"key", "reply"} <= entry.keys():
            raise CannotGrade(
                f"{lines.path} holds {str(entry)[:80]!r}, not a judge's reply; name another file."
            )
        replies[entry["key"]] = entry["reply"]
    return replies
