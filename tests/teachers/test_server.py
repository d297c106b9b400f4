"""Training from teachers behind HTTP: exactness, and servers that are slow, failing, restarting, or talk
nonsense."""

import json
import logging
import sys
import threading
import time

import pytest
import torch
import yaml
from helpers.forked import hpd
from helpers.raw_server import answering, raw_server
from helpers.servers import LlamaCppServer, PromptServer, load_backend, served
from helpers.sockets import free_port, padded
from tiny_models import tiny_model, tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.config import TeacherConfig, load_recipe
from hpd.http import Connection, ServerUnavailable
from hpd.losses.heads import TopKScores
from hpd.losses.products import logits
from hpd.methods import METHODS
from hpd.methods.terms import TermConfig
from hpd.teachers import TeacherUnavailable
from hpd.teachers.model import ModelTeacher
from hpd.teachers.remote.server import ServedTeacher, why_not_served
from hpd.training.run import train
from hpd.training.stopping import RunStopped

CANARY = "sk-canary-4f1d9c0b7a"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PROTOCOLS = ["openai", "echo", "sglang"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def prompts(pair):
    return PromptServer(pair[1])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [
        {"prompt": f"say {WORDS[i % 10]}:", "completion": " " + " ".join(WORDS[: 2 + i % 5])}
        for i in range(16)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("hpd.http.connection._FIRST_PAUSE_SECONDS", 0.02)


def top_k_teacher(url, pair, **options):
    defaults = {"model": "tiny", "wait_seconds": 3.0, "timeout_seconds": 5.0, "top_k": 10}
    teacher = ServedTeacher(TeacherConfig(type="server", url=url, **{**defaults, **options}), 300)
    teacher.connect(AutoTokenizer.from_pretrained(pair[0]))
    teacher._client.prepare(torch.device("cpu"))
    return teacher


def live_logprobs(pair, inputs, batch):
    live = ModelTeacher(AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32))
    return logits(
        live.scores({k: v for k, v in inputs.items() if not k.startswith("label")}, batch)
    ).log_softmax(-1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_top_k_and_label_equal_the_live_teachers(pair, prompts, protocol, suffix):
    inputs, batch = padded("left")
    with prompts.running() as url:
        found = top_k_teacher(url + suffix, pair, protocol=protocol).scores(inputs, batch)
    expected = live_logprobs(pair, inputs, batch)
    assert isinstance(found, TopKScores)
    assert torch.equal(found.tokens, expected.topk(10, -1).indices)
    torch.testing.assert_close(found.logprobs, expected.topk(10, -1).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.label_logprobs, expected.gather(1, batch.labels[:, None])[:, 0], rtol=0, atol=1e-5
    )
    assert found.vocab == 300


def recipe(pair, rows, folder, teacher, **changes):
    tree = {
        "student": str(pair[0]),
        "teacher": teacher,
        "data": {"path": str(rows)},
        "output_dir": str(folder),
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "save_strategy": "no",
            "use_cpu": True,
            "metric_stride": 1,
        },
    }
    train_changes = changes.pop("train", {})
    return load_recipe({**tree, **changes, "train": {**tree["train"], **train_changes}})


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def hpd_teacher(url, **options):
    return {
        "type": "server",
        "url": url,
        "protocol": "hpd",
        "wait_seconds": 5.0,
        "timeout_seconds": 10.0,
        **options,
    }


@pytest.mark.parametrize("method", ["hpd", "forward_kl"])
def test_training_from_our_server_equals_training_beside_the_teacher(pair, rows, tmp_path, method):
    options = {"method": method, "train": {"gradient_accumulation_steps": 2}}
    train(recipe(pair, rows, tmp_path / "live", str(pair[1]), **options))
    with served(load_backend(pair[1])) as url:
        train(recipe(pair, rows, tmp_path / "served", hpd_teacher(url), **options))
    live, remote = losses(tmp_path / "live"), losses(tmp_path / "served")
    assert list(live) == [1, 2, 3, 4]
    assert remote == pytest.approx(live, rel=1e-4)
    assert len(json.loads((tmp_path / "served" / "teacher.json").read_text())["fingerprint"]) == 32


def test_training_from_top_k_is_exact_where_it_says_so(pair, rows, prompts, tmp_path):
    terms = [{"objective": "forward_kl", "support": "label+top_k", "top_k": 8}]
    train(recipe(pair, rows, tmp_path / "live", str(pair[1]), terms=terms))
    with prompts.running() as url:
        teacher = {"type": "server", "url": url, "model": "tiny", "top_k": 8}
        train(recipe(pair, rows, tmp_path / "served", teacher, terms=terms))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)


@pytest.mark.parametrize("method", ["masked_sft", "label_forward_kl", "label_reverse_kl", "label_jsd"])
def test_rules_of_the_label_need_its_log_probability_only(pair, rows, prompts, tmp_path, method):
    """Exact from prompt log-probabilities of one token, and accepted without a word about the tail."""
    assert not why_not_served(METHODS[method].terms, 1)
    train(recipe(pair, rows, tmp_path / "live", str(pair[1]), method=method))
    with prompts.running() as url:
        teacher = {"type": "server", "url": url, "model": "tiny", "top_k": 1}
        train(recipe(pair, rows, tmp_path / "served", teacher, method=method))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)


def test_the_next_batch_is_asked_about_while_the_student_works(pair, rows, tmp_path):
    backend = load_backend(pair[1])
    asked = []
    original = backend.answer
    backend.answer = lambda queries: (asked.append(len(queries)), original(queries))[1]
    from hpd.training.trainer import DistillTrainer

    ahead = []
    compute = DistillTrainer.compute_loss

    def slow(self, *args, **kwargs):
        deadline = time.monotonic() + (10.0 if len(ahead) < 3 else 0.0)
        while len(asked) < len(ahead) + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        ahead.append(len(asked) >= len(ahead) + 2)
        return compute(self, *args, **kwargs)

    with served(backend) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", slow)
        train(recipe(pair, rows, tmp_path, hpd_teacher(url)))
    # One question a batch: in step n, which waits here, the answer for step n + 1 is computed.
    assert len(asked) <= len(ahead) + 1, (asked, ahead)
    assert all(ahead[:3])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"objective": "hpd"}, "student draws"),
        ({"objective": "hpd_expected"}, "every token"),
        ({"objective": "forward_kl"}, "every token"),
        ({"objective": "akl", "support": "top_k", "top_k": 30}, "reads 30 tokens"),
        (
            {"objective": "reverse_kl", "support": "top_k", "top_k": 5, "top_k_of": "student"},
            "student's likeliest",
        ),
        ({"objective": "forward_kl", "support": "top_k", "top_k": 5, "temperature": 2.0}, "temperature 2"),
        ({"objective": "forward_kl", "support": "sampled", "draws_of": "teacher"}, "draws from the whole"),
        (
            {
                "objective": "forward_kl",
                "support": "top_k",
                "top_k": 5,
                "temperature": {"schedule": "linear", "start": 1.0, "end": 2.0},
            },
            "temperature 2",
        ),
        ({"objective": "nll"}, None),
        ({"objective": "forward_kl", "support": "label"}, None),
        ({"objective": "reverse_kl", "support": "top_k", "top_k": 20}, None),
        ({"objective": "forward_kl", "support": "label+top_k", "top_k": 20, "tail": "renormalize"}, None),
    ],
)
def test_what_top_k_cannot_tell(config, reason):
    from pydantic import TypeAdapter

    found = why_not_served([TypeAdapter(TermConfig).validate_python(config)], 20)
    assert (reason is None and not found) or reason in found[0]


def test_asking_for_too_much_is_an_error_before_anything_is_loaded(pair, rows, tmp_path):
    """The address leads nowhere: the check must not need the server."""
    teacher = {"type": "server", "url": "http://127.0.0.1:9", "model": "tiny", "wait_seconds": 0.0}
    with pytest.raises(
        ValueError, match="type model, type cached, or a server that hpd serve-teacher.*tail: uniform"
    ):
        train(recipe(pair, rows, tmp_path / "run", teacher))
    assert not (tmp_path / "run").exists()


def test_uniform_tail_is_accepted_on_request_and_logged(pair, rows, prompts, tmp_path, caplog):
    with prompts.running() as url, caplog.at_level(logging.WARNING, "hpd"):
        train(
            recipe(pair, rows, tmp_path, {"type": "server", "url": url, "model": "tiny", "tail": "uniform"})
        )
    assert "tail: uniform approximates" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[0]["teacher_tail_mass"] < 1


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"url": "ftp://x"}, "base address"),
        ({"url": "127.0.0.1:8000"}, "base address"),
        ({"url": "http://h:port"}, "not an address"),
        ({"url": "http://h/v1?key=1"}, "without a query"),
        ({"url": f"http://user:{CANARY}@h"}, "password"),
        ({"api_key_env": CANARY}, "must name an environment variable"),
        ({"api_key_env": "hf_abcdefgh"}, "must name an environment variable"),
        ({"model": None}, "teacher.model is missing"),
        ({"protocol": "hpd", "top_k": 5}, "no effect with protocol hpd"),
        ({"dtype": "bfloat16"}, "dtype has an effect"),
        ({"quantization": "4bit"}, "quantization is for type model or cached, and the type is server"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"concurrency": 0}, "concurrency must be >= 1"),
        ({"type": "model", "url": "http://h"}, "url is for type server, and the type is model"),
    ],
)
def test_mistakes_in_the_recipe(teacher, message):
    tree = {"type": "server", "url": "http://127.0.0.1:1", "model": "tiny", **teacher}
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe({"student": "s", "teacher": tree, "data": {"path": "x"}})
    assert CANARY not in str(caught.value)


def test_another_tokenizer_is_found_by_the_probe(pair, prompts, tmp_path):
    class Reversed:
        def __init__(self, inner):
            self.inner = inner

        def decode(self, ids):
            return self.inner.decode([299 - i for i in ids])

    prompts.tokenizer = Reversed(prompts.tokenizer)
    for protocol in PROTOCOLS:
        with prompts.running() as url, pytest.raises(ValueError, match="its tokenizer is another"):
            top_k_teacher(url, pair, protocol=protocol)


def test_another_vocabulary_is_refused(pair, rows, tmp_path, prompts):
    larger = tiny_model("llama", tmp_path / "larger", vocab=320, role="teacher")
    with (
        served(load_backend(larger)) as url,
        pytest.raises(ValueError, match="300 tokens and the teacher's 320"),
    ):
        train(recipe(pair, rows, tmp_path / "a", hpd_teacher(url)))
    beyond = PromptServer(larger)
    with torch.no_grad():  # a head that likes a token which the student does not have
        beyond.model.lm_head.weight[310] = 0.0
        beyond.model.lm_head.weight[310, 0] = 50.0
    with (
        beyond.running() as url,
        pytest.raises((ValueError, TeacherUnavailable), match="beyond the student's 300"),
    ):
        top_k_teacher(url, pair, wait_seconds=30.0)


def test_what_the_server_refuses_is_an_error_at_once(pair, prompts):
    with prompts.running() as url, pytest.raises(ValueError, match="HTTP 400.*greater than max allowed 20"):
        top_k_teacher(url, pair, top_k=21)
    assert len(prompts.requests) == 1
    with served(load_backend(pair[1])) as url, pytest.raises(ValueError, match="HTTP 404"):
        top_k_teacher(url, pair)
    with prompts.running() as url, pytest.raises((ValueError, TeacherUnavailable), match="HTTP 501"):
        top_k_teacher(url, pair, protocol="hpd", model=None, top_k=None)


# --- a server that only writes


@pytest.fixture
def writes_only(pair):
    return LlamaCppServer(pair[1])


@pytest.mark.parametrize(
    ("protocol", "echo_status", "message"),
    [
        ("openai", 500, r"no prompt_logprobs.*hpd generate, then method: sft"),
        ("echo", 500, r"it refuses echo.*hpd generate, then method: sft"),
        ("echo", 400, r"it refuses echo.*hpd generate, then method: sft"),
        ("sglang", 500, r"HTTP 404"),
    ],
)
def test_a_server_without_log_probabilities_of_prompts_is_no_teacher(
    pair, writes_only, protocol, echo_status, message
):
    writes_only.echo_status = echo_status
    with writes_only.running() as url, pytest.raises(ValueError, match=message) as caught:
        top_k_teacher(url, pair, protocol=protocol, wait_seconds=60.0)
    assert "KeyError" not in str(caught.value)
    assert len(writes_only.requests) == 1  # final: no second attempt


def test_it_ends_a_run_for_good_and_writes_the_data(pair, rows, writes_only, tmp_path):
    """On the command line: exit code 2 and one sentence, before anything is loaded or written; then what the
    sentence recommends."""
    with writes_only.running() as url:
        tree = {
            "student": str(pair[0]),
            "teacher": {"type": "server", "url": url, "model": "tiny"},
            "method": "label_forward_kl",
            "data": {"path": str(rows)},
            "generate": {"output": "made.jsonl", "max_new_tokens": 4, "temperature": 0, "truncated": "keep"},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        train = hpd("train", "recipe.yaml", cwd=tmp_path)
        assert train.returncode == 2, train.stderr
        assert "tells no log-probabilities" in train.stderr
        assert "Resume with" not in train.stderr
        assert not (tmp_path / "runs").exists()
        made = hpd("generate", "recipe.yaml", cwd=tmp_path)
        assert made.returncode == 0, made.stderr
    assert len((tmp_path / "made.jsonl").read_text().splitlines()) == 16


ANSWERS_OF_OTHERS = {
    "echo, completion only": (
        "echo",
        {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0]},
    ),
    "echo, chat's form": ("echo", {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": []}]}),
    "echo, nothing": ("echo", None),
}


@pytest.mark.parametrize("name", ANSWERS_OF_OTHERS)
def test_echo_that_is_ignored_is_no_teacher(pair, prompts, name):
    protocol, logprobs = ANSWERS_OF_OTHERS[name]
    prompts.fault = change(lambda body: [choice.update(logprobs=logprobs) for choice in body["choices"]])
    with prompts.running() as url, pytest.raises(ValueError, match=r"ignores echo.*hpd generate"):
        top_k_teacher(url, pair, protocol=protocol)
    assert len(prompts.requests) == 1


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b'{"object": "list"}', b'{"choices": 5}'])
@pytest.mark.parametrize("protocol", [*PROTOCOLS, "hpd"])
def test_a_probe_that_is_never_understood_is_final(pair, prompts, body, protocol):
    """Exit code 75 would have a scheduler start it again for ever."""
    options = {"model": None, "top_k": None} if protocol == "hpd" else {}
    answers = raw_server(answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body))
    with answers as url, pytest.raises(ValueError, match="bad responses|is not a server that") as caught:
        top_k_teacher(url, pair, protocol=protocol, wait_seconds=60.0, **options)
    assert "Error" not in str(caught.value)


# --- servers that misbehave: (number of the request, right answer) -> what is sent instead


def storm(status, count, headers=None):
    return lambda n, reply: (status, headers or {}, b"busy") if n <= count else reply


def change(edit):
    def fault(n, reply):
        body = json.loads(reply[2])
        edit(body)
        return reply[0], {}, json.dumps(body).encode()

    return fault


def _places(body):
    return body["choices"][0]["prompt_logprobs"]


RECOVERED = {
    "500 storm": storm(500, 4),
    "429 with Retry-After": storm(429, 2, {"retry-after": "0.2"}),
    "503 with a date": storm(503, 2, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "nonsense in Retry-After": storm(503, 2, {"retry-after": "nan"}),
    "cut connection": lambda n, reply: None if n <= 3 else reply,
    "truncated body": lambda n, reply: (200, {}, reply[2][: len(reply[2]) // 2]) if n <= 2 else reply,
    "content-length too long": lambda n, reply: (
        (200, {"content-length": str(len(reply[2]) + 10), "connection": "close"}, reply[2])
        if n <= 1
        else reply
    ),
    "empty body": lambda n, reply: (200, {}, b"") if n <= 2 else reply,
}

GARBAGE = {
    "html": lambda n, reply: (200, {}, b"<html>proxy error</html>"),
    "deeply nested": lambda n, reply: (200, {}, b"[" * 100000),
    "another object": lambda n, reply: (200, {}, b'{"object": "list"}'),
    "a number": lambda n, reply: (200, {}, b"1e999"),
    "no choices": change(lambda body: body.update(choices=[])),
    "missing prompt": change(lambda body: body["choices"].pop()),
    "no prompt_logprobs": change(lambda body: body["choices"][0].update(prompt_logprobs=None)),
    "short": change(lambda body: _places(body).pop()),
    "long": change(lambda body: _places(body).append({"5": {"logprob": -1.0}})),
    "other tokens": change(
        lambda body: _places(body).__setitem__(2, {"7": {"logprob": -1.0}, "8": {"logprob": -2.0}})
    ),
    "few tokens": change(lambda body: [place.popitem() for place in _places(body)[1:] for _ in range(5)]),
    "NaN": change(lambda body: [e.update(logprob=float("nan")) for e in _places(body)[2].values()]),
    "text": change(lambda body: [e.update(logprob="-1.0") for e in _places(body)[2].values()]),
    "positive": change(lambda body: [e.update(logprob=3.0) for e in _places(body)[2].values()]),
    "too much mass": change(lambda body: [e.update(logprob=-0.1) for e in _places(body)[2].values()]),
    "list": change(lambda body: body["choices"][0].update(prompt_logprobs=[None, [1], [2], [3]])),
}


@pytest.mark.parametrize("name", RECOVERED)
def test_failures_that_pass_are_waited_out(pair, prompts, name):
    inputs, batch = padded()
    with prompts.running() as url:
        teacher = top_k_teacher(url, pair, wait_seconds=20.0)
        prompts.requests.clear()
        prompts.fault = RECOVERED[name]
        found = teacher.scores(inputs, batch)
    expected = live_logprobs(pair, inputs, batch)
    torch.testing.assert_close(
        found.label_logprobs, expected.gather(1, batch.labels[:, None])[:, 0], rtol=0, atol=1e-5
    )
    assert len(prompts.requests) > 1


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_ends_in_a_bounded_refusal(pair, prompts, name):
    inputs, batch = padded()
    with prompts.running() as url:
        teacher = top_k_teacher(url, pair)
        prompts.requests.clear()
        prompts.fault = GARBAGE[name]
        with pytest.raises(TeacherUnavailable, match="keeps giving bad responses"):
            teacher.scores(inputs, batch)
        assert len(prompts.requests) == 4
        prompts.fault = None
        assert len(teacher.scores(inputs, batch).label_logprobs) == len(batch.labels)


def test_minus_infinity_is_a_log_probability(pair, prompts):
    inputs, batch = padded()
    with prompts.running() as url:
        teacher = top_k_teacher(url, pair)
        for value in (None, float("-inf"), -9999.0):
            prompts.fault = change(lambda body, v=value: _places(body)[3][str(250)].update(logprob=v))
            found = teacher.scores(inputs, batch)
            assert found.label_logprobs[6] < -9000
            assert torch.isfinite(found.label_logprobs).all()


def test_slow_server_is_bounded_in_time_and_size():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def drip():
            while not stop.is_set():
                listener.settimeout(0.1)
                try:
                    connection = listener.accept()[0]
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
                    while not stop.is_set():
                        try:
                            connection.sendall(b"x")
                        except OSError:
                            break
                        time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            begin = time.monotonic()
            with pytest.raises(ServerUnavailable, match="no whole response in 0.5 s"):
                Connection(address, timeout_seconds=0.5, wait_seconds=0.3).request(
                    "GET", "/", lambda _, body: body, max_bytes=2**30
                )
            assert time.monotonic() - begin < 5
            with pytest.raises(ServerUnavailable, match="more than 3 bytes"):
                Connection(address, timeout_seconds=5, wait_seconds=0.0).request(
                    "GET", "/", lambda _, body: body, max_bytes=3
                )
        finally:
            stop.set()
            thread.join()


def test_redirects_are_not_followed_with_the_key(pair, prompts, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", CANARY)
    with prompts.running() as url, PromptServer(pair[1]).running() as elsewhere:
        prompts.fault = lambda n, reply: (307, {"location": f"{elsewhere}/v1/completions"}, b"")
        with pytest.raises(ValueError, match="HTTP 307"):
            top_k_teacher(url, pair, api_key_env="TEACHER_KEY")


def test_training_stops_with_a_checkpoint_and_goes_on(pair, rows, tmp_path):
    options = {"train": {"gradient_accumulation_steps": 2, "max_steps": 4}}
    with served(load_backend(pair[1])) as url:
        train(recipe(pair, rows, tmp_path / "straight", hpd_teacher(url), **options))
    backend, port = load_backend(pair[1]), free_port()
    teacher = hpd_teacher(f"http://127.0.0.1:{port}", wait_seconds=0.5)
    original, asked = backend.answer, []

    def failing(queries):
        asked.append(1)
        if len(asked) > 3:
            raise RuntimeError("the device is gone")
        return original(queries)

    backend.answer = failing
    config = recipe(pair, rows, tmp_path / "stopped", teacher, **options)
    with (
        served(backend, port=port),
        pytest.raises(RunStopped, match="HTTP 500.*checkpoint of step [123] .*same command"),
    ):
        train(config)
    assert len(list((tmp_path / "stopped").glob("checkpoint-*/trainer_state.json"))) == 1
    assert not (tmp_path / "stopped" / "summary.json").exists()
    backend.answer = original
    with served(backend, port=port):
        summary = train(config)
    assert summary["steps"] == 4
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    final = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "stopped")
    ]
    for name, weight in final[0].items():
        torch.testing.assert_close(final[1][name], weight, rtol=1e-4, atol=1e-5)


def test_a_restart_in_the_middle_goes_unnoticed(pair, rows, tmp_path):
    backend, port = load_backend(pair[1]), free_port()
    config = recipe(pair, rows, tmp_path / "run", hpd_teacher(f"http://127.0.0.1:{port}", wait_seconds=30.0))
    result = []
    first = served(backend, port=port)
    first.__enter__()
    original, asked = backend.answer, threading.Event()
    backend.answer = lambda queries: (asked.set(), time.sleep(0.1), original(queries))[2]
    runner = threading.Thread(target=lambda: result.append(train(config)))
    runner.start()
    assert asked.wait(60)
    first.__exit__(None, None, None)
    time.sleep(0.5)
    with served(backend, port=port):
        runner.join(60)
    assert result
    assert result[0]["steps"] == 4


def test_another_teacher_at_resume_is_an_error(pair, rows, tmp_path):
    other = load_backend(tiny_model("llama", tmp_path / "other", role="teacher", seed=7))
    backend, port = load_backend(pair[1]), free_port()
    config = recipe(
        pair,
        rows,
        tmp_path / "run",
        hpd_teacher(f"http://127.0.0.1:{port}", wait_seconds=0.2),
        train={"max_steps": 3},
    )
    original, asked = backend.answer, []
    backend.answer = lambda q: (
        original(q) if asked.append(1) or len(asked) < 3 else (_ for _ in ()).throw(RuntimeError("x"))
    )
    with served(backend, port=port), pytest.raises(RunStopped):
        train(config)
    with served(other, port=port), pytest.raises(ValueError, match="began with the teacher"):
        train(config)


def test_unavailable_in_an_evaluation_keeps_the_steps(pair, rows, tmp_path):
    """After the last step, with nothing saved yet; the next call only evaluates."""
    backend, port = load_backend(pair[1]), free_port()
    teacher = hpd_teacher(f"http://127.0.0.1:{port}", wait_seconds=0.2)
    config = recipe(
        pair,
        rows,
        tmp_path / "run",
        teacher,
        data={"path": str(rows), "validation": 0.25},
        train={"max_steps": 2},
    )
    original = backend.answer

    def failing_evaluation(queries):
        if (tmp_path / "run" / "metrics.jsonl").is_file() and 2 in losses(tmp_path / "run"):
            raise RuntimeError("gone")
        return original(queries)

    backend.answer = failing_evaluation
    with served(backend, port=port), pytest.raises(RunStopped, match="checkpoint of step 2"):
        train(config)
    backend.answer = original
    with served(backend, port=port):
        summary = train(config)
    assert summary["steps"] == 2
    assert "loss after" in summary
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_the_trainer_can_be_told_to_stop(pair, rows, tmp_path):
    from hpd.training.trainer import DistillTrainer

    with pytest.MonkeyPatch.context() as patch:
        compute = DistillTrainer.compute_loss

        def stop_in_step_2(self, *args, **kwargs):
            if self.state.global_step == 1:
                self.stop_cleanly("Told to.")
            return compute(self, *args, **kwargs)

        patch.setattr(DistillTrainer, "compute_loss", stop_in_step_2)
        with pytest.raises(RunStopped, match=r"Told to\. .*step 2"):
            train(recipe(pair, rows, tmp_path / "run", str(pair[1])))
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").is_file()
    assert train(recipe(pair, rows, tmp_path / "run", str(pair[1])))["steps"] == 4


def test_key_is_in_no_file_and_no_output_and_the_command_says_how_to_go_on(
    pair, rows, tmp_path, monkeypatch, capfd
):
    """A server that repeats the key in its errors, as the best-known one does; the run fails half-way."""
    from typer.testing import CliRunner

    from hpd.cli import app

    server = PromptServer(pair[1], key=CANARY)
    teacher = {"type": "server", "model": "tiny", "api_key_env": "TEACHER_KEY", "wait_seconds": 0.5}
    with server.running() as url:
        tree = {
            "student": str(pair[0]),
            "teacher": {**teacher, "url": url},
            "data": {"path": str(rows)},
            "terms": [{"objective": "forward_kl", "support": "label"}],
            "output_dir": str(tmp_path / "run"),
            "train": {
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "max_length": 64,
                "gradient_checkpointing": False,
            },
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        command = ["train", str(tmp_path / "recipe.yaml")]
        monkeypatch.setattr(sys, "argv", ["hpd", *command])

        def run(key):
            monkeypatch.setenv("TEACHER_KEY", key)
            return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, command)

        server.fault = lambda n, reply: (
            reply if n <= 5 else (500, {}, f"key {CANARY} is over its limit".encode())
        )
        stopped = run(CANARY)
        assert stopped.exit_code == 75, stopped.output
        assert f"Resume with: hpd train {tmp_path / 'recipe.yaml'}" in stopped.output
        assert "key [key] is over its limit" in stopped.output
        assert list((tmp_path / "run").glob("checkpoint-*"))
        server.fault = None
        refused = run(CANARY + "-wrong")
        assert refused.exit_code == 2
        assert "Incorrect API key provided" in refused.output
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]
    assert CANARY not in "".join([stopped.output, refused.output, *capfd.readouterr()])
