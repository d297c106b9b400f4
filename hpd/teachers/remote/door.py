"""Who comes in to `hpd serve-teacher`, and how long anybody may take: tokens before slots, time-outs.

Imported where FastAPI and uvicorn are known to be installed.
"""

from __future__ import annotations

import asyncio
import hmac
import resource
from collections import Counter
from collections.abc import Mapping
from typing import Any

from anyio import fail_after
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Door", "Payload"]

# From the first byte of a connection, or the end of a response, to the end of the next request's header.
HEADER_SECONDS = 10.0
# The same for a client that has shown its token: it asks again at its next step.
IDLE_SECONDS = 75.0
# A part of a response that nobody has taken for so long will not be taken.
STALL_SECONDS = 60.0
_PART_BYTES = 2**18


class Door:
    """The connections of a server, and what each request must show before it costs anything.

    A connection is a stranger until a request of it has shown the token. Strangers have little time, and the
    one that has stood there longest goes when too many come; so they cannot keep out who has the token.

    Args:
        token: what clients must send; None: every request is welcome.
        max_requests: of clients with the token, at a time; one more gets 503.
        max_body_bytes: of one request.
    """

    def __init__(self, token: str | None, max_requests: int, max_body_bytes: int):
        self._bearer = None if token is None else f"Bearer {token}".encode()
        self._max_requests = max_requests
        self._max_body_bytes = max_body_bytes
        # Half of the files that the process may open: the other half is for friends.
        self._max_strangers = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._strangers: dict[Any, asyncio.Transport] = {}
        """Oldest first."""
        self._transports: dict[Any, asyncio.Transport] = {}
        self._timers: dict[Any, asyncio.TimerHandle] = {}
        self._asking: Counter[Any] = Counter()
        """Requests under way of each connection: the next one may begin before the last has ended here."""
        self._requests = 0

    def protocol(self) -> type[H11Protocol]:
        """What uvicorn makes of a connection. h11, since it bounds the length of headers."""
        door = self

        class Protocol(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                door.open(self.client, transport)

            def connection_lost(self, exc: Exception | None) -> None:
                door.close(self.client)
                super().connection_lost(exc)

        return Protocol

    def open(self, peer: Any, transport: asyncio.Transport) -> None:
        """A connection was made."""
        self._transports[peer] = self._strangers[peer] = transport
        self._wait(peer)
        if len(self._strangers) > self._max_strangers:
            self.abort(next(iter(self._strangers)))

    def close(self, peer: Any) -> None:
        """A connection has ended."""
        for table in (self._transports, self._strangers, self._asking):
            table.pop(peer, None)
        self._stop_waiting(peer)

    def abort(self, peer: Any) -> None:
        """End a connection now, whatever it has not taken."""
        transport = self._transports.get(peer)
        self.close(peer)
        if transport is not None:
            transport.abort()

    def _wait(self, peer: Any) -> None:
        if peer in self._transports and not self._asking[peer]:
            seconds = HEADER_SECONDS if peer in self._strangers else IDLE_SECONDS
            self._stop_waiting(peer)
            self._timers[peer] = asyncio.get_running_loop().call_later(seconds, self.abort, peer)

    def _stop_waiting(self, peer: Any) -> None:
        timer = self._timers.pop(peer, None)
        if timer is not None:
            timer.cancel()

    def admits(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request shows the token."""
        given = headers.get(b"authorization", b"")
        return self._bearer is None or hmac.compare_digest(given, self._bearer)

    def around(self, app: Any) -> Any:
        """`app` behind this door."""

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            peer = scope["client"]
            self._asking[peer] += 1
            self._stop_waiting(peer)
            headers = dict(scope["headers"])
            friend = self.admits(headers)
            try:
                refusal = self._refusal(scope["path"], headers, friend)
                if refusal is not None:
                    return await refusal(scope, receive, send)
                if friend:
                    self._strangers.pop(peer, None)
                self._requests += friend
                try:
                    await app(scope, receive, send)
                except TimeoutError:  # a reader that has stopped; its connection is all there is to end
                    self.abort(peer)
                finally:
                    self._requests -= friend
            finally:
                if self._asking[peer] <= 1:  # 0: the connection has ended meanwhile
                    del self._asking[peer]
                    self._wait(peer)
                else:
                    self._asking[peer] -= 1

        return guarded

    def _refusal(self, path: str, headers: Mapping[bytes, bytes], friend: bool) -> Response | None:
        """The response to a request that must not cost more than this. The connection ends with it: what is
        refused must not be received all the same."""
        close = {"Connection": "close"}
        if not friend and path != "/health":
            detail = {"detail": "wrong or missing bearer token"}
            return JSONResponse(detail, 401, {"WWW-Authenticate": "Bearer", **close})
        if friend and self._requests >= self._max_requests:
            return JSONResponse({"detail": "too many requests"}, 503, {"Retry-After": "1", **close})
        length = headers.get(b"content-length", b"0")
        known = b"transfer-encoding" not in headers and length.isdigit() and len(length) <= 20
        if not known or int(length) > self._max_body_bytes:
            text = f"the body may have {self._max_body_bytes} bytes, and needs a content-length"
            return JSONResponse({"detail": text}, 413, close)
        return None


class Payload(Response):
    """Bytes that any number of responses share, sent in parts: a slow reader holds one part, not all of them.

    Raises:
        TimeoutError: the reader takes nothing.
    """

    def __init__(self, content: bytes, media_type: str, headers: Mapping[str, str]):
        super().__init__(
            None, media_type=media_type, headers={**headers, "content-length": str(len(content))}
        )
        self._content = content

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        view = memoryview(self._content)
        for start in range(0, max(len(view), 1), _PART_BYTES):
            more = start + _PART_BYTES < len(view)
            part = {
                "type": "http.response.body",
                "body": view[start : start + _PART_BYTES],
                "more_body": more,
            }
            with fail_after(STALL_SECONDS):
                await send(part)
