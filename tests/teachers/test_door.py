"""The door of `hpd serve-teacher`: strangers, idle and slow clients on raw sockets; what readers share."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import httpx2
import pytest
import torch
from helpers.servers import load_backend, served
from tiny_models import tiny_model

from hpd.losses import Head
from hpd.teachers.remote import door, serve
from hpd.teachers.remote.wire import MEDIA_TYPE, load

TOKEN = "a-token-of-more-than-16-characters"
FRIEND = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    return load_backend(tiny_model("llama", tmp_path_factory.mktemp("teacher"), role="teacher"))


def connect(url, text=b"", receive=None):
    host, port = url.removeprefix("http://").split(":")
    raw = socket.socket()
    if receive is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    raw.settimeout(20)
    raw.connect((host, int(port)))
    raw.sendall(text)
    return raw


def request(line, **headers):
    given = {"Host": "127.0.0.1", **headers}
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode()


def receive_until(raw, end):
    received = b""
    while end not in received:
        part = raw.recv(65536)
        assert part, received
        received += part


def seconds_until_closed(raw, drop=b""):
    """How long the server keeps a connection on which `drop` is sent again and again."""
    begin = time.monotonic()
    raw.settimeout(0.05)
    while time.monotonic() - begin < 20:
        with contextlib.suppress(TimeoutError):
            try:
                raw.sendall(drop)
                if not raw.recv(65536):
                    return time.monotonic() - begin
            except ConnectionError:
                return time.monotonic() - begin
    raise AssertionError("the connection is still open")


def test_300_idle_strangers_keep_nobody_out(backend):
    with served(backend, token=TOKEN) as url, contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(url))
        with httpx2.Client(headers=FRIEND, timeout=20) as client:
            assert client.get(f"{url}/health").json()["vocab"] == 300
            assert len(client.get(f"{url}/v1/head").content) > 1000


def test_of_too_many_strangers_the_oldest_goes(backend, monkeypatch):
    monkeypatch.setattr(door.resource, "getrlimit", lambda _: (16, 16))
    with served(backend, token=TOKEN) as url, contextlib.ExitStack() as stack:
        friend = stack.enter_context(httpx2.Client(headers=FRIEND, timeout=20))
        assert friend.get(f"{url}/health").json()["vocab"] == 300
        strangers = [stack.enter_context(connect(url)) for _ in range(20)]
        for raw in strangers[:12]:
            seconds_until_closed(raw)
        assert friend.get(f"{url}/health").json()["vocab"] == 300
        assert httpx2.get(f"{url}/health", headers=FRIEND, timeout=20).json()["vocab"] == 300
        strangers[-1].sendall(request("GET /health"))
        assert strangers[-1].recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\n", b""),
        (b"GET /health HTTP/1.1\r\nX: ", b"y"),
        (b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),
        (request("GET /health"), b""),
        (request("GET /health"), b"G"),
    ],
    ids=["idle", "half a header", "by bytes", "by lines", "idle after a response", "drips after a response"],
)
def test_headers_have_a_deadline(backend, monkeypatch, first, drop):
    monkeypatch.setattr(door, "HEADER_SECONDS", 0.6)
    with served(backend, token=TOKEN) as url, connect(url, first) as raw:
        assert 0.3 < seconds_until_closed(raw, drop) < 10


def test_a_client_with_the_token_may_think_longer(backend, monkeypatch):
    monkeypatch.setattr(door, "HEADER_SECONDS", 0.3)
    asked = request("GET /health", Authorization=f"Bearer {TOKEN}")
    with served(backend, token=TOKEN) as url, connect(url, asked) as raw:
        receive_until(raw, b'"waiting"')
        time.sleep(1.0)
        raw.sendall(asked)
        receive_until(raw, b'"waiting"')
        monkeypatch.setattr(door, "IDLE_SECONDS", 0.3)
        raw.sendall(asked)
        receive_until(raw, b'"waiting"')
        assert seconds_until_closed(raw) < 10


@pytest.mark.parametrize("path", ["/v1/scores", "/v1/head", "/v1/tokenizer", "/elsewhere"])
def test_without_the_token_nothing_is_read_and_the_connection_ends(backend, path):
    """The body is announced and never sent: the refusal does not wait for it."""
    text = request(f"POST {path}", **{"Content-Length": "1000000", "Authorization": "Bearer wrong"})
    with served(backend, token=TOKEN) as url, connect(url, text) as raw:
        begin = time.monotonic()
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 401")
        assert time.monotonic() - begin < 8


def test_only_requests_with_the_token_take_slots(backend, monkeypatch):
    monkeypatch.setattr(door, "HEADER_SECONDS", 60.0)
    scores = {"Content-Type": MEDIA_TYPE, "Content-Length": "1000"}
    with served(backend, token=TOKEN, max_waiting=1) as url, contextlib.ExitStack() as stack:
        for _ in range(30):  # 4 x max_waiting + 16 slots; each of these is refused or waits for its header
            stack.enter_context(connect(url, request("POST /v1/scores", **scores)))
        assert httpx2.get(f"{url}/v1/tokenizer", headers=FRIEND, timeout=20).status_code == 200
        for _ in range(20):  # clients with the token whose bodies do not come
            stack.enter_context(
                connect(url, request("POST /v1/scores", **scores, Authorization=f"Bearer {TOKEN}"))
            )
        deadline = time.monotonic() + 20
        while (busy := httpx2.get(f"{url}/v1/tokenizer", headers=FRIEND, timeout=20)).status_code != 503:
            assert time.monotonic() < deadline
        assert busy.headers["retry-after"] == "1"


def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_the_head_is_made_once_and_slow_readers_share_it(backend, monkeypatch):
    """16 clients that take nothing of 20 MB: their server holds the head once, and a part for each."""
    monkeypatch.setattr(backend, "head", Head(torch.randn(40000, 128)))
    made = []
    monkeypatch.setattr(serve, "dump", lambda tensors, dump=serve.dump: made.append(1) or dump(tensors))
    with served(backend) as url, contextlib.ExitStack() as stack:
        first = httpx2.get(f"{url}/v1/head?dtype=float32", timeout=20).content
        assert torch.equal(load(first)["weight"], backend.head.weight)
        before = resident_bytes()
        for _ in range(16):
            stack.enter_context(connect(url, request("GET /v1/head?dtype=float32"), receive=4096))
        time.sleep(1.5)
        assert resident_bytes() - before < len(first)  # each had a copy: 16 times as much
        assert httpx2.get(f"{url}/v1/head", timeout=20).content == first
    assert len(made) == 1


def test_a_reader_that_stops_is_left(backend, monkeypatch):
    monkeypatch.setattr(backend, "head", Head(torch.randn(40000, 128)))
    monkeypatch.setattr(door, "STALL_SECONDS", 0.3)
    with served(backend) as url, connect(url, request("GET /v1/head"), receive=4096) as raw:
        time.sleep(2.0)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := raw.recv(2**20):
                received += len(part)
        assert received < 20_000_000
        assert httpx2.get(f"{url}/health", timeout=20).status_code == 200


def test_a_token_with_white_space_is_refused():
    for token in (TOKEN + "\n", TOKEN[:8] + " " + TOKEN[8:], "\x00" * 20):
        with pytest.raises(ValueError, match="the server's token|The server's token") as caught:
            serve.ServeSettings(token=token).check()
        assert token not in str(caught.value)
