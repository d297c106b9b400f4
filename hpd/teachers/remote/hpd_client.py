"""The client of `hpd serve-teacher`: hidden states and log Z over the wire, the head once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx2
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hpd.config.models import TeacherConfig
from hpd.http import BadResponse, Connection
from hpd.losses import Head, Scores
from hpd.teachers.errors import TeacherUnavailable
from hpd.teachers.fingerprints import tokenizer_hash
from hpd.teachers.remote.dialects import read_json
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
        self.fingerprint: str | None = None
        self.config = PreTrainedConfig()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.max_row_tokens = 2**31
        self.max_request_tokens = 2**31

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        facts = self._connection.request("GET", "/health", lambda _, body: read_json(body), max_bytes=2**20)
        if isinstance(facts, dict) and facts.get("status") == "ok" and len(facts) == 1:
            raise ValueError(
                f"{self._where} wants a token: name the environment variable that holds it in "
                "teacher.api_key_env."
            )
        try:
            self.fingerprint = str(facts["fingerprint"])
            sizes: dict[str, Any] = {
                "vocab_size": int(facts["vocab"]),
                "hidden_size": int(facts["hidden_size"]),
            }
            self.config = PreTrainedConfig(**sizes)
            self._dtype = facts["dtype"] if self._source.dtype == "auto" else self._source.dtype
            self.max_row_tokens = int(facts["max_row_tokens"])
            self.max_request_tokens = int(facts["max_request_tokens"])
            same = facts["tokenizer"] == tokenizer_hash(student)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._where} is not a server that hpd serve-teacher started ({type(error).__name__}: "
                f"{error} in /health). For vLLM or SGLang set teacher.protocol to openai, echo or sglang."
            ) from None
        if self._dtype not in WIRE_DTYPES:
            raise ValueError(
                f"{self._where} keeps weights in {self._dtype}: set teacher.dtype to one of "
                f"{', '.join(WIRE_DTYPES)}."
            )
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
            "GET", "/v1/tokenizer", lambda _, body: read_json(body), max_bytes=2**28
        )
        special = {name: facts[name] for name in ("eos_token", "bos_token", "pad_token") if facts.get(name)}
        if not facts.get("json"):
            raise ValueError(
                f"{self._where} has a tokenizer that cannot be sent: name it in teacher.tokenizer."
            )
        tokenizer = Tokenizer.from_str(facts["json"])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, chat_template=facts.get("chat_template"), **special
        )

    def fetch_head(self) -> Head:
        """The server's head, in the dtype of the wire."""

        def read(tensors: Mapping[str, Tensor]) -> Head:
            weight, scale = tensors["weight"], float(tensors["scale"])
            if weight.shape != (self._vocab, self._width):
                raise BadResponse(f"a head of {tuple(weight.shape)} instead of {(self._vocab, self._width)}")
            check_finite("the head", weight)
            softcap = tensors.get("softcap")
            return Head(weight, tensors.get("bias"), scale, None if softcap is None else float(softcap))

        params = {"dtype": self._dtype}
        return self._connection.request(
            "GET", "/v1/head", self._reader(read), params=params, max_bytes=_MAX_HEAD_BYTES
        )

    def ask(self, rows: Sequence[WireRow]) -> dict[str, Tensor]:
        count = sum(len(row.positions) for row in rows)

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            hidden, log_z = tensors["hidden"], tensors["log_z"]
            if hidden.shape != (count, self._width) or log_z.shape != (count,):
                raise BadResponse(f"hidden states of {tuple(hidden.shape)} instead of {(count, self._width)}")
            if hidden.dtype != WIRE_DTYPES[self._dtype] or log_z.dtype != torch.float32:
                raise BadResponse(f"hidden states in {hidden.dtype}")
            check_finite("hidden", hidden)
            check_finite("log_z", log_z)
            return {"hidden": hidden, "log_z": log_z}

        return self._connection.request(
            "POST",
            "/v1/scores",
            self._reader(read),
            content=dump(pack_rows(rows)),
            params={"hidden": self._dtype},
            headers={"content-type": MEDIA_TYPE},
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
                f"{self._where} is another model than at the start (fingerprint {given} instead of "
                f"{self.fingerprint}). Start the first one again.",
                final=True,
            )

    def prepare(self, device: torch.device) -> None:
        head = self.fetch_head()
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
