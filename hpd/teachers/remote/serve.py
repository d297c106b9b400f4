"""`hpd serve-teacher`: a teacher behind HTTP, exact for every method. FastAPI, safetensors both ways."""

# No postponed annotations here: FastAPI reads those of the routes, which are defined where FastAPI is
# imported.
import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import logging
import math
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from hpd import __version__
from hpd.config.models import TeacherConfig
from hpd.http import clean_key
from hpd.models.load import load_model, load_tokenizer
from hpd.progress import quiet_libraries
from hpd.teachers.remote.backend import Backend, Batcher, Busy, Wanted
from hpd.teachers.remote.wire import (
    FINGERPRINT_HEADER,
    MEDIA_TYPE,
    WIRE_DTYPES,
    ScoreRequest,
    dump,
    read_request,
)

__all__ = ["ServeSettings", "is_loopback", "make_server", "serve", "serve_model"]

_LOGGER = logging.getLogger(__name__)

_BODY_SECONDS = 30.0
_MAX_TOP_K = 1024

WireName = Literal["float32", "bfloat16", "float16"]


class ServeSettings(NamedTuple):
    """Bounds and access of a server."""

    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None
    """The bearer token that clients must send; None only on loopback."""
    max_waiting: int = 64
    """Requests that wait or run; one more gets 503 with Retry-After."""
    max_request_tokens: int = 65536
    """Tokens of one request."""
    max_body_bytes: int = 16 * 2**20
    """Bytes of one request."""
    graceful_seconds: int = 120
    """After SIGTERM, how long requests in flight may take."""

    def check(self) -> "ServeSettings":
        """Return self, or raise ValueError where the server would be open to a network without a token."""
        if self.token is not None and clean_key(self.token, "the server's token") != self.token:
            raise ValueError("The server's token has white space around it: remove it.")
        if self.token is not None and len(self.token) < 16:
            raise ValueError(
                "The server's token is shorter than 16 characters: make one with `openssl rand -hex 32`."
            )
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reachable from other machines, and the server has no token. Put a "
                "secret of 16 or more characters into the environment variable HPD_SERVE_TOKEN (or the one "
                "that --token-env names), or bind to 127.0.0.1."
            )
        for name in ("max_waiting", "max_request_tokens", "max_body_bytes", "graceful_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        return self


def is_loopback(host: str) -> bool:
    """True if only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def make_server(backend: Backend, settings: ServeSettings, **options: Any) -> Any:
    """A uvicorn server of GET /health, /v1/head, /v1/tokenizer and POST /v1/scores.

    Args:
        backend, settings: what answers, and to whom.
        **options: of `uvicorn.Config`, above what is set here.

    Raises:
        ValueError: FastAPI is not installed, or settings that `ServeSettings.check` refuses.
    """
    _require_fastapi()
    settings.check()
    import uvicorn

    from hpd.teachers.remote.door import IDLE_SECONDS, Door

    door = Door(settings.token, 4 * settings.max_waiting + 16, settings.max_body_bytes)
    given: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # the door knows connections by their addresses
        "http": door.protocol(),
        "ws": "none",
        "timeout_keep_alive": math.ceil(IDLE_SECONDS),
        "timeout_graceful_shutdown": settings.graceful_seconds,
    }
    return uvicorn.Server(uvicorn.Config(_app(backend, settings, door), **{**given, **options}))


def _app(backend: Backend, settings: ServeSettings, door: Any) -> Any:
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    batcher = Batcher(backend, settings.max_waiting, backend.max_batch_tokens)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any):
        async with batcher.running():
            yield

    # No pages of documentation: they would describe the server to whoever finds it.
    app = FastAPI(title="hpd teacher", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if settings.token is None:
        # Without a token, a web page that points its own name here (DNS rebinding) must not get in.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    app.include_router(_routes(backend, batcher, settings, door))
    return door.around(app)


def _routes(backend: Backend, batcher: Batcher, settings: ServeSettings, door: Any) -> Any:
    from fastapi import APIRouter, HTTPException, Query, Request, Response

    from hpd.teachers.remote.door import Payload

    routes = APIRouter()
    made: dict[str, bytes] = {}
    making = asyncio.Lock()

    async def once(name: str, make: Callable[[], bytes]) -> bytes:
        """The same bytes for everybody; students ask for them all at once, when training starts."""
        async with making:
            if name not in made:
                made[name] = await asyncio.to_thread(make)
            return made[name]

    def binary(content: bytes) -> Response:
        return Payload(content, MEDIA_TYPE, {FINGERPRINT_HEADER: backend.fingerprint})

    @routes.get("/health")
    async def health(request: Request) -> dict[str, Any]:
        friend = door.admits(dict(request.headers.raw))
        return _health(backend, batcher, settings) if friend else {"status": "ok"}

    @routes.get("/v1/head")
    async def head(dtype: WireName | None = None) -> Response:
        name = dtype or _dtype_name(backend)
        return binary(
            await once(f"head {name}", lambda: dump(_head_tensors(backend, WIRE_DTYPES.get(name or ""))))
        )

    @routes.get("/v1/tokenizer")
    async def tokenizer() -> Response:
        content = await once("tokenizer", lambda: json.dumps(_tokenizer_facts(backend.tokenizer)).encode())
        return Payload(content, "application/json", {})

    @routes.post("/v1/scores")
    async def scores(
        request: Request,
        hidden: WireName | None = None,
        top_k: Annotated[int, Query(ge=0, le=_MAX_TOP_K)] = 0,
    ) -> Response:
        asked = await _read(request, backend, settings)
        wanted = Wanted(WIRE_DTYPES[hidden] if hidden else None, top_k)
        try:
            tensors = await batcher.submit(asked, wanted, request.is_disconnected)
        except Busy:
            raise HTTPException(
                503, "too many requests wait", {"Retry-After": str(_retry_after(batcher))}
            ) from None
        except Exception as error:  # whatever a library raises: this request fails, the server goes on
            _LOGGER.error("a request failed: %s: %s", type(error).__name__, error)
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            raise HTTPException(500, f"the teacher failed: {reason}") from None
        return binary(await asyncio.to_thread(dump, tensors))

    return routes


async def _read(request: Any, backend: Backend, settings: ServeSettings) -> ScoreRequest:
    """The checked body of a request."""
    from fastapi import HTTPException

    if request.headers.get("content-type", "").split(";")[0] != MEDIA_TYPE:
        raise HTTPException(415, f"the content type must be {MEDIA_TYPE}")
    content = await _body(request)
    limits = {"max_tokens": settings.max_request_tokens, "max_row_tokens": backend.max_row_tokens}
    try:
        return read_request(content, vocab=backend.vocab, **limits)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


async def _body(request: Any) -> bytes:
    """The whole body, which the door has let in, refused where it takes too long."""
    from anyio import fail_after
    from fastapi import HTTPException

    try:
        with fail_after(_BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        raise HTTPException(
            408, f"the body took longer than {_BODY_SECONDS:g} s", {"Connection": "close"}
        ) from None


def _retry_after(batcher: Batcher) -> int:
    return max(1, math.ceil(batcher.pending / 16))


def _dtype_name(backend: Backend) -> str | None:
    weight = backend.head.weight
    return None if weight is None else str(weight.dtype).removeprefix("torch.")


def _health(backend: Backend, batcher: Batcher, settings: ServeSettings) -> dict[str, Any]:
    return {
        "status": "ok",
        "hpd": __version__,
        "fingerprint": backend.fingerprint,
        "tokenizer": backend.tokenizer_hash,
        "vocab": backend.vocab,
        "hidden_size": backend.hidden_size,
        "dtype": _dtype_name(backend),
        "max_request_tokens": min(settings.max_request_tokens, settings.max_body_bytes // 64),
        "max_row_tokens": min(backend.max_row_tokens, settings.max_request_tokens),
        "max_top_k": _MAX_TOP_K,
        "waiting": batcher.pending,
    }


def _head_tensors(backend: Backend, dtype: torch.dtype | None) -> dict[str, Tensor]:
    head = backend.head
    assert head.weight is not None
    tensors = {
        "weight": head.weight if dtype is None else head.weight.to(dtype),
        "scale": torch.tensor(head.scale, dtype=torch.float64),
    }
    if head.bias is not None:
        tensors["bias"] = head.bias
    if head.softcap is not None:
        tensors["softcap"] = torch.tensor(head.softcap, dtype=torch.float64)
    return tensors


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """All that a student needs to rebuild the tokenizer and compare; null for one that is not fast."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "json": None if fast is None else fast.to_str(),
        "eos_token": tokenizer.eos_token,
        "bos_token": tokenizer.bos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": tokenizer.chat_template,
    }


def _require_fastapi() -> None:
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ValueError(
            "hpd serve-teacher needs FastAPI and uvicorn: pip install 'hybrid-policy-distillation[serve]'."
        )


def serve(backend: Backend, settings: ServeSettings) -> None:
    """Answer until SIGTERM or Ctrl-C; requests in flight are finished first."""
    server = make_server(backend, settings)
    with contextlib.suppress(KeyboardInterrupt):  # raised again once everything has ended
        server.run()
    if not server.started:
        raise SystemExit(3)


def serve_model(
    model_path: str, dtype: str, quantization: str | None, settings: ServeSettings, max_batch_tokens: int
) -> None:
    """Load a model and `serve` it.

    Args:
        model_path: Hub id or folder.
        dtype: of its weights; auto: as saved.
        quantization: 4bit, 8bit or None.
        settings: address, token and bounds.
        max_batch_tokens: tokens of one forward.

    Raises:
        ValueError: unknown dtype or quantization, no such model, no FastAPI, or no token where one is needed.
    """
    _require_fastapi()
    settings.check()
    if dtype not in ("auto", *WIRE_DTYPES):
        raise ValueError(f"dtype must be auto or one of {', '.join(WIRE_DTYPES)}, got {dtype!r}.")
    if quantization not in (None, "4bit", "8bit"):
        raise ValueError(f"quantization must be 4bit or 8bit, got {quantization!r}.")
    quiet_libraries()
    source = TeacherConfig(model=model_path, dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(source, "teacher")
    model: Any = load_model(source, "teacher")
    if not getattr(model, "hf_device_map", None) and not getattr(model, "quantization_method", None):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    backend = Backend(model, tokenizer, max_batch_tokens)
    print(
        f"teacher {model_path} on http://{settings.host}:{settings.port} (process {os.getpid()}, fingerprint "
        f"{backend.fingerprint}, {backend.vocab} tokens, {'a token' if settings.token else 'no token'} "
        "needed)",
        flush=True,
    )
    serve(backend, settings)
