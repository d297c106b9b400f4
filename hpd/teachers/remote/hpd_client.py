"""The client of `hpd serve-teacher`: hidden states and log Z over the wire, the head once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx2
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hpd.config.models import TeacherConfig
from hpd.http import BadResponse, Connection, read_json, shown
from hpd.losses import Head, Scores
from hpd.teachers.errors import TeacherUnavailable
from hpd.teachers.fingerprints import tokenizer_hash
from hpd.teachers.remote.wire import (
    FINGERPRINT_HEADER,
    MEDIA_TYPE,
    WIRE_DTYPES,
    WireRow,
    check_finite,
    dump,
    load,
    pack_rows,
)

__all__ = ["HpdClient"]

T = TypeVar("T")

_MAX_HEAD_BYTES = 64 * 2**30
_MAX_TOKENIZER_BYTES = 2**28
# /health, and what the header of a response with tensors may take.
_MAX_FACTS_BYTES = 2**16
# Share of the logits' bound by which 16-bit numbers on the wire may miss log Z, and nats beside it.
_ROUNDING, _SLACK = 0.02, 0.1


class _Facts(NamedTuple):
    """What /health tells, held to what it can be."""

    fingerprint: str
    tokenizer: str
    vocab: int
    hidden_size: int
    dtype: str | None
    max_row_tokens: int
    max_request_tokens: int


class _Bounds(NamedTuple):
    """What a head can make of a hidden state: |logit| <= scale (|h| `weight` + `bias`), and <= softcap."""

    weight: float
    """The longest row."""
    bias: float
    scale: float
    softcap: float


class HpdClient:
    """One server that hpd runs. Its head is fetched once; then log p of any token is a row of it away.

    Args:
        connection: to it.
        source: the recipe's `teacher`; `dtype` is that of the hidden states on the wire.
    """

    def __init__(self, connection: Connection, source: TeacherConfig):
        self._connection = connection
        self._source = source
        self._head: Head | None = None
        self._bounds: _Bounds | None = None
        self.fingerprint: str | None = None
        self.config = PreTrainedConfig()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.max_row_tokens = 2**31
        self.max_request_tokens = 2**31

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        found = self._connection.request(
            "GET", "/health", lambda _, body: read_json(body), max_bytes=_MAX_FACTS_BYTES
        )
        if found == {"status": "ok"}:
            raise ValueError(
                f"{self._where} wants a token: name the environment variable that holds it in "
                "teacher.api_key_env."
            )
        try:
            facts = _read_facts(found)
        except ValueError as error:
            raise ValueError(
                f"{self._where} is not a server that hpd serve-teacher started ({error} in /health). For "
                "vLLM or SGLang set teacher.protocol to openai, echo or sglang."
            ) from None
        self.fingerprint = facts.fingerprint
        sizes: dict[str, Any] = {"vocab_size": facts.vocab, "hidden_size": facts.hidden_size}
        self.config = PreTrainedConfig(**sizes)
        self._dtype = str(facts.dtype) if self._source.dtype == "auto" else self._source.dtype
        self.max_row_tokens = facts.max_row_tokens
        self.max_request_tokens = facts.max_request_tokens
        if self._dtype not in WIRE_DTYPES:
            raise ValueError(
                f"{self._where} keeps weights in {shown(self._dtype)}: set teacher.dtype to one of "
                f"{', '.join(WIRE_DTYPES)}."
            )
        same = facts.tokenizer == tokenizer_hash(student)
        self.tokenizer = student if same else self._fetch_tokenizer()

    @property
    def _where(self) -> str:
        return f"The teacher at {self._connection.url}"

    @property
    def _vocab(self) -> int:
        return self.config.get_text_config().vocab_size  # type: ignore[attr-defined]

    @property
    def _width(self) -> int:
        return self.config.get_text_config().hidden_size  # type: ignore[attr-defined]

    def _fetch_tokenizer(self) -> PreTrainedTokenizerBase:
        facts = self._connection.request(
            "GET",
            "/v1/tokenizer",
            lambda _, body: read_json(body),
            max_bytes=min(2**20 + 2**10 * self._vocab, _MAX_TOKENIZER_BYTES),
        )
        hint = "name it in teacher.tokenizer"
        if isinstance(facts, dict) and facts.get("json", "") is None:
            raise ValueError(f"{self._where} has a tokenizer that cannot be sent: {hint}.")
        try:
            return _build_tokenizer(facts)
        except ValueError as error:
            raise ValueError(
                f"{self._where} sends a tokenizer that cannot be built ({error} in /v1/tokenizer): {hint}."
            ) from None

    def fetch_head(self) -> Head:
        """The server's head, in the dtype of the wire."""
        dtype = WIRE_DTYPES[self._dtype]
        size = self._vocab * (self._width * dtype.itemsize + 8) + _MAX_FACTS_BYTES
        return self._connection.request(
            "GET",
            "/v1/head",
            self._reader(lambda tensors: _read_head(tensors, self._vocab, self._width, dtype)),
            params={"dtype": self._dtype},
            max_bytes=min(size, _MAX_HEAD_BYTES),
        )

    def ask(self, rows: Sequence[WireRow]) -> dict[str, Tensor]:
        count = sum(len(row.positions) for row in rows)

        bounds, dtype = self._bounds, WIRE_DTYPES[self._dtype]
        assert bounds is not None, "prepare() comes first"

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            hidden = _floats(tensors, "hidden", (count, self._width), dtype)
            log_z = _floats(tensors, "log_z", (count,), torch.float32)
            _check_log_z(hidden, log_z, bounds, self._vocab)
            return {"hidden": hidden, "log_z": log_z}

        return self._connection.request(
            "POST",
            "/v1/scores",
            self._reader(read),
            content=dump(pack_rows(rows)),
            params={"hidden": self._dtype},
            headers={"content-type": MEDIA_TYPE},
            max_bytes=count * (self._width * dtype.itemsize + 4) + _MAX_FACTS_BYTES,
        )

    def _reader(self, read: Callable[[Mapping[str, Tensor]], T]) -> Callable[[httpx2.Response, bytes], T]:
        """`read` behind the checks of every response; missing tensors are as bad as wrong ones."""

        def checked(response: httpx2.Response, body: bytes) -> T:
            self._check_server(response)
            try:
                return read(load(body))
            except KeyError as error:
                raise BadResponse(f"no tensor {error}") from None

        return checked

    def _check_server(self, response: httpx2.Response) -> None:
        """A server that was restarted with other weights must not go on teaching this student."""
        given = response.headers.get(FINGERPRINT_HEADER)
        if given != self.fingerprint:
            raise TeacherUnavailable(
                f"{self._where} is another model than at the start (fingerprint {shown(given)} instead of "
                f"{self.fingerprint}). Start the first one again.",
                final=True,
            )

    def prepare(self, device: torch.device) -> None:
        head = self.fetch_head()
        self._bounds = _bounds_of(head)
        weight, bias = (None if tensor is None else tensor.to(device) for tensor in (head.weight, head.bias))
        self._head = head._replace(weight=weight, bias=bias)

    def scores(self, answer: dict[str, Tensor]) -> Scores:
        assert self._head is not None, "prepare() comes first"
        assert self._head.weight is not None
        device = self._head.weight.device
        if not answer:
            hidden = torch.empty(0, self._width, dtype=WIRE_DTYPES[self._dtype])
            answer = {"hidden": hidden, "log_z": torch.empty(0)}
        return Scores(answer["hidden"].to(device), self._head, answer["log_z"].to(device))


def _read_facts(found: Any) -> _Facts:
    """The fields of /health; raises ValueError naming the first that cannot be right."""
    if not isinstance(found, dict):
        raise ValueError(f"{shown(found)!r} instead of an object")

    def text(name: str) -> str:
        value = found.get(name)
        if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= 256:
            raise ValueError(f"{name} is {shown(value)!r}, not one line of text")
        return value

    def number(name: str, most: int) -> int:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} is {shown(value)!r}, not a whole number from 1 to {most}")
        return value

    return _Facts(
        text("fingerprint"),
        text("tokenizer"),
        number("vocab", 2**24),
        number("hidden_size", 2**20),
        None if found.get("dtype") is None else text("dtype"),
        number("max_row_tokens", 2**40),
        number("max_request_tokens", 2**40),
    )


def _build_tokenizer(facts: Any) -> PreTrainedTokenizerBase:
    """A tokenizer from /v1/tokenizer; raises ValueError naming what cannot be right."""
    if not isinstance(facts, dict) or not isinstance(facts.get("json"), str):
        raise ValueError("json is not a text")
    special = {name: facts.get(name) for name in ("eos_token", "bos_token", "pad_token")}
    for name, value in special.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)!r}, not a text")
    template = facts.get("chat_template")
    named = template.values() if isinstance(template, dict) else [template]
    if not all(value is None or isinstance(value, str) for value in named):
        raise ValueError(f"chat_template is {shown(template)!r}, not a text")
    given = {name: value for name, value in special.items() if value}
    try:
        tokenizer = Tokenizer.from_str(facts["json"])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **given)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are no Exception
        raise ValueError(f"json is not a tokenizer: {shown(error)}") from None


def _floats(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """A finite tensor of this shape, and one of these dtypes."""
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype not in dtypes:
        given = f"{tensor.dtype} of shape {tuple(tensor.shape)}".removeprefix("torch.")
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BadResponse(f"{name} is {shown(given)} instead of {wanted} of shape {shape}")
    check_finite(name, tensor)
    return tensor


def _read_head(tensors: Mapping[str, Tensor], vocab: int, width: int, dtype: torch.dtype) -> Head:
    def number(name: str) -> float:
        value = float(_floats(tensors, name, (), torch.float64, torch.float32))
        if value <= 0:
            raise BadResponse(f"{name} is {value:g}, and must be above 0")
        return value

    return Head(
        _floats(tensors, "weight", (vocab, width), dtype),
        _floats(tensors, "bias", (vocab,), *WIRE_DTYPES.values()) if "bias" in tensors else None,
        number("scale"),
        number("softcap") if "softcap" in tensors else None,
    )


def _bounds_of(head: Head) -> _Bounds:
    assert head.weight is not None
    # A few rows at a time: all of them in float32 would be a second head.
    longest = max(float(rows.float().norm(dim=-1).max()) for rows in head.weight.split(4096))
    bias = 0.0 if head.bias is None else float(head.bias.float().abs().max())
    return _Bounds(longest, bias, head.scale, math.inf if head.softcap is None else head.softcap)


def _check_log_z(hidden: Tensor, log_z: Tensor, bounds: _Bounds, vocab: int) -> None:
    """Raise BadResponse where log Z, the logarithm of V terms exp(logit), lies outside what V logits of these
    hidden states can sum to: log V - b <= log Z <= log V + b, with b their bound (Cauchy-Schwarz)."""
    bound = bounds.scale * (hidden.float().norm(dim=-1) * bounds.weight + bounds.bias)
    if not bool(torch.isfinite(bound).all()):
        raise BadResponse("hidden states that overflow the head")
    bound = bound.clamp(max=bounds.softcap)
    wrong = (log_z - math.log(vocab)).abs() > bound * (1 + _ROUNDING) + _SLACK
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise BadResponse(
            f"log_z is {float(log_z[first]):g} at position {first}, where it must be within "
            f"{float(bound[first]):g} of log {vocab}"
        )
