"""The client of `hpd serve-teacher`: hidden states and log Z over the wire, the head once.

Axes: N label positions, D hidden, V vocabulary, K tokens asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
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
    Row,
    check_finite,
    dump,
    load,
    pack_rows,
)

__all__ = ["HpdClient"]


_MAX_HEAD_BYTES = 64 * 2**30


class HpdClient:
    """One server of ours. Its head is fetched once; then log p of any token is a row of the head away.

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
        self.max_row_tokens = self.max_request_tokens = 2**31

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        facts = self._connection.request("GET", "/health", lambda _, body: read_json(body), max_bytes=2**20)
        if isinstance(facts, dict) and facts.get("status") == "ok" and len(facts) == 1:
            raise ValueError(
                f"{self._where} wants a token: name the environment variable that holds it in "
                "teacher.api_key_env."
            )
        try:
            self.fingerprint = str(facts["fingerprint"])
            self.config = PreTrainedConfig(
                vocab_size=int(facts["vocab"]), hidden_size=int(facts["hidden_size"])
            )  # type: ignore[call-arg]
            self._dtype = facts["dtype"] if self._source.dtype == "auto" else self._source.dtype
            self.max_row_tokens, self.max_request_tokens = (
                int(facts["max_row_tokens"]),
                int(facts["max_request_tokens"]),
            )
            same = facts["tokenizer"] == tokenizer_hash(student)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._where} is no server that hpd serve-teacher started ({type(error).__name__}: {error} "
                "in /health). For vLLM or SGLang set teacher.protocol to openai, echo or sglang."
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

        def read(response: Any, body: bytes) -> Head:
            self._check_server(response)
            tensors = load(body)
            weight, scale = tensors["weight"], float(tensors["scale"])
            if weight.shape != (self._vocab, self._width):
                raise BadResponse(f"a head of {tuple(weight.shape)} instead of {(self._vocab, self._width)}")
            check_finite("the head", weight)
            softcap = tensors.get("softcap")
            return Head(weight, tensors.get("bias"), scale, None if softcap is None else float(softcap))

        params = {"dtype": self._dtype}
        return self._connection.request(
            "GET", "/v1/head", _boundary(read), params=params, max_bytes=_MAX_HEAD_BYTES
        )

    def ask(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        count = sum(len(row.positions) for row in rows)

        def read(response: Any, body: bytes) -> dict[str, Tensor]:
            self._check_server(response)
            answer = load(body)
            hidden, log_z = answer["hidden"], answer["log_z"]
            if hidden.shape != (count, self._width) or log_z.shape != (count,):
                raise BadResponse(f"hidden states of {tuple(hidden.shape)} instead of {(count, self._width)}")
            if hidden.dtype != WIRE_DTYPES[self._dtype] or log_z.dtype != torch.float32:
                raise BadResponse(f"hidden states in {hidden.dtype}")
            check_finite("hidden", hidden)
            check_finite("log_z", log_z)
            return {"hidden": hidden, "log_z": log_z}

        return self._post(pack_rows(rows, label=False), {"hidden": self._dtype}, read)

    def logprobs(self, rows: Sequence[Row], tokens: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Log-probabilities of any tokens at the label positions of `rows`, computed by the server, its head
        left there."""

        def read(response: Any, body: bytes) -> Tensor:
            self._check_server(response)
            found = load(body)["token_logprobs"]
            if found.shape != tokens.shape:
                raise BadResponse(
                    f"log-probabilities of {tuple(found.shape)} instead of {tuple(tokens.shape)}"
                )
            return found

        return self._post({**pack_rows(rows, label=False), "tokens": tokens}, {}, read)

    def _post(self, tensors: dict[str, Tensor], params: dict[str, Any], read: Any) -> Any:
        headers = {"content-type": MEDIA_TYPE}
        return self._connection.request(
            "POST", "/v1/scores", _boundary(read), content=dump(tensors), params=params, headers=headers
        )

    def _check_server(self, response: Any) -> None:
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
        hidden = answer["hidden"] if answer else torch.empty(0, self._width, dtype=WIRE_DTYPES[self._dtype])
        log_z = answer["log_z"] if answer else torch.empty(0)
        return Scores(hidden.to(device), self._head, log_z.to(device))


def _boundary(read: Any) -> Any:
    """Missing tensors are a bad response like wrong ones."""

    def checked(response: Any, body: bytes) -> Any:
        try:
            return read(response, body)
        except KeyError as error:
            raise BadResponse(f"no tensor {error}") from None

    return checked
