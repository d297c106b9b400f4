"""Real servers on loopback: ours, and one that speaks the protocols of vLLM and SGLang from a real tiny
model."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.config.models import TeacherConfig
from hpd.teachers.remote.backend import Backend
from hpd.teachers.remote.serve import ServeSettings, make_server
from hpd.teachers.remote.server import ServedTeacher


def load_backend(folder: Any, **options: Any) -> Backend:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.pop("dtype", torch.float32)).eval()
    return Backend(model, AutoTokenizer.from_pretrained(folder), **options)


@contextlib.contextmanager
def served(backend: Backend, port: int = 0, **settings: Any) -> Iterator[str]:
    """`hpd serve-teacher` in a thread; yields its address."""
    server = make_server(backend, ServeSettings(**settings), port=port, log_level="error")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connected(url: str, student: Any, **options: Any) -> ServedTeacher:
    """What a trainer takes as the teacher at an address; `student` is the student's tokenizer."""
    source = TeacherConfig(type="server", url=url, wait_seconds=5.0, **options)
    teacher = ServedTeacher(source, len(student))
    teacher.connect(student)
    return teacher


class PromptServer:
    """A tiny model behind /v1/completions (prompt_logprobs, echo) and /generate.

    `faults` are called with the number of the request and its answer (status, headers, body); what they
    return is sent instead. None cuts the connection.
    """

    def __init__(self, folder: Any, key: str | None = None, max_logprobs: int = 20):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.key, self.max_logprobs = key, max_logprobs
        self.fault: (
            Callable[[int, tuple[int, dict[str, str], bytes]], tuple[int, dict[str, str], bytes] | None]
            | None
        ) = None
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator[str]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                reply: Any = outer.reply(self.path, self.headers.get("authorization"), body)
                if outer.fault is not None:
                    reply = outer.fault(len(outer.requests), reply)
                if reply is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, headers, content = reply
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def reply(self, path: str, authorization: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        request = json.loads(body)
        with self._lock:
            self.requests.append({"path": path, **request})
        if self.key is not None and authorization != f"Bearer {self.key}":
            return self._json(
                401, {"error": f"Incorrect API key provided: {str(authorization).removeprefix('Bearer ')}"}
            )
        wanted = request.get("prompt_logprobs", request.get("logprobs", request.get("top_logprobs_num"))) or 0
        if wanted > self.max_logprobs:
            return self._json(
                400,
                {
                    "error": f"Requested prompt logprobs of {wanted}, greater than max allowed "
                    f"{self.max_logprobs}"
                },
            )
        prompts = request.get("prompt", request.get("input_ids"))
        if isinstance(prompts[0], int):
            prompts = [prompts]
        with self._lock, torch.no_grad():
            logprobs = [self.model(torch.tensor([p])).logits[0].log_softmax(-1) for p in prompts]
        if path == "/generate":
            return self._json(
                200, [self._sglang(p, lp, request) for p, lp in zip(prompts, logprobs, strict=True)]
            )
        make = self._echo if request.get("echo") else self._prompt_logprobs
        choices = [make(i, p, lp, request) for i, (p, lp) in enumerate(zip(prompts, logprobs, strict=True))]
        return self._json(
            200, {"object": "text_completion", "choices": choices[::-1]}
        )  # the order is not promised

    def _json(self, status: int, content: Any) -> tuple[int, dict[str, str], bytes]:
        return status, {"content-type": "application/json"}, json.dumps(content).encode()

    def _top(self, logprobs: torch.Tensor, k: int, token: int) -> dict[int, float]:
        """As vLLM: the k likeliest, and the token itself where it is not among them."""
        ids = dict.fromkeys([token, *logprobs.topk(k).indices.tolist()]) if k else {token: None}
        return {i: float(logprobs[i]) for i in ids}

    def _prompt_logprobs(
        self, index: int, prompt: list[int], logprobs: torch.Tensor, request: dict[str, Any]
    ) -> dict[str, Any]:
        told: list[Any] = [None]
        for position, token in enumerate(prompt[1:]):
            row = logprobs[position]
            top = self._top(row, request["prompt_logprobs"], token)
            told.append(
                {
                    str(i): {
                        "logprob": v,
                        "rank": int((row > v).sum()) + 1,
                        "decoded_token": self.tokenizer.decode([i]),
                    }
                    for i, v in top.items()
                }
            )
        return {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": "length",
            "prompt_logprobs": told,
        }

    def _echo(
        self, index: int, prompt: list[int], logprobs: torch.Tensor, request: dict[str, Any]
    ) -> dict[str, Any]:
        as_ids = request.get("return_tokens_as_token_ids")
        name = (lambda i: f"token_id:{i}") if as_ids else (lambda i: self.tokenizer.decode([i]))
        whole = [*prompt, int(logprobs[-1].argmax())]
        own = [None, *(float(logprobs[p][t]) for p, t in enumerate(whole[1:]))]
        top = [
            None,
            *(
                {name(i): v for i, v in self._top(logprobs[p], request["logprobs"], t).items()}
                for p, t in enumerate(whole[1:])
            ),
        ]
        told = {
            "tokens": [name(t) for t in whole],
            "token_logprobs": own,
            "top_logprobs": top,
            "text_offset": [0] * len(whole),
        }
        return {"index": index, "text": "", "logprobs": told, "finish_reason": "length"}

    def _sglang(self, prompt: list[int], logprobs: torch.Tensor, request: dict[str, Any]) -> dict[str, Any]:
        text = self.tokenizer.decode if request.get("return_text_in_logprobs") else (lambda ids: None)
        own: list[Any] = [[None, prompt[0], text([prompt[0]])]]
        top: list[Any] = [None]
        for position, token in enumerate(prompt[1:]):
            row = logprobs[position]
            own.append([float(row[token]), token, text([token])])
            best = row.topk(request["top_logprobs_num"])
            top.append([[float(v), int(i), text([int(i)])] for v, i in zip(*best, strict=True)])
        return {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


class LlamaCppServer(PromptServer):
    """A tiny model behind /v1/completions as llama.cpp's server has it: it completes prompts, ignores
    prompt_logprobs, refuses echo, and knows no /generate (tools/server of ggml-org/llama.cpp; earlier
    versions refuse echo with status 400)."""

    echo_status = 500

    def reply(self, path: str, authorization: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        request = json.loads(body)
        with self._lock:
            self.requests.append({"path": path, **request})
        if path != "/v1/completions":
            return self._error(404, "File Not Found", "not_found_error")
        if request.get("echo"):
            return self._error(self.echo_status, "Only no echo is supported", "server_error")
        prompt = request["prompt"]
        choices = [
            self._completion(index, tokens, request)
            for index, tokens in enumerate([prompt] if isinstance(prompt[0], int) else prompt)
        ]
        told = {
            "choices": choices,
            "created": 1764150000,
            "model": request["model"],
            "system_fingerprint": "b7000-0123456",
            "object": "text_completion",
            "usage": {"completion_tokens": request["max_tokens"], "prompt_tokens": 3, "total_tokens": 4},
            "id": "chatcmpl-0",
            "timings": {"cache_n": 0, "prompt_n": 3},
        }
        return self._json(200, told)

    def _completion(self, index: int, prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
        with self._lock, torch.no_grad():
            written = self.model.generate(
                torch.tensor([prompt]), max_new_tokens=request["max_tokens"], do_sample=False
            )[0, len(prompt) :]
        text = self.tokenizer.decode(written)
        choice = {"text": text, "index": index, "logprobs": None, "finish_reason": "length"}
        if request.get("logprobs"):
            token = {"id": int(written[0]), "token": text, "bytes": [], "logprob": -1.0, "top_logprobs": []}
            choice["logprobs"] = {"content": [token]}
        return choice

    def _error(self, code: int, message: str, kind: str) -> tuple[int, dict[str, str], bytes]:
        return self._json(code, {"error": {"code": code, "message": message, "type": kind}})
