"""The judge's client against endpoints that drip, flood, compress, miscount and talk nonsense."""

from __future__ import annotations

import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.judge_server import JudgeServer, likes_longer
from helpers.raw_server import answering, dripping, raw_server

from hpd.evaluate.benchmarks.judge_client import Judge
from hpd.evaluate.benchmarks.judge_settings import JudgeSettings, key_of

QUESTION = [[{"role": "user", "content": "who wins? " * 4}]]
KEY = "sk-canary/4f1d9c0b7a"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def _judge(url: str, folder: Path, **options: Any) -> Judge:
    # On a machine so busy that a reply takes longer, a request would be repeated, and the counts be others.
    given = {"timeout_seconds": 60.0, "max_retries": 6, "backoff_seconds": 0.01, **options}
    return Judge(JudgeSettings(url=f"{url}/v1", model="judge", cache=folder / "cache.jsonl", **given))


def _ask(judge: Judge) -> str:
    return judge.rule(QUESTION, lambda text: text or None, "again")[0].text


def _response(content: bytes, headers: bytes = b"", status: bytes = b"200 OK") -> bytes:
    length = b"\r\nContent-Length: %d\r\nConnection: close\r\n" % len(content)
    return b"HTTP/1.1 " + status + length + headers + b"\r\n" + content


def _reply(content: Any, **more: Any) -> bytes:
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"message": message}], **more}).encode()


@pytest.mark.parametrize(
    "script",
    [
        dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
        dripping(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
        dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "header", "continue"],
)
def test_a_dripping_judge_is_given_up(script, tmp_path: Path) -> None:
    with raw_server(script) as url:
        judge = _judge(url, tmp_path, timeout_seconds=0.4, max_retries=1)
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match="2 attempts .*no whole response in 0.4 s"):
            _ask(judge)
        with pytest.raises(ConnectionError, match="does not answer .*no whole response in 0.4 s"):
            judge.check()
        assert time.monotonic() - begin < 10.0


def test_a_reply_without_end_is_cut(tmp_path: Path) -> None:
    def flood(connection: Any, stop: Any) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not stop.is_set():
            connection.sendall(b" " * 2**20)

    with raw_server(flood) as url:
        judge = _judge(url, tmp_path, timeout_seconds=30.0)
        with pytest.raises(ConnectionError, match="more than 16777216 bytes"):
            _ask(judge)
        with pytest.raises(ConnectionError, match="more than 16777216 bytes"):
            judge.check()


NONSENSE = {
    "deep": b"[" * 100_000,
    "deep in a reply": _reply("x")[:-1] + b', "usage": ' + b'{"a":' * 100_000,
    "latin-1": _response(
        _reply("x") + "é".encode("latin-1"), b"Content-Type: text/html; charset=latin-1\r\n"
    ),
    "utf-16": _response(
        _reply("x").decode().encode("utf-16"), b"Content-Type: text/json; charset=utf-16\r\n"
    ),
    "gzip": _response(gzip.compress(_reply("x")), b"Content-Encoding: gzip\r\n"),
    "bad gzip": _response(b"\x1f\x8b\x08\x00oops", b"Content-Encoding: gzip\r\n"),
    "unknown coding": _response(_reply("x"), b"Content-Encoding: rot13\r\n"),
    "a number": b"1e999",
    "no choices": b'{"choices": []}',
    "choices by name": b'{"choices": {"0": 1}}',
    "a message of text": b'{"choices": [{"message": "x"}]}',
    "content is a number": _reply(5),
    "content is an object": _reply({"text": "x"}),
    "parts of no text": _reply([{"type": "text", "text": 5}]),
    "parts of nothing": _reply([5]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_a_sentence(name: str, tmp_path: Path) -> None:
    told = NONSENSE[name]
    response = told if told.startswith(b"HTTP/") else _response(told)
    with (
        raw_server(answering(response)) as url,
        pytest.raises(
            ConnectionError, match=f"The judge at {url}/v1/chat/completions keeps giving bad"
        ) as caught,
    ):
        _ask(_judge(url, tmp_path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["latin-1", "utf-8", "x-unknown", "utf-7", "\xff"])
def test_json_is_utf8_whatever_its_header_says(name: str, tmp_path: Path) -> None:
    header = f"Content-Type: application/json; charset={name}\r\n".encode("latin-1")
    content = '{"choices": [{"message": {"content": "é [[A]]"}}]}'.encode()
    with raw_server(answering(_response(content, header))) as url:
        assert _ask(_judge(url, tmp_path)) == "é [[A]]"


def test_half_characters_end_neither_a_verdict_nor_its_record(tmp_path: Path) -> None:
    """The first reply holds no verdict, so it is sent back to the judge with the reminder."""
    with raw_server(answering(_response(_reply("half \ud83d")), _response(_reply("[[A]] \udc00")))) as url:
        judge = _judge(url, tmp_path)
        ruling = judge.rule(QUESTION, lambda text: "A" if "[[A]]" in text else None, "again")[0]
        assert (ruling.verdict, ruling.text, ruling.asks) == ("A", "[[A]] \ufffd", 2)
        assert _judge(url, tmp_path).num_cached == 2


def test_half_characters_of_a_question_reach_no_wire(tmp_path: Path) -> None:
    with JudgeServer(lambda *_: "[[A]]") as server:
        judge = _judge(server.url.removesuffix("/v1"), tmp_path)
        question = [[{"role": "user", "content": "who wins, \ud83d or \U0001f600?"}]]
        assert judge.rule(question, lambda text: text, "again")[0].text == "[[A]]"
        assert server.requests[0]["messages"][0]["content"] == "who wins, \ufffd or \U0001f600?"


@pytest.mark.parametrize(
    "line", ['{"key": ["a"], "reply": "x"}', '{"key": "k", "reply": 5}', '{"key": null, "reply": "x"}', "[1]"]
)
def test_a_cache_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "cache.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"cache.jsonl holds .* not a judge's reply; name another file"):
        _judge("http://127.0.0.1:1", tmp_path)


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "cache.jsonl").mkdir(parents=True)
    for place in ("file", "folder"):
        with pytest.raises(ValueError, match="replies cannot be kept in .*cache.jsonl .*name another file"):
            _judge("http://127.0.0.1:1", tmp_path / place)


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "[["},
        {"type": "text", "text": "A]]"},
    ]
    with raw_server(answering(_response(_reply(parts)))) as url:
        assert _ask(_judge(url, tmp_path)) == "[[A]]"


COUNTS = ["-1000000", "1e999", "NaN", "-Infinity", "true", '"7"', "7.5", "null", "[]", "9" * 400]


@pytest.mark.parametrize("count", COUNTS)
def test_impossible_counts_are_estimated_and_said_once(count: str, tmp_path: Path, caplog) -> None:
    usage = f', "usage": {{"prompt_tokens": {count}, "completion_tokens": {count}}}}}'.encode()
    content = _reply("x" * 400)[:-1] + usage
    with raw_server(answering(_response(content))) as url, caplog.at_level(logging.WARNING, "hpd"):
        judge = _judge(url, tmp_path, price_in=1e6, price_out=1e6, max_cost=1000.0)
        assert _ask(judge) == "x" * 400
    assert (judge.usage.tokens_in, judge.usage.tokens_out) == (10, 100)
    assert caplog.text.count("tokens are counted from here on as 4 characters each") == 1


@pytest.mark.parametrize("usage", ["-5", "null", "[]", '"all"', "1e999"])
def test_impossible_usage_does_not_defeat_max_cost(usage: str, tmp_path: Path) -> None:
    content = _reply("x" * 400)[:-1] + f', "usage": {usage}}}'.encode()
    with raw_server(answering(_response(content))) as url:
        judge = _judge(url, tmp_path, price_in=1e6, price_out=1e6, max_cost=50.0)
        with pytest.raises(ValueError, match=r"has cost 110.00, above max_cost=50"):
            _ask(judge)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://user:canary@host/v1"}, "judge_url holds a user name or password.*judge.key_env"),
        ({"url": "http://host/v1?api_key=canary"}, "judge_url .*without a query"),
        ({"url": "http://host/v1#canary"}, "judge_url .*without a query"),
        ({"url": "http://host/nvapi-" + "canary12" * 4}, "judge_url holds what looks like an access key"),
        ({"extra": {"api_key": "canary"}}, "judge.extra.api_key is a secret"),
        ({"extra": {"headers": {"Authorization": "canary"}}}, "Authorization is a secret"),
        ({"price_in": float("nan"), "price_out": 1.0}, "price_in is nan"),
        ({"price_in": 1.0, "price_out": -1.0}, "price_out is -1.0"),
        ({"price_in": 1.0, "price_out": 1.0, "max_cost": float("nan")}, "max_cost is nan"),
        ({"price_in": 1.0, "price_out": 1.0, "max_cost": float("inf")}, "max_cost is inf"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds is nan"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"backoff_seconds": "1"}, "backoff_seconds is 1"),
        ({"concurrency": True}, "concurrency is True"),
        ({"url": 5}, "judge_url must be"),
        ({"key_env": "sk-canary"}, "judge.key_env must name an environment variable"),
        ({"extra": {"top_p": float("nan")}}, "judge.extra must be JSON"),
        ({"extra": {"stop": [{"a": float("inf")}]}}, "judge.extra must be JSON"),
        ({"extra": {"stop": {"a set"}}}, "judge.extra must be JSON: .*set"),
        ({"extra": {"user": "\ud800"}}, "judge.extra must be JSON"),
        ({"model": "judge\udc00"}, "judge_model and judge.extra must be JSON"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        JudgeSettings(**{"url": "http://host/v1", "model": "judge", **options})
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "MY_KEY"])
def test_a_key_with_a_newline_is_cleaned_and_a_broken_one_refused(
    variable: str, tmp_path: Path, monkeypatch
) -> None:
    named = {"key_env": variable}
    monkeypatch.setenv(variable, f"{KEY}\n")
    with JudgeServer(lambda *_: "[[A]]", key=KEY) as server:
        judge = _judge(server.url.removesuffix("/v1"), tmp_path, **named)
        judge.check()
        assert _ask(judge) == "[[A]]"
        assert server.authorizations == {f"Bearer {KEY}": 1}
        monkeypatch.setenv(variable, f"{KEY}\n{KEY}")
        with pytest.raises(ValueError, match=f"{variable} holds a character") as caught:
            _judge(server.url.removesuffix("/v1"), tmp_path, **named)
    assert "canary" not in str(caught.value)


def test_openais_key_goes_to_no_other_server(tmp_path: Path, monkeypatch, caplog) -> None:
    """Not unasked: the variable may hold a key that has nothing to do with the judge."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(lambda *_: "[[A]]") as server, caplog.at_level(logging.WARNING, "hpd"):
        assert _ask(_judge(server.url.removesuffix("/v1"), tmp_path)) == "[[A]]"
        assert set(server.authorizations) == {None}
    (record,) = caplog.records
    assert "OPENAI_API_KEY is not sent" in record.message
    assert "judge.key_env=OPENAI_API_KEY" in record.message
    assert "canary" not in caplog.text
    with JudgeServer(lambda *_: "[[A]]", key=KEY) as server:
        with pytest.raises(ValueError, match="wants a key .*judge.key_env"):
            _judge(server.url.removesuffix("/v1"), tmp_path).check()
        _judge(server.url.removesuffix("/v1"), tmp_path, key_env="OPENAI_API_KEY").check()


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1", True),
        ("https://API.OpenAI.com:443/v1/chat/completions", True),
        ("http://api.openai.com/v1", False),
        ("https://api.openai.com.example.org/v1", False),
        ("https://notapi.openai.com/v1", False),
        ("https://example.org/api.openai.com", False),
    ],
)
def test_openais_own_addresses(url: str, sent: bool, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert key_of(JudgeSettings(url=url, model="judge")) == (KEY if sent else None)


def test_a_wrong_key_is_said_at_once_and_never_shown(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\r\n")
    with JudgeServer(likes_longer, key="right") as server, caplog.at_level(logging.WARNING, "hpd"):
        judge = _judge(server.url.removesuffix("/v1"), tmp_path, key_env="MY_KEY")
        with pytest.raises(ValueError, match=r"HTTP 401.*bad key Bearer \[key\]") as caught:
            _ask(judge)
        assert len(server.requests) == 1
    assert "canary" not in str(caught.value) + caplog.text


def test_the_command_refuses_a_password_and_keeps_it_nowhere(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hpd.cli import app

    for url in ("http://user:canary@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?api_key=canary"):
        command = ["eval", "folder", "--tasks", "alpaca_eval", "--judge-url", url, "--judge-model", "m"]
        done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
        assert done.exit_code == 2, done.output
        assert "judge_url" in done.output
        assert "canary" not in done.output
    assert not (tmp_path / "out").exists()
