"""Sockets whose every wait ends when the exchange must."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpcore2
import httpx2

__all__ = ["BoundedNetwork"]

_CONNECT_SECONDS = 10.0
# Bytes that are handed to the system at once, so that a server that reads slowly meets the deadline.
_WRITE_BYTES = 2**14
# Longer than any exchange, and no more than a socket can be told to wait.
_LONGEST_SECONDS = 1e6


class _BoundedStream(httpcore2.NetworkStream):
    """A stream each of whose waits ends when the exchange must; `left` tells the seconds, or raises."""

    def __init__(self, stream: httpcore2.NetworkStream, left: Callable[[], float]):
        self._stream = stream
        self._left = left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _WRITE_BYTES):
            self._stream.write(buffer[start : start + _WRITE_BYTES], self._left())

    def close(self) -> None:
        # Unlike closing it, shutting a socket down wakes the thread that waits for it.
        with contextlib.suppress(OSError):
            self._stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        seconds = min(self._left(), _CONNECT_SECONDS)
        return _BoundedStream(self._stream.start_tls(ssl_context, server_hostname, seconds), self._left)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class BoundedNetwork(httpcore2.SyncBackend):
    """Connections whose every wait, the look-up of the name included, ends when the exchange must.

    The timeouts of the HTTP library bound each read: a server that drips its header, or says `100 Continue`
    for ever, would stretch them without end.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def carry(self, client: httpx2.Client) -> None:
        """Make the client's connections; its own place for that is private, so a new version is noticed."""
        transports: list[Any] = [client._transport, *client._mounts.values()]
        for transport in transports:
            if transport is not None:  # None: hosts that go round a proxy, by the first one
                assert isinstance(transport._pool._network_backend, httpcore2.SyncBackend)
                transport._pool._network_backend = self

    def start(self, seconds: float) -> None:
        """The exchange of this thread ends in so many seconds."""
        self._of_thread.end = time.monotonic() + min(seconds, _LONGEST_SECONDS)

    def left(self) -> float:
        seconds = self._of_thread.end - time.monotonic()
        if seconds <= 0:
            raise httpcore2.ReadTimeout("no time left")
        return seconds

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **options: Any
    ) -> httpcore2.NetworkStream:
        end = time.monotonic() + min(self.left(), _CONNECT_SECONDS)
        addresses = _addresses(host, port, end)
        error: Exception = httpcore2.ConnectError(f"{host} has no address")
        for number, address in enumerate(addresses):
            # A share for each, so that one that swallows everything leaves time for the others.
            seconds = (end - time.monotonic()) / (len(addresses) - number)
            if seconds <= 0:
                break
            try:
                return _BoundedStream(
                    super().connect_tcp(address, port, seconds, *args, **options), self.left
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as failure:
                error = failure
        raise error


def _addresses(host: str, port: int, end: float) -> list[str]:
    """Addresses of a host; the system's look-up has no deadline of its own, so it is left behind."""
    found: list[Any] = []

    def look_up() -> None:
        try:
            known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.append(list(dict.fromkeys(str(each[4][0]) for each in known)))
        except (OSError, UnicodeError) as error:
            found.append(httpcore2.ConnectError(str(error)))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(max(end - time.monotonic(), 0.0))
    outcome = found[0] if found else httpcore2.ConnectTimeout(f"the address of {host} is not found in time")
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
