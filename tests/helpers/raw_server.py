"""A server that says what no HTTP library would let it say: one function per connection, on a raw socket."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["answering", "dripping", "raw_server", "read_request"]

Script = Callable[[socket.socket, threading.Event], None]
"""Gets a connection, and an event that is set when the test is over."""


@contextlib.contextmanager
def raw_server(script: Script) -> Iterator[str]:
    """Yields the address; the connection is closed when the script returns."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            script(connection, stop)

    def accept(listener: socket.socket) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        threads.append(threading.Thread(target=accept, args=(listener,)))
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()


def dripping(first: bytes, drop: bytes, seconds: float = 0.02) -> Script:
    """Says `first` at once and then `drop` for ever."""

    def script(connection: socket.socket, stop: threading.Event) -> None:
        connection.recv(65536)
        connection.sendall(first)
        while not stop.is_set():
            connection.sendall(drop)
            time.sleep(seconds)

    return script


def answering(*responses: bytes) -> Script:
    """One response per connection, the last one again and again; then the connection is closed."""
    left = list(responses)

    def script(connection: socket.socket, stop: threading.Event) -> None:
        read_request(connection)
        connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    return script


def read_request(connection: socket.socket) -> bytes:
    """The header of a request, whose body is received too: closing before that would reset the connection.

    A client that closes early ends it with an OSError, which the server suppresses.
    """
    connection.settimeout(10)
    received = b""
    while b"\r\n\r\n" not in received:
        received += _some(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    size = dict(line.lower().split(b": ") for line in head.split(b"\r\n")[1:]).get(b"content-length", 0)
    while len(body) < int(size):
        body += _some(connection)
    return head


def _some(connection: socket.socket) -> bytes:
    if not (received := connection.recv(65536)):
        raise ConnectionResetError("The client closed the connection within its request.")
    return received
