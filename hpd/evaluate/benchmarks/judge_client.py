"""A judge behind any OpenAI-compatible chat endpoint: cached, bounded in concurrency and cost."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from hpd.config.secrets import redact
from hpd.evaluate.benchmarks.judge_settings import DEFAULT_KEY_ENV, JudgeSettings, key_of
from hpd.evaluate.task import CannotGrade
from hpd.files import JsonLines, digest_json, whole_characters
from hpd.generation.texts import Message
from hpd.http import BadResponse, Connection, ServerUnavailable, read_json, shown
from hpd.progress import Progress

__all__ = ["Judge", "Ruling", "Usage", "tokens_of"]

_LOGGER = logging.getLogger("hpd")

_CHARACTERS_PER_TOKEN = 4
"""For estimates only; English text in current vocabularies."""
_LONGEST_WAIT_SECONDS = 120.0
_PATH = "/chat/completions"
_MAX_REPLY_BYTES = 16 * 2**20
_MOST_TOKENS = 10**8
"""Of one request; a count above is a mistake of the server."""


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
        self._key = key_of(settings)

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
            name = self.settings.key_env or DEFAULT_KEY_ENV
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
        # Rows and models may hold half a character, which no request can.
        messages = [{**message, "content": whole_characters(message["content"])} for message in question]
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
    try:
        lines.path.parent.mkdir(parents=True, exist_ok=True)
        entries = lines.read()
        lines.path.open("a").close()
    except OSError as error:
        raise CannotGrade(
            f"the judge's replies cannot be kept in {lines.path} ({error.strerror}): name another file."
        ) from None
    replies = {}
    for entry in entries:
        key, reply = (entry.get(name) if isinstance(entry, dict) else None for name in ("key", "reply"))
        if not (isinstance(key, str) and isinstance(reply, str)):
            raise CannotGrade(
                f"{lines.path} holds {str(entry)[:80]!r}, not a judge's reply; name another file."
            )
        replies[key] = reply
    return replies
