"""`hpd serve-teacher` and its client over real sockets: exact answers, and what attackers would send."""

import contextlib
import json
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import chain

import httpx2
import pytest
import torch
from helpers.servers import load_backend, served
from helpers.sockets import ROWS, free_port, padded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_models import ARCHITECTURES, tiny_model, tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.batch import IGNORE_INDEX, TokenBatch, token_batch
from hpd.config import TeacherConfig
from hpd.losses.products import logits
from hpd.teachers import TeacherUnavailable
from hpd.teachers.model import ModelTeacher
from hpd.teachers.remote.serve import ServeSettings, is_loopback
from hpd.teachers.remote.server import ServedTeacher
from hpd.teachers.remote.wire import MEDIA_TYPE, WireRow, dump, load, rows_of

TOKEN = "a-token-of-more-than-16-characters"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def backend(pair):
    return load_backend(pair[1])


@pytest.fixture(scope="module")
def url(backend):
    with served(backend) as address:
        yield address


def teacher(url, student_dir, **options):
    config = TeacherConfig(
        type="server", url=url, protocol="hpd", **{"wait_seconds": 2.0, "timeout_seconds": 10.0, **options}
    )
    connected = ServedTeacher(config, 300)
    connected.connect(AutoTokenizer.from_pretrained(student_dir))
    connected._client.prepare(torch.device("cpu"))
    return connected


@pytest.mark.parametrize("layout", ["right", "left", "free"])
def test_rows_are_those_of_the_batch_in_every_layout(layout):
    inputs, batch = padded(layout, free_of_padding=layout == "free")
    rows = rows_of(inputs, batch)
    assert [row.tokens for row in rows] == ROWS
    assert [row.labels for row in rows] == [row[2:] for row in ROWS]
    assert list(chain(*(row.labels for row in rows))) == batch.labels.tolist()


@pytest.mark.parametrize("layout", ["right", "free"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_served_scores_equal_the_live_teachers(tmp_path_factory, architecture, layout):
    folder = tiny_model(architecture, tmp_path_factory.mktemp(architecture), role="teacher")
    inputs, batch = padded(layout, free_of_padding=layout == "free")
    live = ModelTeacher(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    expected = logits(
        live.scores({k: v for k, v in inputs.items() if not k.startswith("label")}, batch)
    ).log_softmax(-1)
    with served(load_backend(folder)) as address:
        client = teacher(address, folder)
        found = client.scores(inputs, batch)
        client.close()
    full = logits(found)
    torch.testing.assert_close(full.log_softmax(-1), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.log_z, full.logsumexp(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_half_precision_on_the_wire_stays_within_its_tolerance(url, pair, dtype, tolerance):
    """Nats of any token's log-probability; documented in docs/reference/teacher-servers.md."""
    inputs, batch = padded()
    exact, rough = teacher(url, pair[0]), teacher(url, pair[0], dtype=dtype)
    a, b = (logits(client.scores(inputs, batch)).log_softmax(-1) for client in (exact, rough))
    error = (a - b).abs().max()
    assert 0 < error < tolerance
    assert rough.scores(inputs, batch).hidden.dtype == getattr(torch, dtype)


def test_top_k_of_the_server(url, pair):
    inputs, batch = padded()
    expected = logits(teacher(url, pair[0]).scores(inputs, batch)).log_softmax(-1).topk(5, -1)
    found = load(httpx2.post(f"{url}/v1/scores?top_k=5", content=query(), headers=BINARY).content)
    assert torch.equal(found["top_tokens"], expected.indices)
    torch.testing.assert_close(found["top_logprobs"], expected.values, rtol=0, atol=1e-5)


def test_a_batch_without_labels_has_empty_scores(url, pair):
    inputs, _ = padded()
    inputs = {k: v for k, v in inputs.items() if not k.startswith("label_")}
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
    batch = token_batch(inputs)
    found = teacher(url, pair[0]).scores(inputs, batch)
    assert found.hidden.shape == (0, 48)
    assert found.log_z.shape == (0,)


BINARY = {"content-type": MEDIA_TYPE}


def query(rows=ROWS, **changes):
    tensors = {
        "input_ids": torch.tensor(list(chain(*rows))),
        "lengths": torch.tensor([len(row) for row in rows]),
        "positions": torch.tensor(list(chain(*(range(1, len(row) - 1) for row in rows)))),
        "counts": torch.tensor([len(row) - 2 for row in rows]),
    }
    return save({name: t for name, t in {**tensors, **changes}.items() if t is not None})


MALFORMED = {
    "empty": b"",
    "text": b"hello",
    "header longer than the body": (2**40).to_bytes(8, "little") + b"{}",
    "negative header": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "deep json": (200000).to_bytes(8, "little") + b"[" * 200000,
    "offsets outside": (lambda h: len(h).to_bytes(8, "little") + h)(
        json.dumps({"input_ids": {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}}).encode()
    ),
    "pickle": pickle.dumps({"input_ids": [1, 2, 3]}),
    "missing tensor": query(counts=None),
    "unknown tensor": query(extra=torch.tensor([1])),
    "float ids": query(input_ids=torch.rand(18)),
    "matrix of ids": query(input_ids=torch.zeros(2, 9, dtype=torch.int64)),
    "no ids": query(input_ids=torch.zeros(0, dtype=torch.int64)),
    "negative id": query(input_ids=torch.tensor([-1] * 18)),
    "id beyond the vocabulary": query(input_ids=torch.tensor([300] * 18)),
    "length zero": query(lengths=torch.tensor([0, 9, 9])),
    "lengths that overflow": query(lengths=torch.tensor([2**62, 2**62, 18 - 2**63])),
    "lengths of other rows": query(lengths=torch.tensor([9, 10])),
    "position beyond its row": query(positions=torch.tensor([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])),
    "negative position": query(positions=torch.tensor([-1] * 12)),
    "counts that do not add up": query(counts=torch.tensor([12, 12, 12])),
    "negative counts": query(counts=torch.tensor([-1, 12, 1])),
    "tokens to be scored, as earlier clients could ask": query(tokens=torch.zeros(12, 1, dtype=torch.int64)),
    "row longer than the model's context": query([[1] * 513]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_and_the_server_lives(url, name):
    answer = httpx2.post(f"{url}/v1/scores?hidden=float32", content=MALFORMED[name], headers=BINARY)
    assert answer.status_code == 422, (name, answer.text)
    assert answer.json()["detail"]
    assert httpx2.post(f"{url}/v1/scores?hidden=float32", content=query(), headers=BINARY).status_code == 200


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 10**6),
    value=st.integers(0, 255),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
    noise=st.binary(),
)
def test_damaged_bytes_never_break_the_server(url, place, value, cut, noise):
    body = bytearray(query())
    body[place % len(body)] = value
    body = bytes(body)[: cut % len(body)] if cut is not None else bytes(body) + noise[:8]
    assert CLIENT.post(
        f"{url}/v1/scores?hidden=float32&top_k=3", content=body, headers=BINARY
    ).status_code in (200, 422)


CLIENT = httpx2.Client()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/../../etc/passwd", 404),
        ("GET", "/v1/head/..%2f..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/head?dtype=int8", 422),
        ("GET", "/v1/head?dtype=../../x", 422),
        ("GET", "/v1/scores", 405),
        ("DELETE", "/v1/head", 405),
        ("POST", "/v1/scores?top_k=99999999", 422),
        ("POST", "/v1/scores?top_k=-1", 422),
        ("POST", "/v1/scores?hidden=complex64", 422),
    ],
)
def test_unknown_paths_and_values(url, method, path, status):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as raw:  # no client tidies the path up
        body = query() if method == "POST" else b""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {MEDIA_TYPE}\r\nConnection: close\r\n"
        )
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer[:200]
    assert b"root:" not in answer


def test_other_content_types_and_hosts_are_refused(url):
    assert (
        httpx2.post(f"{url}/v1/scores", content=query(), headers={"content-type": "text/plain"}).status_code
        == 415
    )
    assert httpx2.get(f"{url}/health", headers={"host": "attacker.example"}).status_code == 400


def test_large_requests_are_cut_short(backend):
    with served(backend, max_body_bytes=4096, max_request_tokens=100) as address:
        assert httpx2.post(f"{address}/v1/scores", content=b"x" * 5000, headers=BINARY).status_code == 413
        sent = []
        endless = (sent.append(1) or b"x" * 1000 for _ in range(10**9))
        with contextlib.suppress(httpx2.TransportError):  # the server closes while we still send
            assert httpx2.post(f"{address}/v1/scores", content=endless, headers=BINARY).status_code == 413
        assert len(sent) < 10**5
        long = query([[1] * 60, [2] * 60])
        refused = httpx2.post(f"{address}/v1/scores?hidden=float32", content=long, headers=BINARY)
        assert refused.status_code == 422
        assert "at most 100" in refused.json()["detail"]
        for lie in ("-5", "abc", "1e3"):
            assert _raw(
                address, f"POST /v1/scores HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {lie}\r\n\r\n"
            ).startswith(b"HTTP/1.1 4")
        assert (
            httpx2.post(f"{address}/v1/scores?hidden=float32", content=query(), headers=BINARY).status_code
            == 200
        )


def _raw(address, text):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as raw:
        raw.sendall(text.encode())
        return raw.recv(65536)


def test_token_is_needed_everywhere_but_for_the_bare_health(backend, pair):
    with served(backend, token=TOKEN) as address:
        assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
        for wrong in (
            "",
            "Bearer",
            f"bearer{TOKEN}",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            "Basic abc",
            "Bearer é",
        ):
            headers = {**BINARY, "authorization": wrong.encode()}
            assert httpx2.get(f"{address}/health", headers=headers).json() == {"status": "ok"}
            for method, path in (("GET", "/v1/head"), ("GET", "/v1/tokenizer"), ("POST", "/v1/scores")):
                answer = httpx2.request(method, address + path, content=query(), headers=headers)
                assert answer.status_code == 401, (wrong, path)
                assert TOKEN not in answer.text
        right = httpx2.get(f"{address}/health", headers={"authorization": f"Bearer {TOKEN}"}).json()
        assert right["vocab"] == 300
        assert len(right["fingerprint"]) == 32
        with pytest.raises(ValueError, match="wants a token.*api_key_env"):
            teacher(address, pair[0])


def test_client_shows_its_token(backend, pair, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", TOKEN)
    inputs, batch = padded()
    with served(backend, token=TOKEN) as address:
        assert teacher(address, pair[0], api_key_env="TEACHER_KEY").scores(inputs, batch).hidden.shape == (
            len(batch.labels),
            48,
        )
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ValueError, match="TEACHER_KEY, which is not set"):
        teacher(address, pair[0], api_key_env="TEACHER_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "reachable from other machines.*HPD_SERVE_TOKEN"),
        ({"host": "::"}, "reachable from other machines"),
        ({"host": "teacher.example"}, "reachable from other machines"),
        ({"host": "0.0.0.0", "token": "short"}, "shorter than 16"),
        ({"max_waiting": 0}, "max_waiting"),
    ],
)
def test_unsafe_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServeSettings(**options).check()


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "10.0.0.1", "::", "example.org", "127.0.0.1.example.org", ""))
    )
    ServeSettings(host="0.0.0.0", token=TOKEN).check()


def test_another_tokenizer_is_rebuilt_and_differs(url, tmp_path):
    from hpd.models.pairing import first_difference

    tiny_model("llama", tmp_path)
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = changed["model"]["vocab"]
    first, second = [token for token, i in vocab.items() if i in (60, 61)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    student = AutoTokenizer.from_pretrained(tmp_path)
    client = teacher(url, tmp_path)
    assert client.tokenizer is not student
    assert client.tokenizer.eos_token == student.eos_token
    assert first_difference(student, client.tokenizer) == 60
    assert client.config.get_text_config().vocab_size == 300


def test_concurrent_requests_share_forwards_and_get_their_own_answers(backend, url, pair):
    alone = [teacher(url, pair[0]) for _ in range(2)]
    batches = [
        padded(rows=[[(7 * i + j) % 290 for j in range(4 + i % 5)] for i in range(n, n + 3)])
        for n in range(12)
    ]
    expected = [alone[0].scores(*b).hidden for b in batches]
    found = [None] * len(batches)

    def ask(i):
        found[i] = alone[1].scores(*batches[i]).hidden

    calls = []
    original = backend.answer
    backend.answer = lambda queries: (calls.append(len(queries)), time.sleep(0.02), original(queries))[2]
    try:
        client = alone[1]
        for inputs, batch in batches:
            inputs["asked"] = client.ask(inputs, batch)
        for i in range(len(batches)):
            ask(i)
    finally:
        del backend.answer
    assert sum(calls) == len(batches)
    assert max(calls) > 1
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_full_queue_sends_away_and_the_client_comes_back(pair):
    slow = load_backend(pair[1])
    original = slow.answer
    slow.answer = lambda queries: (time.sleep(0.3), original(queries))[1]
    with served(slow, max_waiting=1) as address:
        statuses, waits = [], []

        def post():
            answer = httpx2.post(
                f"{address}/v1/scores?hidden=float32", content=query(), headers=BINARY, timeout=20
            )
            statuses.append(answer.status_code)
            waits.append(answer.headers.get("retry-after"))

        threads = [threading.Thread(target=post) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses.count(503) >= 1
        assert statuses.count(200) >= 1
        assert all(int(w) >= 1 for w, s in zip(waits, statuses, strict=True) if s == 503)
        client = teacher(address, pair[0], wait_seconds=20.0, concurrency=4)
        batches = [padded(rows=[[n, n + 1, n + 2, n + 3]]) for n in range(4)]
        for inputs, batch in batches:
            inputs["asked"] = client.ask(inputs, batch)
        assert all(client.scores(*b).hidden.shape == (2, 48) for b in batches)


def test_a_failing_model_fails_its_request_only(pair):
    broken = load_backend(pair[1])
    original = broken.answer
    with served(broken) as address:
        broken.answer = lambda queries: (_ for _ in ()).throw(RuntimeError("out of memory at 0xdeadbeef"))
        answer = httpx2.post(f"{address}/v1/scores?hidden=float32", content=query(), headers=BINARY)
        assert answer.status_code == 500
        assert "0xdeadbeef" not in answer.text
        broken.answer = original
        assert (
            httpx2.post(f"{address}/v1/scores?hidden=float32", content=query(), headers=BINARY).status_code
            == 200
        )


def test_a_teacher_that_overflows_says_so(pair):
    broken = load_backend(pair[1])
    with torch.no_grad():
        broken._teacher.model.get_input_embeddings().weight[9] = float("nan")
    with served(broken) as address:
        answer = httpx2.post(f"{address}/v1/scores?hidden=float32", content=query(), headers=BINARY)
        assert answer.status_code == 500
        assert "NaN" in answer.json()["detail"]
        fine = httpx2.post(
            f"{address}/v1/scores?hidden=float32", content=query([[80, 81, 82]]), headers=BINARY
        )
        assert fine.status_code == 200


def test_a_server_restarted_with_another_model_is_noticed(backend, pair, tmp_path):
    inputs, batch = padded()
    with served(backend) as address:
        client = teacher(address, pair[0], wait_seconds=20.0)
        client.scores(inputs, batch)
        port = int(address.rsplit(":", 1)[1])
    with served(backend, port=port):
        client.scores(inputs, batch)  # the same model: its restart goes unnoticed
    other = load_backend(tiny_model("llama", tmp_path, role="teacher", seed=5))
    with served(other, port=port), pytest.raises(TeacherUnavailable, match="another model than at the start"):
        client.scores(inputs, batch)


def test_fuzzed_answers_are_bad_answers(url, pair):
    """The client's side of the binary protocol: damaged bytes never become scores of the wrong shape, or
    NaN."""
    rows = [WireRow(row, list(range(1, len(row) - 1))) for row in ROWS]
    body = httpx2.post(f"{url}/v1/scores?hidden=float32", content=query(), headers=BINARY).content
    client = teacher(url, pair[0])._client
    generator = random.Random(0)
    sent = {}

    class Response:
        headers = {"x-hpd-fingerprint": client.fingerprint}  # noqa: RUF012

    class Connection:
        url = "http://fake"

        def request(self, method, path, read, **options):
            return read(Response(), sent["body"])

    client._connection = Connection()
    outcomes = []
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        sent["body"] = bytes(damaged)[: generator.choice([len(damaged), generator.randrange(len(damaged))])]
        try:
            answer = client.ask(rows)
        except ValueError:
            outcomes.append("refused")
            continue
        outcomes.append("accepted")
        assert answer["hidden"].shape == (12, 48)
        assert torch.isfinite(answer["hidden"]).all()
        assert torch.isfinite(answer["log_z"]).all()
    assert outcomes.count("refused") > 100


@pytest.mark.slow
def test_command_serves_and_sigterm_finishes_what_is_in_flight(pair):
    port = free_port()
    command = [sys.executable, "-m", "hpd", "serve-teacher", str(pair[1]), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert "fingerprint" in process.stdout.readline()
            wait_for(f"http://127.0.0.1:{port}/health")
            # A body that is still on its way when the signal comes.
            body = query()
            with socket.create_connection(("127.0.0.1", port), 10) as raw:
                head = "POST /v1/scores?hidden=float32 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                head += f"Content-Type: {MEDIA_TYPE}\r\n"
                raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:20])
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
                raw.sendall(body[20:])
                answer = b"".join(iter(lambda: raw.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 200")
            assert load(answer.split(b"\r\n\r\n", 1)[1])["hidden"].shape == (12, 48)
            # uvicorn raises the signal again once it has stopped, so that a supervisor sees what ended it.
            assert process.wait(20) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def wait_for(address):
    for _ in range(200):
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(address).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"{address} does not answer")


def test_command_refuses_an_open_door(pair, monkeypatch):
    from typer.testing import CliRunner

    from hpd.cli import app

    monkeypatch.delenv("HPD_SERVE_TOKEN", raising=False)
    done = CliRunner().invoke(app, ["serve-teacher", str(pair[1]), "--host", "0.0.0.0"])
    assert done.exit_code == 2
    assert "reachable from other machines" in " ".join(done.output.split())


def test_batch_survives_duplicate_and_repeated_requests(url, pair):
    client = teacher(url, pair[0])
    inputs, batch = padded()
    handles = [client.ask(inputs, batch) for _ in range(2)]
    first, second = (client.scores({**inputs, "asked": handle}, batch) for handle in handles)
    again = client.scores(inputs, batch)
    torch.testing.assert_close(first.hidden, second.hidden, rtol=0, atol=1e-6)
    torch.testing.assert_close(first.hidden, again.hidden, rtol=0, atol=1e-6)
    assert isinstance(batch, TokenBatch)
    assert dump({"a": torch.zeros(1)})
