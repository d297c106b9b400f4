"""One exchange against servers that drip, repeat themselves, compress, flood and repeat keys."""

from __future__ import annotations

import gzip
import importlib.util
import logging
import socket
import threading
import time

import pytest
from helpers.raw_server import answering, dripping, raw_server

from hpd.http import BadResponse, Connection, ServerUnavailable, read_json

KEY = "sk-canary/4f1d9c0b7a+x"
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("hpd.http.connection._FIRST_PAUSE_SECONDS", 0.02)


def ask(url, read=lambda response, body: body, max_bytes=1000, content=None, **options):
    options = {"timeout_seconds": 0.4, "wait_seconds": 0.0, **options}
    connection = Connection(url, **options)
    try:
        return connection.request("POST", "/x", read, max_bytes=max_bytes, content=content or b"?")
    finally:
        connection.close()


def body(content, headers=b""):
    return OK + b"Content-Length: %d\r\n" % len(content) + headers + b"\r\n" + content


def silent(connection, stop):
    stop.wait(20)


def reads_slowly(connection, stop):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while not stop.is_set():
        connection.recv(512)
        time.sleep(0.02)


ENDLESS = {
    "nothing": silent,
    "header by bytes": dripping(OK + b"X-Long: ", b"x"),
    "header by lines": dripping(OK, b"X-Line: y\r\n"),
    "status by bytes": dripping(b"", b"H", seconds=0.15),
    "100 for ever": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "100 without a pause": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500, seconds=0.0),
    "102 for ever": dripping(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "body by bytes": dripping(OK + b"Content-Length: 1000\r\n\r\n", b"x"),
    "body without a length": dripping(OK + b"\r\n", b"x"),
    "chunks by bytes": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "a chunk's size by bytes": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0", seconds=0.1),
    "trailers": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-T: y\r\n"),
    "refusal by bytes": dripping(b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n", b"x"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_the_deadline_is_over_the_whole_exchange(name):
    with raw_server(ENDLESS[name]) as url:
        begin = time.monotonic()
        with pytest.raises(ServerUnavailable, match="has not answered.*no whole response in 0.4 s|too long"):
            ask(url)
        assert time.monotonic() - begin < 8.0


def test_a_server_that_reads_slowly_meets_the_deadline():
    with raw_server(reads_slowly) as url:
        begin = time.monotonic()
        with pytest.raises(ServerUnavailable, match="no whole response in 0.4 s"):
            ask(url, content=b"x" * 2**24)
        assert time.monotonic() - begin < 8.0


def test_a_server_that_never_speaks_tls_meets_the_deadline():
    with raw_server(dripping(b"", b"x")) as url, pytest.raises(ServerUnavailable, match="1 attempts"):
        ask(url.replace("http:", "https:"))
    with raw_server(silent) as url:
        begin = time.monotonic()
        with pytest.raises(ServerUnavailable, match="no whole response"):
            ask(url.replace("http:", "https:"))
        assert time.monotonic() - begin < 8.0


def test_a_look_up_that_hangs_meets_the_deadline(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [[], over.wait(20)][0])
    begin = time.monotonic()
    try:
        with pytest.raises(ServerUnavailable, match="no whole response in 0.4 s"):
            ask("http://teacher.invalid")
    finally:
        over.set()
    assert time.monotonic() - begin < 8.0


def test_every_address_of_a_name_has_its_share(monkeypatch):
    """The first address swallows everything: no route says no, so only the clock does."""
    with raw_server(answering(body(b"here"))) as url, socket.socket() as full:
        full.bind(("127.0.0.2", int(url.rpartition(":")[2])))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]  # a queue that is full drops whoever comes
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        time.sleep(0.1)
        found = [(socket.AF_INET, 1, 6, "", (host, 0)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", _known(socket.getaddrinfo, "teacher.invalid", found))
        monkeypatch.setenv("NO_PROXY", "*")
        port = url.rpartition(":")[2]
        assert ask(f"http://teacher.invalid:{port}", timeout_seconds=2.0) == b"here"
        for each in waiting:
            each.close()


def _known(real, name, found):
    return lambda host, *args, **options: found if host == name else real(host, *args, **options)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_is_bounded_too(scheme, monkeypatch):
    """What is dripped by the proxy that the environment names: an answer, or the consent to a tunnel."""
    with raw_server(dripping(b"HTTP/1.1 200 OK\r\nX: ", b"y")) as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(ServerUnavailable, match="no whole response in 0.4 s"):
            ask(f"{scheme}://teacher.invalid")


@pytest.mark.parametrize(
    "proxy", ["socks5://user:canary@h:1", "foo://user:canary@h", "http://user:canary@[::1"]
)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTPS_PROXY"])
def test_a_proxy_that_cannot_be_used_is_a_sentence_without_its_password(proxy, variable, monkeypatch):
    monkeypatch.setenv(variable, proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    if proxy.startswith("socks5") and importlib.util.find_spec("socksio"):
        return  # then it can be
    with pytest.raises(ValueError, match="the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY") as caught:
        Connection("https://teacher.invalid")
    assert "canary" not in str(caught.value)
    Connection("http://127.0.0.1:1").close()  # asked without a proxy


def test_wait_seconds_bounds_the_retries_too():
    """Each attempt alone would take a second; all of them together may take 1 + 0.5."""
    with raw_server(silent) as url:
        begin = time.monotonic()
        with pytest.raises(ServerUnavailable, match=r"no whole response in 1 s"):
            ask(url, timeout_seconds=1.0, wait_seconds=0.5)
        assert 1.4 < time.monotonic() - begin < 8.0


def test_the_reason_is_that_of_a_whole_attempt():
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\nall asleep"
    with (
        raw_server(answering(busy)) as url,
        pytest.raises(ServerUnavailable, match="HTTP 503: all asle") as caught,
    ):
        ask(url, wait_seconds=0.3)
    assert not caught.value.final


def test_a_close_ends_what_is_under_way():
    with raw_server(silent) as url:
        connection = Connection(url, timeout_seconds=30.0, wait_seconds=30.0)
        threading.Timer(0.3, connection.close).start()
        begin = time.monotonic()
        with pytest.raises(ServerUnavailable):
            connection.request("GET", "/", lambda _, body: body, max_bytes=10)
        assert time.monotonic() - begin < 8.0


def flood(connection, stop):
    connection.recv(65536)
    connection.sendall(OK + b"\r\n")
    while not stop.is_set():
        connection.sendall(b"x" * 65536)


def test_no_more_is_read_than_was_asked_for():
    with (
        raw_server(flood) as url,
        pytest.raises(ServerUnavailable, match="bad responses.*more than 5000 bytes"),
    ):
        ask(url, max_bytes=5000, timeout_seconds=5.0, wait_seconds=5.0)
    with raw_server(answering(body(b"x" * 1000))) as url:
        assert len(ask(url, max_bytes=1000)) == 1000


def refuse_without_end(connection, stop):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 400 No\r\n\r\nfirst ")
    while not stop.is_set():
        connection.sendall(b"x" * 65536)


def test_of_a_refusal_the_beginning_is_read():
    with (
        raw_server(refuse_without_end) as url,
        pytest.raises(ServerUnavailable, match="HTTP 400: first") as caught,
    ):
        ask(url, timeout_seconds=20.0)
    assert caught.value.final
    assert len(str(caught.value)) < 600


def test_a_request_that_the_server_cannot_read_is_not_asked_again():
    """As llama-cpp-python's server refuses token ids, of which it takes none."""
    said = b"{\"error\":{\"message\":\"2 validation errors: {'loc': ('body', 'prompt', 'str')}\"}}"
    answer = b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(said) + said
    with raw_server(answering(answer)) as url, pytest.raises(ServerUnavailable) as caught:
        ask(url, wait_seconds=20.0)
    assert caught.value.final
    assert "refuses the request: HTTP 500" in str(caught.value)


def test_headers_without_end_are_refused():
    def header(connection, stop):
        connection.recv(65536)
        connection.sendall(OK + b"X: " + b"y" * 2**20)

    with raw_server(header) as url, pytest.raises(ServerUnavailable, match="1 attempts"):
        ask(url, timeout_seconds=5.0)


@pytest.mark.parametrize(
    "content", [gzip.compress(b'{"a": 1}', mtime=0), b"\x1f\x8b\x08no gzip", b'{"a": 1}']
)
@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "x-unknown", "gzip, gzip"])
def test_what_nobody_asked_to_be_compressed_is_refused(content, name):
    response = body(content, f"Content-Encoding: {name}\r\n".encode())
    with (
        raw_server(answering(response)) as url,
        pytest.raises(ServerUnavailable, match=f"bad responses.*content-encoding {name.split(',')[0]}"),
    ):
        ask(url, wait_seconds=5.0)


def test_a_compressed_refusal_is_not_shown():
    garbage = b"HTTP/1.1 401 No\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x1b["
    with raw_server(answering(garbage)) as url, pytest.raises(ServerUnavailable, match="HTTP 401") as caught:
        ask(url)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "form", [KEY, KEY.replace("/", "\\/"), "sk-canary%2F4f1d9c0b7a%2Bx", f"Bearer {KEY}"], ids=range(4)
)
@pytest.mark.parametrize("status", [b"401 No", b"500 No", b"200 OK"])
def test_the_key_is_never_shown(form, status, caplog):
    def read(response, content):
        raise BadResponse(f"this is wrong: {content.decode()}")

    told = form.encode() + b"\x1b[2J"
    response = b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n\r\n" % len(told) + told
    with raw_server(answering(response)) as url, caplog.at_level(logging.WARNING, "hpd"):
        begin = time.monotonic()
        with pytest.raises(ServerUnavailable, match=r"\[key\]") as caught:
            ask(url, read, api_key=f" {KEY}\r\n", wait_seconds=0.3)
        assert time.monotonic() - begin < 8.0
    said = str(caught.value) + caplog.text
    assert "canary" not in said
    assert "\x1b" not in said
    assert caught.value.final == (status == b"401 No")


def test_other_secrets_are_hidden_where_the_caller_says_how(caplog):
    response = b"HTTP/1.1 500 No\r\nContent-Length: 6\r\n\r\ncanary"
    with (
        raw_server(answering(response)) as url,
        caplog.at_level(logging.WARNING, "hpd"),
        pytest.raises(ServerUnavailable, match=r"HTTP 500: \*\*\*") as caught,
    ):
        ask(url, hide=lambda text: text.replace("canary", "***"), wait_seconds=0.3)
    assert "canary" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("key", ["a\nb", "a\tb", "sk canary", "käse", "a\x00b", "a\x7fb", "", " \n"])
def test_keys_that_a_header_cannot_carry_are_refused_unshown(key):
    with pytest.raises(ValueError, match="the key of the server") as caught:
        Connection("http://127.0.0.1:1", api_key=key)
    assert not key.strip() or key.strip() not in str(caught.value)


def test_the_cleaned_key_arrives(monkeypatch):
    seen = []

    def script(connection, stop):
        seen.append(connection.recv(65536))
        connection.sendall(body(b"fine"))

    with raw_server(script) as url:
        assert ask(url, api_key=f"\ufeff{KEY}\n") == b"fine"
    assert f"authorization: Bearer {KEY}\r\n".encode() in seen[0].lower().replace(b"bearer", b"Bearer")


NOT_JSON = {
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "nothing": b"",
    "a number without end": b"1" * 10_000,
    "raw surrogate": b'"\xed\xa0\x80"',
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_no_json_is_a_bad_response(name):
    with pytest.raises(BadResponse, match=r"bytes that are not (JSON|UTF-8)"):
        read_json(NOT_JSON[name])


def test_half_characters_are_replaced_everywhere():
    found = read_json(b'\xef\xbb\xbf{"\\ud800k": ["\\uDC00 and \\ud83d\\ude00", {"x": "\\\\ud800"}, 1e999]}')
    assert found == {"\ufffdk": ["\ufffd and \U0001f600", {"x": "\\ud800"}, float("inf")]}
    assert str(found).encode()
