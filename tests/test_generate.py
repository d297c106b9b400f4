"""`hpd generate`: real tiny models, real files, kills at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from tiny_models import tiny_pair

from hpd import generate as module
from hpd.config import load_recipe
from hpd.data import load_prompts, load_rows
from hpd.generate import generate
from hpd.generation.engine import TransformersEngine
from hpd.progress import Progress

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [{"prompt": f"say {word}:", "completion": f" #### {i}"} for i, word in enumerate(WORDS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)


def recipe(pair, rows, output, teacher=None, data=None, **settings):
    return load_recipe(
        {
            "student": str(pair[0]),
            "teacher": teacher or str(pair[1]),
            "data": data or {"path": str(rows)},
            "generate": {"output": str(output), "max_new_tokens": 12, "truncated": "keep", **settings},
        }
    )


class Interrupt(Progress):
    def __init__(self, after):
        self.after = after

    def bar(self, name):
        def advance(done, total, note=""):
            if done >= self.after:
                raise KeyboardInterrupt

        return advance


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_completions_are_in_the_training_format_with_their_provenance(pair, rows, tmp_path):
    output = tmp_path / "made.jsonl"
    summary = generate(recipe(pair, rows, output, samples=3, seed=7, top_k=50, top_p=0.9))
    made = lines(output)
    assert len(made) == summary["rows"] == 30 - summary["empty"]
    assert {(row["source_row"], row["sample"]) for row in made} <= {
        (i, j) for i in range(10) for j in range(3)
    }
    first = made[0]
    assert first["prompt"] == "say one:"
    assert first["model"] == str(pair[1])
    assert (first["seed"], first["temperature"], first["top_k"], first["top_p"]) == (7, 1.0, 50, 0.9)
    assert len({row["completion"] for row in made}) > 15
    assert not output.with_name("made.jsonl.part").exists()
    assert json.loads(output.with_name("made.jsonl.summary.json").read_text())["rows"] == len(made)
    trained = load_rows(load_recipe({"student": "s", "teacher": "t", "data": {"path": str(output)}}).data)
    assert set(trained.train.column_names) == {"prompt", "completion"}


@pytest.mark.parametrize("kept", [{}, {"logprobs": True}])
def test_a_batch_is_as_large_as_asked_for_and_changes_nothing(pair, rows, tmp_path, monkeypatch, kept):
    written = []
    write = TransformersEngine.write

    def noted(engine, prompts, *rest):
        written.append(len(prompts))
        return write(engine, prompts, *rest)

    monkeypatch.setattr(TransformersEngine, "write", noted)
    texts = []
    for size, expected in ((3, [3, 1] * 5), (8, [8, 8, 4]), (20, [20])):
        output, written[:] = tmp_path / f"{size}.jsonl", []
        generate(recipe(pair, rows, output, samples=2, batch_size=size, **kept))
        assert written == expected
        name = "input_ids" if kept else "completion"
        texts.append([(row["source_row"], row["sample"], row[name]) for row in lines(output)])
    assert texts[0] == texts[1] == texts[2]
    assert len({str(text) for *_, text in texts[0]}) > 10


def test_a_resumed_call_repeats_the_same_batches(pair, rows, tmp_path, monkeypatch):
    """Other batches round otherwise, and now and then that draws another token."""
    straight, output, written = tmp_path / "a.jsonl", tmp_path / "b.jsonl", []
    generate(recipe(pair, rows, straight, samples=2, batch_size=8))
    with pytest.raises(KeyboardInterrupt):
        generate(recipe(pair, rows, output, samples=2, batch_size=8), progress=Interrupt(12))
    assert len(output.with_name("b.jsonl.part").read_text().splitlines()) == 1 + 3
    write = TransformersEngine.write

    def noted(engine, prompts, *rest):
        written.append(len(prompts))
        return write(engine, prompts, *rest)

    monkeypatch.setattr(TransformersEngine, "write", noted)
    generate(recipe(pair, rows, output, samples=2, batch_size=8))
    assert written == [8, 4]  # the third chunk again, in the batch of the fourth
    assert output.read_bytes() == straight.read_bytes()


def test_conversations_stay_conversations(pair, tmp_path):
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "say two"}, {"role": "assistant", "content": "two"}]
    data.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]}) + "\n")
    output = tmp_path / "made.jsonl"
    settings = {"path": str(data), "system_prompt": "Be brief."}
    generate(recipe(pair, None, output, data=settings, temperature=0))
    made = lines(output)
    assert [turn["role"] for turn in made[0]["prompt"]] == ["system", "user"]
    assert made[0]["completion"][0]["role"] == "assistant"
    assert made[0]["completion"] == made[1]["completion"]  # greedy, on the same prompt
    prompts = load_prompts(load_recipe({"student": "s", "teacher": "t", "data": settings}).data)
    assert [row.reference for row in prompts] == ["two", None]


def test_interrupted_and_resumed_equals_undisturbed(pair, rows, tmp_path):
    undisturbed, output = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    generate(recipe(pair, rows, undisturbed, samples=2))
    part = tmp_path / "b.jsonl.part"

    with pytest.raises(KeyboardInterrupt):
        generate(recipe(pair, rows, output, samples=2), progress=Interrupt(8))
    assert not output.exists()
    whole = part.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 30, whole.index(b"\n") + 1, 10, 0):
        part.write_bytes(whole[:cut])
        generate(recipe(pair, rows, output, samples=2))
        assert output.read_bytes() == undisturbed.read_bytes()
        output.unlink()
    head, *chunks = whole.decode().splitlines()
    earlier = [json.dumps(json.loads(chunk)["completions"]) for chunk in chunks]  # without their numbers
    part.write_text("\n".join([head, *earlier]) + "\n")
    generate(recipe(pair, rows, output, samples=2))
    assert output.read_bytes() == undisturbed.read_bytes()


@pytest.mark.slow
def test_killed_at_random_moments_equals_undisturbed(pair, rows, tmp_path):
    tree = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": str(rows)},
        "generate": {
            "output": "made.jsonl",
            "samples": 24,
            "max_new_tokens": 24,
            "truncated": "keep",
            "batch_size": 2,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "hpd", "generate", str(tmp_path / "recipe.yaml")]
    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    done = subprocess.run(command, cwd=tmp_path / "straight", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "completions" in done.stdout
    part = tmp_path / "killed" / "made.jsonl.part"
    sizes = random.Random(0).sample(range(10, 3000), 4)
    for size in sizes:  # as soon as the part is that long
        process = subprocess.Popen(
            command, cwd=tmp_path / "killed", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while (
            process.poll() is None
            and not (part.exists() and part.stat().st_size > size)
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    again = subprocess.run(command, cwd=tmp_path / "killed", capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "killed" / "made.jsonl").read_bytes() == (
        tmp_path / "straight" / "made.jsonl"
    ).read_bytes()


def test_nothing_is_overwritten_or_mixed(pair, rows, tmp_path):
    output = tmp_path / "made.jsonl"
    generate(recipe(pair, rows, output, temperature=0))
    before = output.read_bytes()
    with pytest.raises(ValueError, match="exists.*--overwrite"):
        generate(recipe(pair, rows, output, temperature=0))
    assert output.read_bytes() == before

    with pytest.raises(KeyboardInterrupt):
        generate(recipe(pair, rows, output, seed=1), overwrite=True, progress=Interrupt(0))
    assert output.read_bytes() == before  # replaced at the end, or not at all
    output.unlink()
    with pytest.raises(ValueError, match="other settings"):
        generate(recipe(pair, rows, output, seed=2))
    generate(recipe(pair, rows, output, seed=2), overwrite=True)
    assert {row["seed"] for row in lines(output)} == {2}


def test_filters_count_what_they_drop(pair, rows, tmp_path):
    everything, cut = tmp_path / "all.jsonl", tmp_path / "cut.jsonl"
    whole = generate(recipe(pair, rows, everything, samples=4))
    dropped = generate(recipe(pair, rows, cut, samples=4, truncated="drop"))
    assert whole["truncated"] == dropped["truncated"] > 0
    kept = [row for row in lines(everything) if row["finish_reason"] == "stop"]
    assert lines(cut) == kept
    assert all(row["finish_reason"] in ("stop", "length") for row in lines(everything))


def test_a_file_without_a_row_is_an_error_that_names_the_setting(pair, rows, tmp_path):
    output = tmp_path / "made.jsonl"
    given = {"samples": 2, "max_new_tokens": 1, "truncated": "drop", "top_k": 1, "seed": 3}
    with pytest.raises(ValueError, match=r"None of 20 .* cut at generate.max_new_tokens 1.*truncated=keep"):
        generate(recipe(pair, rows, output, **given))
    assert not output.exists()
    # What was written is not lost: the same completions, kept.
    assert generate(recipe(pair, rows, output, **{**given, "truncated": "keep"}))["rows"] == 20


class ScriptedServer:
    """/v1/completions that answers from the token ids and the seed it gets."""

    def __init__(self):
        self.requests, self.fail = [], 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): ...

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.requests.append(request)
                status, body = 200, outer.answer(request)
                if outer.fail:
                    outer.fail -= 1
                    status, body = 503, b"busy"
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request):
        text = f" the answer is {request['seed'] % 10}"
        choice = {"index": 0, "text": text, "finish_reason": "length" if request["seed"] % 7 == 0 else "stop"}
        return json.dumps({"choices": [choice], "usage": {"completion_tokens": 4}}).encode()


@pytest.fixture
def scripted():
    server = ScriptedServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_a_server_writes_and_right_answers_are_kept(pair, rows, tmp_path, scripted):
    scripted.fail = 3
    teacher = {"type": "server", "url": scripted.url, "model": "tiny", "wait_seconds": 20.0}
    output = tmp_path / "made.jsonl"
    summary = generate(
        recipe(pair, rows, output, teacher, samples=6, filter="correct", truncated="drop", top_k=5)
    )
    made = lines(output)
    assert summary["rows"] + summary["wrong"] + summary["truncated"] == 60
    assert summary["rows"] > 0
    assert summary["wrong"] > 0
    for row in made:
        assert row["completion"].endswith(str(row["source_row"]))
    answered = scripted.requests
    assert len({request["seed"] for request in answered}) == 60
    assert all(request["prompt"] and isinstance(request["prompt"][0], int) for request in answered)
    assert {request["top_k"] for request in answered} == {5}
    once = output.read_bytes()
    output.unlink()
    generate(recipe(pair, rows, output, teacher, samples=6, filter="correct", truncated="drop", top_k=5))
    assert output.read_bytes() == once


def test_a_server_is_asked_for_as_many_at_once_as_the_teacher_allows(pair, rows, tmp_path, scripted):
    together, good = threading.Barrier(10), scripted.answer

    def answer(request):
        together.wait(timeout=30)  # with fewer at once nobody is answered
        return good(request)

    scripted.answer = answer
    teacher = {"type": "server", "url": scripted.url, "model": "tiny", "wait_seconds": 2.0, "concurrency": 10}
    generate(recipe(pair, rows, tmp_path / "made.jsonl", teacher, samples=2))
    assert len(lines(tmp_path / "made.jsonl")) == 20


def test_garbage_from_a_server_keeps_what_is_done(pair, rows, tmp_path, scripted, monkeypatch):
    from hpd.teachers import TeacherUnavailable

    monkeypatch.setattr("hpd.http.connection._FIRST_PAUSE_SECONDS", 0.01)
    good = scripted.answer
    scripted.answer = lambda request: (
        good(request) if len(scripted.requests) <= 8 else b'{"choices": [{"text": 5}]}'
    )
    teacher = {"type": "server", "url": scripted.url, "model": "tiny", "wait_seconds": 2.0, "concurrency": 1}
    output = tmp_path / "made.jsonl"
    with pytest.raises(TeacherUnavailable, match="bad responses"):
        generate(recipe(pair, rows, output, teacher))
    assert len((tmp_path / "made.jsonl.part").read_text().splitlines()) == 3
    scripted.answer = good
    scripted.requests.clear()
    generate(recipe(pair, rows, output, teacher))
    # Only the last chunk's two (a request that was on its way when the first call failed may be seen twice).
    assert len({request["seed"] for request in scripted.requests}) == 2
    assert len(lines(output)) == 10


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"text": "a"}]}'])
def test_a_server_that_never_answers_right_is_a_mistake(pair, rows, tmp_path, scripted, monkeypatch, body):
    """Nothing that the same command, started again by a scheduler, would change."""
    monkeypatch.setattr("hpd.http.connection._FIRST_PAUSE_SECONDS", 0.01)
    scripted.answer = lambda request: body
    teacher = {"type": "server", "url": scripted.url, "model": "tiny", "wait_seconds": 60.0}
    with pytest.raises(ValueError, match="keeps giving bad responses") as caught:
        generate(recipe(pair, rows, tmp_path / "made.jsonl", teacher))
    assert "Error" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 2, "temperature": 0}, "again and again"),
        ({"temperature": 0, "top_k": 5}, "no effect at temperature 0"),
        ({"samples": 0}, "samples must be"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"output": "made.csv"}, "must end with .jsonl"),
        ({"reference": "answer"}, "no effect without filter"),
        ({"filter": "correct", "reference": "nope"}, "'nope', and the dataset has the columns"),
        ({"tempreature": 1}, "did you mean 'temperature'"),
    ],
)
def test_mistakes_are_named(pair, rows, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(recipe(pair, rows, **{"output": tmp_path / "made.jsonl", **settings}))
    assert not list(tmp_path.iterdir())


def test_rows_without_prompts_or_answers_are_refused(pair, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two"}\n')
    with pytest.raises(ValueError, match="Row 0 has no prompt"):
        generate(recipe(pair, text, tmp_path / "made.jsonl"))
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"question": "say one"}\n')
    data = {"path": str(bare), "columns": {"prompt": "question"}}
    with pytest.raises(ValueError, match="needs right answers"):
        generate(recipe(pair, None, tmp_path / "made.jsonl", data=data, filter="correct"))
    assert generate(recipe(pair, None, tmp_path / "made.jsonl", data=data))["completions"] == 1
    assert os.path.isfile(tmp_path / "made.jsonl")
