"""A judge for tests: a real HTTP server on loopback, with the manners, and the bad manners, of real ones."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

__all__ = ["JudgeServer", "likes_longer", "likes_word", "position_biased", "rates_by_length"]

Decide = Callable[[str, int], str]
"""From the whole conversation and the number of the request to the reply."""

_ANSWERS = re.compile(r"<answer_a>\n(.*?)\n</answer_a>.*<answer_b>\n(.*?)\n</answer_b>", re.DOTALL)


def pair_of(conversation: str) -> tuple[str, str]:
    """Answers A and B of the package's prompts."""
    found = _ANSWERS.search(conversation)
    assert found is not None, conversation
    return found[1], found[2]


def likes_longer(conversation: str, _: int) -> str:
    a, b = map(len, pair_of(conversation))
    return "Weighed. [[" + ("A" if a > b else "B" if b > a else "C") + "]]"


def likes_word(word: str) -> Decide:
    def decide(conversation: str, _: int) -> str:
        a, b = (word in answer for answer in pair_of(conversation))
        return "I looked for it.\n[[" + ("A=B" if a == b else "A>>B" if a else "B>A") + "]]"

    return decide


def position_biased(conversation: str, _: int) -> str:
    return "The first is better: [[A]]"


def rates_by_length(conversation: str, _: int) -> str:
    answer = re.findall(r"ANSWER<(.*?)>", conversation, re.DOTALL)[-1]
    return f"Rating: [[{min(10, 1 + len(answer))}]]"


class _Answers(NamedTuple):
    """The arguments of a JudgeServer."""

    decide: Decide
    status: Callable[[int], int | str | None]
    headers: dict[str, str] | None
    delay_seconds: float
    key: str | None


class JudgeServer:
    """Use as a context manager; `url` is the API's base.

    Args:
        decide: what it replies.
        status: for the n-th request of the run (from 0): None to reply, a status to refuse, "drop" to break
            the connection, "garbage" to send 200 with no JSON.
        headers: sent with every refusal.
        delay_seconds: before every reply.
        key: refuse requests that do not carry it.
    """

    def __init__(
        self,
        decide: Decide,
        *,
        status: Callable[[int], int | str | None] = lambda _: None,
        headers: dict[str, str] | None = None,
        delay_seconds: float = 0.0,
        key: str | None = None,
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.authorizations: Counter[str | None] = Counter()
        self.most_at_once = 0
        self.at_once = 0
        self.lock = threading.Lock()
        self.answers = _Answers(decide, status, headers, delay_seconds, key)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port; a later request finds nobody."""
        self._server.shutdown()
        self._server.server_close()


def _handler_of(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    given = judge.answers

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            refused = given.key is not None and self.headers.get("Authorization") != f"Bearer {given.key}"
            self._send(401 if refused else 200, {"data": []})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                number = len(judge.requests)
                judge.requests.append({"path": self.path, **request})
                judge.authorizations[self.headers.get("Authorization")] += 1
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            try:
                time.sleep(given.delay_seconds)
                self._reply(number, request)
            finally:
                with judge.lock:
                    judge.at_once -= 1

        def _reply(self, number: int, request: dict[str, Any]) -> None:
            if given.key is not None and self.headers.get("Authorization") != f"Bearer {given.key}":
                return self._send(401, {"error": {"message": f"bad key {self.headers.get('Authorization')}"}})
            wanted = given.status(number)
            if wanted == "drop":
                self.close_connection = True
                self.connection.close()
                return None
            if wanted == "garbage":
                return self._send(200, "<html>busy</html>")
            if isinstance(wanted, int):
                return self._send(wanted, {"error": {"message": "not now"}}, given.headers)
            conversation = "\n\n".join(message["content"] for message in request["messages"])
            text = given.decide(conversation, number)
            usage = {"prompt_tokens": len(conversation) // 4, "completion_tokens": len(text) // 4}
            return self._send(
                200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}
            )

        def _send(self, code: int, body: Any, more: dict[str, str] | None = None) -> None:
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **(more or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    return Handler
