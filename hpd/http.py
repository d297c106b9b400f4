"""One request until the server answers: retries with backoff, every wait bounded, the key never shown."""

from __future__ import annotations

import email.utils
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2

__all__ = ["BadResponse", "Connection", "ServerUnavailable", "read_key"]

_LOGGER = logging.getLogger("hpd")
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
# A server that responds with nonsense is asked again: a proxy or a restart may have cut it short.
_BAD_RESPONSES = 4

T = TypeVar("T")


class BadResponse(ValueError):
    """The server responded, and the response cannot be right."""


class ServerUnavailable(RuntimeError):
    """A server gave no usable response within the bounded wait.

    Args:
        message: which server, and why.
        final: asking again would not help (a wrong key, a request that the server refuses).
    """

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


def read_key(name: str | None) -> str | None:
    """The key in the environment variable `name`.

    Raises:
        ValueError: the variable is not set.
    """
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        raise ValueError(
            f"api_key_env names the environment variable {name}, which is not set: export it, or remove the "
            "field."
        )
    return key


class Connection:
    """One server, many threads.

    Args:
        url: its base address.
        name: of the server, at the start of every message.
        api_key: sent as a bearer token; taken out of every message.
        timeout_seconds: of one attempt, from the first byte sent to the last received.
        wait_seconds: how long a request is tried again after its first failure, before the server counts as
            unavailable.
        max_attempts: of one request; None: as many as fit into `wait_seconds`.
        first_pause_seconds: before the first retry, doubled each time; None: 0.25.
        connections: kept open at once.
        failure: the class of the error for a server that is unavailable.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "The server",
        api_key: str | None = None,
        timeout_seconds: float = 120.0,
        wait_seconds: float = 600.0,
        max_attempts: int | None = None,
        first_pause_seconds: float | None = None,
        connections: int = 4,
        failure: type[ServerUnavailable] = ServerUnavailable,
    ):
        self.url = url.rstrip("/")
        self.num_retries = 0
        """Attempts beyond the first, of all requests."""
        self._name = name
        self._key = api_key
        self._timeout_seconds = timeout_seconds
        self._wait_seconds = wait_seconds
        self._max_attempts = max_attempts
        self._first_pause_seconds = first_pause_seconds
        self._failure = failure
        self._lock = threading.Lock()
        self._closing = threading.Event()
        local = httpx2.URL(url).host in ("127.0.0.1", "localhost", "::1")
        self._client = httpx2.Client(
            # No compression: a response's size is bounded as it arrives, and must not grow afterwards.
            headers={
                "accept-encoding": "identity",
                **({"authorization": f"Bearer {api_key}"} if api_key else {}),
            },
            timeout=httpx2.Timeout(timeout_seconds, connect=min(_CONNECT_SECONDS, timeout_seconds)),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not local,  # a proxy has no business between two processes of one machine
            follow_redirects=False,  # the key goes to the server that the recipe names
        )

    def stop(self) -> None:
        """Let waiting requests give up; attempts under way end as they do."""
        self._closing.set()

    def close(self) -> None:
        """Let waiting requests give up, and end those under way."""
        self.stop()
        self._client.close()

    def request(
        self,
        method: str,
        path: str,
        read: Callable[[httpx2.Response, bytes], T],
        *,
        max_bytes: int = 2**30,
        **options: Any,
    ) -> T:
        """The response to a request, as `read` understands it.

        Args:
            method, path: what is asked.
            read: gets response and body; raises BadResponse (or ValueError) where they cannot be right.
            max_bytes: the longest body that is read.
            **options: content, json, params or headers.

        Raises:
            ServerUnavailable: no good response within the bounded wait, or one that asking again would not
                change.
        """
        started = time.monotonic()
        first_failure: float | None = None
        attempts = 0
        bad = 0
        while True:
            attempts += 1
            retry_after = 0.0
            try:
                response, body = self.attempt(method, path, max_bytes=max_bytes, **options)
                if response.status_code == 200:
                    return read(response, body)
                reason = f"HTTP {response.status_code}: {self._quoted(body)}"
                if response.status_code not in _RETRIED:
                    raise self._failure(f"{self._where(path)} refuses the request: {reason}", final=True)
                retry_after = _retry_after(response)
            except (httpx2.RequestError, httpx2.StreamError, OSError) as error:
                reason = f"{type(error).__name__} {self._hidden(str(error))}".strip()
            except ValueError as error:
                bad += 1
                reason = f"bad response: {self._hidden(str(error))}"
                if bad >= _BAD_RESPONSES:
                    raise self._failure(f"{self._where(path)} keeps giving bad responses: {reason}") from None
            first_failure = first_failure or time.monotonic()
            left = first_failure + self._wait_seconds - time.monotonic()
            spent = attempts == self._max_attempts or left <= 0 or retry_after > left
            if spent or self._closing.is_set():
                most = f"wait_seconds {self._wait_seconds:g}"
                if self._max_attempts is not None:
                    most = f"at most {self._max_attempts}"
                raise self._failure(
                    f"{self._where(path)} has not answered in {time.monotonic() - started:.0f} s and "
                    f"{attempts} attempts ({most}); the last: {reason}"
                )
            self._pause(path, reason, max(retry_after, min(self._backoff(attempts), left)))

    def attempt(
        self, method: str, path: str, *, max_bytes: int = 2**30, **options: Any
    ) -> tuple[httpx2.Response, bytes]:
        """Response of any status and its body, asked for once.

        Raises:
            httpx2.RequestError, httpx2.StreamError, OSError: the server is not reached, or too slow.
            BadResponse: the body is longer than `max_bytes`.
        """
        # The client's own timeouts bound each read; a server that drips bytes would stretch them for ever.
        deadline = time.monotonic() + self._timeout_seconds
        parts = []
        size = 0
        with self._client.stream(method, self.url + path, **options) as response:
            for part in response.iter_raw():
                size += len(part)
                if size > max_bytes:
                    raise BadResponse(f"more than {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"no whole response in {self._timeout_seconds:g} s")
                parts.append(part)
        return response, b"".join(parts)

    def _backoff(self, attempts: int) -> float:
        """Seconds before the next attempt: up to twice as long as the rule says, so that many clients do not
        come back at the same moment."""
        first = _FIRST_PAUSE_SECONDS if self._first_pause_seconds is None else self._first_pause_seconds
        return min(first * 2 ** min(attempts - 1, 20), _LONGEST_PAUSE_SECONDS) * (1.0 + random.random())

    def _pause(self, path: str, reason: str, seconds: float) -> None:
        _LOGGER.warning("%s: %s; asking again in %.1f s", self._where(path), reason, seconds)
        with self._lock:
            self.num_retries += 1
        self._closing.wait(seconds)

    def _where(self, path: str) -> str:
        return f"{self._name} at {self.url}{path}"

    def _quoted(self, body: bytes) -> str:
        return self._hidden(" ".join(body[:2000].decode(errors="replace").split()))[:300]

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait (a number or a date); 0 where it says nothing that makes sense."""
    given = response.headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
