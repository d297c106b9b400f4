"""A judge behind any OpenAI-compatible chat endpoint: cached, retried, bounded in concurrency and cost."""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from hpd.generation.texts import Message

__all__ = ["Judge", "JudgeSettings", "Ruling", "Usage", "tokens_of"]


_CHARACTERS_PER_TOKEN = 4
"""For estimates only; English text in current vocabularies."""


_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


_LONGEST_WAIT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Which judge, and how it is asked."""

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
    """How often the judge is asked for one verdict; each time it is told that its last reply held none."""
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
        """What decides a verdict, for the record of an evaluation."""
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
    """What a judge said about one question."""

    verdict: Any
    """As the parser reads it; None where no reply held one."""
    text: str
    """The last reply."""
    asks: int


@dataclass
class Usage:
    """What a judge has been asked in this process."""

    calls: int = 0
    cached: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class Judge:
    """Asks the endpoint, remembers every reply by the hash of its request.

    Args:
        settings: endpoint and limits.
        progress: gives, for the name of a task, what is called with (verdicts so far, verdicts).

    Raises:
        ValueError: the cache is no file of replies.
    """

    def __init__(
        self, settings: JudgeSettings, progress: Callable[[str], Callable[[int, int], None]] | None = None
    ) -> None:
        self.settings = settings
        self.usage = Usage()
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._cache_file = settings.cache or _default_cache(settings.model)
        self._cache = _read_cache(self._cache_file)
        self._key = os.environ.get(settings.key_env or "OPENAI_API_KEY", "")

    @property
    def cache_file(self) -> Path:
        return self._cache_file

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    def check(self) -> None:
        """One free request, so that a wrong address or key is noticed before hours of generation.

        Raises:
            ConnectionError: nobody answers.
            ValueError: the key is refused.
        """
        base = self.settings.url.rstrip("/").removesuffix("/chat/completions")
        try:
            with self._client() as client:
                status = client.get(f"{base}/models").status_code
        except httpx2.TransportError as error:
            raise ConnectionError(
                f"the judge at {self.settings.url} does not answer ({error}); is it running?"
            ) from None
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
        name: str = "verdicts",
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
        progress = None if self._progress is None else self._progress(name)
        self._stop.clear()
        with self._client() as client, ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = {
                pool.submit(self._rule, client, q, parse, reminder): n for n, q in enumerate(questions)
            }
            try:
                for future in as_completed(futures):
                    rulings[futures[future]] = future.result()
                    if progress is not None:
                        progress(len(rulings), len(questions))
            except BaseException as error:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                if isinstance(error, ConnectionError):
                    # Every reply so far is on disk, also of verdicts that were still under way.
                    kept = f"{len(rulings)} of {len(questions)} verdicts are in {self._cache_file}; run it again to go on"
                    raise ConnectionError(f"{error}; {kept}.") from None
                raise
        return [rulings[number] for number in range(len(questions))]

    def _rule(
        self, client: httpx2.Client, question: list[Message], parse: Callable[[str], Any], reminder: str
    ) -> Ruling:
        messages, text = list(question), ""
        for ask in range(1, self.settings.max_asks + 1):
            text = self._reply(client, messages)
            verdict = parse(text)
            if verdict is not None:
                return Ruling(verdict, text, ask)
            # An empty assistant turn is refused by some servers.
            messages += [
                {"role": "assistant", "content": text or "(no answer)"},
                {"role": "user", "content": reminder},
            ]
        return Ruling(None, text, self.settings.max_asks)

    def _reply(self, client: httpx2.Client, messages: list[Message]) -> str:
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        } | dict(self.settings.extra)
        request = {name: value for name, value in request.items() if value is not None}
        # The address belongs to the key: local servers like to call every model "default".
        content = json.dumps([self.settings.url, request], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(content.encode()).hexdigest()
        with self._lock:
            if key in self._cache:
                self.usage.cached += 1
                return self._cache[key]
        text, tokens_in, tokens_out = self._send(client, request)
        with self._lock:
            self._cache[key] = text
            _append(self._cache_file, {"key": key, "model": self.settings.model, "reply": text})
            self.usage.calls += 1
            self.usage.tokens_in += tokens_in
            self.usage.tokens_out += tokens_out
            cost = self.settings.cost(self.usage.tokens_in, self.usage.tokens_out)
        if cost is not None and self.settings.max_cost is not None and cost > self.settings.max_cost:
            raise ValueError(
                f"the judge has cost {cost:.2f}, above max_cost={self.settings.max_cost:g}; raise it to go "
                "on."
            )
        return text

    def _send(self, client: httpx2.Client, request: dict[str, Any]) -> tuple[str, int, int]:
        """Reply and tokens of one request, retried."""
        url = self.settings.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        problem = ""
        for attempt in range(self.settings.max_retries + 1):
            wait = self.settings.backoff_seconds * 2**attempt * (1 + random.random() / 4)
            try:
                response = client.post(url, json=request)
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    found = _read_reply(response)
                    if found is not None:
                        return found
                    problem = f"status 200 without a chat completion: {response.text[:200]!r}"
                elif response.status_code in _RETRIED:
                    problem = f"status {response.status_code}"
                    wait = _retry_after(response) or wait
                else:
                    said = self._without_key(response.text[:500])
                    raise ValueError(
                        f"the judge at {self.settings.url} refuses (status {response.status_code}): {said}"
                    )
            if attempt < self.settings.max_retries:
                with self._lock:
                    self.usage.retries += 1
                if self._stop.wait(min(wait, _LONGEST_WAIT_SECONDS)):
                    break
        asked = (
            f"after {self.settings.max_retries + 1} attempts"
            if not self._stop.is_set()
            else "when the run stopped"
        )
        raise ConnectionError(
            f"the judge at {self.settings.url} gives no answer {asked} ({self._without_key(problem)})"
        )

    def _client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.settings.concurrency)
        return httpx2.Client(headers=headers, timeout=self.settings.timeout_seconds, limits=limits)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def tokens_of(text: str) -> int:
    """About how many tokens a text has, for estimates."""
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def _read_reply(response: httpx2.Response) -> tuple[str, int, int] | None:
    try:
        body = response.json()
        text = body["choices"][0]["message"].get("content") or ""
        usage = body.get("usage") or {}
        return str(text), int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait; the header holds seconds or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _default_cache(model: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in model)
    return root / "hpd" / "judge" / f"{name}.jsonl"


def _read_cache(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    replies = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line else None
        except ValueError:
            continue  # a line that a kill cut short: its request is sent again
        if entry is None:
            continue
        if not isinstance(entry, dict) or not {"key", "reply"} <= entry.keys():
            raise ValueError(f"{path}: line {number} is no reply of a judge; name another cache file.")
        replies[entry["key"]] = entry["reply"]
    return replies


def _append(path: Path, entry: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and not _ends_line(file):
            file.write(b"\n")
        file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
