"""The client of `hpd serve-teacher` against a server that tells impossible things: each a sentence that names
the server and the field, never a traceback, never scores."""

from __future__ import annotations

import json
import math
import random
import urllib.parse

import httpx2
import pytest
import torch
from helpers.raw_server import raw_server, read_request
from helpers.servers import load_backend, served
from helpers.sockets import ROWS
from tiny_models import tiny_pair
from transformers import AutoTokenizer

from hpd.config import TeacherConfig
from hpd.teachers import TeacherUnavailable
from hpd.teachers.remote.server import ServedTeacher
from hpd.teachers.remote.wire import MEDIA_TYPE, WireRow, dump, load, pack_rows

WIRE_ROWS = [WireRow(row, list(range(1, len(row) - 1))) for row in ROWS]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def student(pair):
    return AutoTokenizer.from_pretrained(pair[0])


@pytest.fixture(scope="module")
def truth(pair):
    """What a real server says, by path."""
    with served(load_backend(pair[1])) as url:
        asked = {"content": dump(pack_rows(WIRE_ROWS)), "headers": {"content-type": MEDIA_TYPE}}
        return {
            "/health": httpx2.get(f"{url}/health").json(),
            "/v1/tokenizer": httpx2.get(f"{url}/v1/tokenizer").json(),
            "/v1/head": load(httpx2.get(f"{url}/v1/head").content),
            "/v1/scores": load(httpx2.post(f"{url}/v1/scores?hidden=float32", **asked).content),
        }


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("hpd.http.connection._FIRST_PAUSE_SECONDS", 0.01)


def telling(answers):
    """A server of these answers: bytes, tensors, or JSON."""

    def script(connection, stop):
        head = read_request(connection)
        answer = answers[urllib.parse.urlsplit(head.split()[1].decode()).path]
        if not isinstance(answer, bytes):
            tensors = isinstance(answer, dict) and any(isinstance(v, torch.Tensor) for v in answer.values())
            answer = dump(answer) if tensors else json.dumps(answer).encode()
        fingerprint = answers["/health"].get("fingerprint") if isinstance(answers["/health"], dict) else "?"
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
            + f"x-hpd-fingerprint: {fingerprint}\r\nContent-Length: {len(answer)}\r\n\r\n".encode()
            + answer
        )

    return raw_server(script)


def run(url, student):
    config = TeacherConfig(type="server", url=url, protocol="hpd", wait_seconds=5.0, timeout_seconds=5.0)
    teacher = ServedTeacher(config, 300)
    try:
        teacher.connect(student)
        teacher._client.prepare(torch.device("cpu"))
        return teacher._client.ask(WIRE_ROWS)
    finally:
        teacher.close()


def test_the_truth_is_accepted(truth, student):
    with telling(truth) as url:
        assert run(url, student)["hidden"].shape == (12, 48)


FACTS = {
    "fingerprint": [None, 5, "", ["a"], "x\x1b[2J", "x" * 10_000],
    "tokenizer": [None, 5, {}, ""],
    "vocab": [None, "300", 300.0, True, -1, 0, 2**60, 1e999, "\ud800"],
    "hidden_size": [None, "48", -48, 0, False, 2**40],
    "dtype": [7, ["float32"]],
    "max_row_tokens": [None, 0, -5, "512", 1e999, float("nan")],
    "max_request_tokens": [None, 0, "x", 2**70],
}


@pytest.mark.parametrize(
    ("field", "value"), [(name, value) for name, many in FACTS.items() for value in many]
)
def test_odd_facts_are_a_sentence(truth, student, field, value):
    with (
        telling({**truth, "/health": {**truth["/health"], field: value}}) as url,
        pytest.raises(ValueError, match=f"The teacher at {url} is not a server .*{field}.*/health") as caught,
    ):
        run(url, student)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("health", [None, [], 5, "ok", {}, [{"status": "ok"}]])
def test_odd_health_is_a_sentence(truth, student, health):
    with telling({**truth, "/health": health}) as url, pytest.raises(ValueError, match="is not a server"):
        run(url, student)


TOKENIZERS = {
    "no object": [1, 2],
    "nothing": {},
    "number": {"json": 5},
    "no JSON": {"json": "{"},
    "another JSON": {"json": "[]"},
    "deep": {"json": "[" * 100_000},
    "no model": {"json": '{"version": "1.0"}'},
    "ids beyond all": {
        "json": '{"model": {"type": "WordLevel", "vocab": {"a": 99999999999}, "unk_token": "a"}}'
    },
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_odd_tokenizers_are_a_sentence(truth, student, name):
    health = {**truth["/health"], "tokenizer": "another"}
    with (
        telling({**truth, "/health": health, "/v1/tokenizer": TOKENIZERS[name]}) as url,
        pytest.raises(ValueError, match=f"The teacher at {url} sends a tokenizer that cannot be built"),
    ):
        run(url, student)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token", 5),
        ("bos_token", {"a": 1}),
        ("pad_token", ["a"]),
        ("chat_template", 5),
        ("chat_template", {"default": 5}),
    ],
)
def test_odd_special_tokens_are_a_sentence(truth, student, field, value):
    health = {**truth["/health"], "tokenizer": "another"}
    tokenizer = {**truth["/v1/tokenizer"], field: value}
    with (
        telling({**truth, "/health": health, "/v1/tokenizer": tokenizer}) as url,
        pytest.raises(ValueError, match=f"{field} is .*, not a text in /v1/tokenizer"),
    ):
        run(url, student)


def test_damaged_tokenizers_never_break_the_client(truth, student):
    from hpd.teachers.remote.hpd_client import _build_tokenizer

    generator = random.Random(0)
    text = truth["/v1/tokenizer"]["json"]
    outcomes = []
    for _ in range(60):
        damaged = list(text)
        for _ in range(generator.randrange(1, 6)):
            damaged[generator.randrange(len(damaged))] = generator.choice('{}[]",:0-9eE\\ax')
        try:
            _build_tokenizer({**truth["/v1/tokenizer"], "json": "".join(damaged)})
            outcomes.append("built")
        except ValueError:
            outcomes.append("refused")
    assert outcomes.count("refused") > 10


F64 = torch.float64
HEADS = {
    "bias NaN": ({"bias": torch.full((300,), math.nan)}, "bias holds NaN"),
    "bias short": ({"bias": torch.zeros(299)}, "bias is float32 of shape"),
    "bias square": ({"bias": torch.zeros(10, 30)}, "bias is float32 of shape"),
    "bias int": ({"bias": torch.zeros(300, dtype=torch.int64)}, "bias is int64"),
    "bias bool": ({"bias": torch.zeros(300, dtype=torch.bool)}, "bias is bool"),
    "scale NaN": ({"scale": torch.tensor(math.nan, dtype=F64)}, "scale holds NaN"),
    "scale inf": ({"scale": torch.tensor(math.inf, dtype=F64)}, "scale holds NaN or inf"),
    "scale zero": ({"scale": torch.tensor(0.0, dtype=F64)}, "scale is 0"),
    "scale negative": ({"scale": torch.tensor(-1.0, dtype=F64)}, "scale is -1"),
    "scale int": ({"scale": torch.tensor(1)}, "scale is int64"),
    "scale vector": ({"scale": torch.ones(2, dtype=F64)}, "scale is float64 of shape"),
    "no scale": ({"scale": None}, "no tensor 'scale'"),
    "softcap zero": ({"softcap": torch.tensor(0.0, dtype=F64)}, "softcap is 0"),
    "softcap NaN": ({"softcap": torch.tensor(math.nan, dtype=F64)}, "softcap holds NaN"),
    "softcap int": ({"softcap": torch.tensor(30)}, "softcap is int64"),
    "weight int": ({"weight": torch.ones(300, 48, dtype=torch.int32)}, "weight is int32"),
    "weight bool": ({"weight": torch.ones(300, 48, dtype=torch.bool)}, "weight is bool"),
    "weight half": ({"weight": torch.ones(300, 48, dtype=torch.float16)}, "weight is float16"),
    "weight turned": ({"weight": torch.ones(48, 300)}, r"weight is float32 of shape \(48, 300\)"),
    "weight inf": ({"weight": torch.full((300, 48), math.inf)}, "weight holds NaN or inf"),
    "no weight": ({"weight": None}, "no tensor 'weight'"),
    "too long": ({"more": torch.zeros(10**6)}, "more than"),
}


def changed(tensors, changes):
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


@pytest.mark.parametrize("name", HEADS)
def test_impossible_heads_are_refused(truth, student, name):
    changes, message = HEADS[name]
    with (
        telling({**truth, "/v1/head": changed(truth["/v1/head"], changes)}) as url,
        pytest.raises(TeacherUnavailable, match=f"The teacher at {url}/v1/head .*bad responses.*{message}"),
    ):
        run(url, student)


ANSWERS = {
    "log Z far below": ({"log_z": torch.full((12,), -1e30)}, "log_z is -1e"),
    "log Z far above": ({"log_z": torch.full((12,), 1e30)}, "log_z is 1e"),
    "log Z NaN": ({"log_z": torch.full((12,), math.nan)}, "log_z holds NaN"),
    "log Z double": ({"log_z": torch.zeros(12, dtype=F64)}, "log_z is float64"),
    "log Z int": ({"log_z": torch.zeros(12, dtype=torch.int64)}, "log_z is int64"),
    "log Z short": ({"log_z": torch.zeros(11)}, "log_z is float32 of shape"),
    "hidden huge": ({"hidden": torch.full((12, 48), 3e38)}, "overflow"),
    "hidden bool": ({"hidden": torch.ones(12, 48, dtype=torch.bool)}, "hidden is bool"),
    "hidden short": ({"hidden": torch.ones(11, 48)}, "hidden is float32 of shape"),
    "hidden inf": ({"hidden": torch.full((12, 48), -math.inf)}, "hidden holds NaN or inf"),
    "too long": ({"more": torch.zeros(10**5)}, "more than"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_impossible_scores_are_refused(truth, student, name):
    changes, message = ANSWERS[name]
    with (
        telling({**truth, "/v1/scores": changed(truth["/v1/scores"], changes)}) as url,
        pytest.raises(TeacherUnavailable, match=f"The teacher at {url}/v1/scores .*bad responses.*{message}"),
    ):
        run(url, student)


def test_log_z_at_its_bound_is_accepted_in_every_precision():
    """Heads and states for which log Z is as far from log V as it can be, and rounded as on the wire."""
    from hpd.losses import Head
    from hpd.teachers.remote.hpd_client import _bounds_of, _check_log_z

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (0.01, 1.0, 30.0):
            direction = torch.randn(48, generator=generator)
            weight = direction.repeat(300, 1)  # every row along the state: each logit is at its bound
            hidden = torch.stack([direction, -direction]) * size
            log_z = torch.logsumexp(hidden.to(dtype).float() @ weight.T, -1)
            rounded = Head(weight.to(dtype), torch.zeros(300), 1.0, None)
            _check_log_z(hidden.to(dtype), log_z, _bounds_of(rounded), 300)
            with pytest.raises(ValueError, match="log_z"):
                _check_log_z(hidden.to(dtype), 1.1 * log_z + 20, _bounds_of(rounded), 300)
