"""A judge behind any OpenAI-compatible chat endpoint: cached, bounded in concurrency and cost."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from hpd.evaluate.task import CannotGrade
from hpd.files import JsonLines, digest_json, whole_characters
from hpd.generation.texts import Message
from hpd.http import BadResponse, Connection, ServerUnavailable
from hpd.progress import Progress

__all__ = ["Judge", "JudgeSettings", "Ruling", "Usage", "tokens_of"]

_CHARACTERS_PER_TOKEN = 4
"""For estimates only; English text in current vocabularies."""
_LONGEST_WAIT_SECONDS = 120.0
_PATH = "/chat/completions"


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """A judge, and the way it is asked."""

    url: str
    """Base of an OpenAI-compatible API, such as http://localhost:8000/v1; or the whole address of its chat
    completions."""
    model: str
    """The judge's name at that endpoint."""
    key_env: str | None = None
    """Environment variable that holds the key; None: OPENAI_API_KEY where it is set. The key is never stored
    or shown."""
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
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge_url is {self.url!r}; give an address such as http://localhost:8000/v1.")
        for name in ("concurrency", "max_asks", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("the cost needs both prices: give price_in and price_out, per million tokens.")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError(
                "max_cost has no effect without prices: give price_in and price_out, per million tokens."
            )
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ValueError(
                f"the environment variable {self.key_env} is not set; it should hold the judge's key."
            )

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
        self._lock = threading.Lock()
        self._lines = JsonLines(settings.cache or _default_cache(settings.model))
        self._cache = _read_cache(self._lines)
        self._key = os.environ.get(settings.key_env or "OPENAI_API_KEY", "")

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
            status = connection.attempt("GET", "/models")[0].status_code
        except (httpx2.TransportError, OSError) as error:
            raise ConnectionError(
                f"the judge at {self.settings.url} does not answer ({error}); is it running?"
            ) from None
        finally:
            connection.close()
        if status in (401, 403):
            name = self.settings.key_env or "OPENAI_API_KEY"
            raise ValueError(
                f"the judge at {self.settings.url} refuses the key (status {status}); put the right one into "
                f"{name}."
            )

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
                raise ConnectionError(f"{error}; {kept}; run it again to go on.") from None
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
        text, tokens_in, tokens_out = connection.request(
            "POST", _PATH, _read_reply, json=request, max_bytes=2**26
        )
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
                f"the judge has cost {cost:.2f}, above max_cost={self.settings.max_cost:g}; raise it to go "
                "on."
            )
        return text

    def _connect(self) -> Connection:
        base = self.settings.url.rstrip("/").removesuffix(_PATH)
        return Connection(
            base,
            name="The judge",
            api_key=self._key or None,
            timeout_seconds=self.settings.timeout_seconds,
            wait_seconds=self.settings.max_retries * (self.settings.timeout_seconds + _LONGEST_WAIT_SECONDS),
            max_attempts=self.settings.max_retries + 1,
            first_pause_seconds=self.settings.backoff_seconds,
            connections=self.settings.concurrency,
        )


def tokens_of(text: str) -> int:
    """About how many tokens a text has, for estimates."""
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def _read_reply(response: Any, content: bytes) -> tuple[str, int, int]:
    """Reply and tokens of a chat completion."""
    try:
        body = json.loads(content)
        text = body["choices"][0]["message"].get("content") or ""
        usage = body.get("usage") or {}
        return str(text), int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise BadResponse(f"not a chat completion: {content[:200]!r}") from None


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
