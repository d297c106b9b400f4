"""One request until the server answers: retries with backoff, every wait bounded, the key never shown."""

from __future__ import annotations

import email.utils
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpcore2
import httpx2

from hpd.http.checks import BadResponse, check_url, clean_key, shown, without_key
from hpd.http.network import BoundedNetwork

__all__ = ["Connection", "ServerUnavailable"]

_LOGGER = logging.getLogger("hpd")
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# Of a request that some servers (llama-cpp-python's) cannot read and answer with status 500.
_UNREADABLE = "validation error"
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 30.0
# A retry that has less than this would only replace the reason why the others failed.
_SHORTEST_ATTEMPT_SECONDS = 0.05
# A server that responds with nonsense is asked again: a proxy or a restart may have cut it short.
_BAD_RESPONSES = 4
# What is read of a refusal; its first line is all that is shown.
_REFUSAL_BYTES = 2**16
# A mistake on this side of the wire: the same request fails the same way again.
_OUR_MISTAKES = (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol)

T = TypeVar("T")


class ServerUnavailable(RuntimeError):
    """A server gave no usable response within the bounded wait.

    Args:
        message: which server, and why.
        final: asking again would not help (a wrong key, a request that the server refuses).
        garbled: it responds, each time with what cannot be right.
    """

    def __init__(self, message: str, final: bool = False, garbled: bool = False):
        super().__init__(message)
        self.final = final
        self.garbled = garbled


class Connection:
    """One server, many threads.

    Args:
        url: its base address.
        name: of the server, at the start of every message.
        api_key: sent as a bearer token; taken out of every message.
        hide: takes other secrets out of what is shown.
        timeout_seconds: of one attempt, from the look-up of the name to the last byte received.
        wait_seconds: how long a request is tried again after its first failure, before the server counts as
            unavailable. A request takes at most `timeout_seconds` + `wait_seconds`.
        max_attempts: of one request; None: as many as fit into `wait_seconds`.
        first_pause_seconds: before the first retry, doubled each time; None: 0.25.
        connections: kept open at once.
        refusals: texts of a response that mean "never", whatever its status.
        failure: the class of the error for a server that is unavailable.

    Raises:
        ValueError: an address that `check_url`, or a key that `clean_key` refuses; a proxy in the environment
            that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "The server",
        api_key: str | None = None,
        hide: Callable[[str], str] = str,
        timeout_seconds: float = 120.0,
        wait_seconds: float = 600.0,
        max_attempts: int | None = None,
        first_pause_seconds: float | None = None,
        connections: int = 4,
        refusals: Sequence[str] = (),
        failure: type[ServerUnavailable] = ServerUnavailable,
    ):
        check_url(url, f"the address of {name[0].lower()}{name[1:]}")
        self.url = url.rstrip("/")
        self.num_retries = 0
        """Attempts beyond the first, of all requests."""
        self._name = name
        self._key = None if api_key is None else clean_key(api_key, f"the key of {name[0].lower()}{name[1:]}")
        self._hide = hide
        self._timeout_seconds = timeout_seconds
        self._wait_seconds = wait_seconds
        self._max_attempts = max_attempts
        self._first_pause_seconds = first_pause_seconds
        self._failure = failure
        self._refusals = refusals
        self._lock = threading.Lock()
        self._closing = threading.Event()
        local = httpx2.URL(url).host in ("127.0.0.1", "localhost", "::1")
        self._client = _client(
            # No compression: a response's size is bounded as it arrives, and must not grow afterwards.
            headers={
                "accept-encoding": "identity",
                **({"authorization": f"Bearer {self._key}"} if self._key else {}),
            },
            timeout=timeout_seconds,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not local,  # a proxy has no business between two processes of one machine
            follow_redirects=False,  # the key goes to the server that the recipe names
        )
        self._network = BoundedNetwork()
        self._network.carry(self._client)

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
        max_bytes: int,
        **options: Any,
    ) -> T:
        """The response to a request, as `read` understands it.

        Args:
            method, path: what is asked.
            read: gets response and body; raises BadResponse (or ValueError) where they cannot be right.
            max_bytes: the longest body that what is asked can have.
            **options: content, json, params or headers.

        Raises:
            ServerUnavailable: no good response within the bounded wait, or one that asking again would not
                change.
        """
        started = time.monotonic()
        end = math.inf  # of all attempts; the first failure sets it
        reason = ""
        attempts = bad = 0
        while True:
            attempts += 1
            retry_after = 0.0
            seconds = min(self._timeout_seconds, end - time.monotonic())
            try:
                response, body = self.attempt(method, path, max_bytes=max_bytes, seconds=seconds, **options)
                if response.status_code == 200:
                    return read(response, body)
                reason = f"HTTP {response.status_code}: {self._quoted(body.decode(errors='replace'))}"
                if response.status_code not in _RETRIED or self._refuses(reason):
                    raise self._failure(f"{self._where(path)} refuses the request: {reason}", final=True)
                retry_after = _retry_after(response)
            except _OUR_MISTAKES as error:
                message = f"{self._where(path)} cannot be asked: {self.explained(error)}"
                raise self._failure(message, final=True) from None
            except (httpx2.RequestError, httpx2.StreamError, OSError) as error:
                # A retry that the wait cut short says less than the failures before it.
                if not reason or seconds == self._timeout_seconds:
                    reason = self.explained(error)
            except ValueError as error:
                bad += 1
                reason = f"bad response: {self._quoted(str(error))}"
                if bad >= _BAD_RESPONSES:
                    message = f"{self._where(path)} keeps giving bad responses: {reason}"
                    raise self._failure(message, garbled=True) from None
            end = min(end, time.monotonic() + self._wait_seconds)
            left = end - time.monotonic()
            spent = attempts == self._max_attempts or max(retry_after, _SHORTEST_ATTEMPT_SECONDS) >= left
            if spent or self._closing.is_set():
                spent_seconds = time.monotonic() - started
                raise self._failure(self._given_up(path, spent_seconds, attempts, reason))
            # Not all that is left, which the attempt needs.
            self._pause(path, reason, max(retry_after, min(self._backoff(attempts), left / 2)))

    def attempt(
        self, method: str, path: str, *, max_bytes: int, seconds: float | None = None, **options: Any
    ) -> tuple[httpx2.Response, bytes]:
        """Response of any status and its body, asked for once.

        Args:
            max_bytes: the longest body of status 200; of another, the beginning is read.
            seconds: all it may take; None: `timeout_seconds`.

        Raises:
            httpx2.RequestError, httpx2.StreamError, OSError: the server is not reached, or too slow.
            BadResponse: the body is longer than `max_bytes`, or compressed.
        """
        seconds = self._timeout_seconds if seconds is None else seconds
        self._network.start(seconds)
        body = bytearray()
        try:
            with self._client.stream(
                method, self.url + path, timeout=max(seconds, 0.0), **options
            ) as response:
                encoding = response.headers.get("content-encoding", "").strip().lower()
                readable = encoding in ("", "identity")
                fine = response.status_code == 200
                if fine and not readable:
                    raise BadResponse(f"content-encoding {shown(encoding)}, where identity is asked for")
                for part in response.iter_raw() if readable else ():
                    self._network.left()
                    body += part
                    if fine and len(body) > max_bytes:
                        raise BadResponse(f"more than {max_bytes} bytes")
                    if not fine and len(body) > _REFUSAL_BYTES:
                        break
        except (httpx2.TimeoutException, httpcore2.TimeoutException) as error:
            kind = httpx2.ReadTimeout if isinstance(error, httpcore2.TimeoutException) else type(error)
            raise kind(f"no whole response in {seconds:.3g} s") from None
        return response, bytes(body)

    def explained(self, error: Exception) -> str:
        """An error in one line, without the key and other secrets."""
        return f"{type(error).__name__} {self._quoted(str(error))}".strip()

    def _refuses(self, reason: str) -> bool:
        return any(text in reason for text in (_UNREADABLE, *self._refusals))

    def _quoted(self, text: str) -> str:
        if self._key is not None:
            text = without_key(text, self._key)
        return shown(self._hide(text), 300)

    def _given_up(self, path: str, seconds: float, attempts: int, reason: str) -> str:
        most = f"wait_seconds {self._wait_seconds:g}"
        if self._max_attempts is not None:
            most = f"at most {self._max_attempts}"
        return (
            f"{self._where(path)} has not answered in {seconds:.0f} s and {attempts} attempts ({most}); the "
            f"last: {reason}"
        )

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


def _client(**options: Any) -> httpx2.Client:
    try:
        return httpx2.Client(**options)
    except (ImportError, ValueError, httpx2.InvalidURL):  # its message may repeat the proxy's password
        raise ValueError(
            "the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names in the environment cannot be used: "
            "give it as http://host:port (socks5://host:port needs the package socksio), or unset it."
        ) from None


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait (a number or a date); 0 where it says nothing that makes sense."""
    given = response.headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
