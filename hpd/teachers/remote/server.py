"""`teacher: {type: server}`: a teacher behind HTTP, of hpd (every method) or OpenAI-compatible (top-k).

Axes: N label positions, D hidden, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hpd.batch import TokenBatch
from hpd.config.models import TeacherConfig
from hpd.config.secrets import redact
from hpd.http import Connection, read_key, shown
from hpd.losses import TeacherScores, TopKScores
from hpd.methods.terms import Term, TermConfig
from hpd.models.pairing import CheckResult
from hpd.teachers.errors import TeacherUnavailable
from hpd.teachers.limits import reasons_against, why_not_top_k
from hpd.teachers.remote.dialects import DIALECTS, NoPromptLogprobs, Place, read_places, top_k_tensors
from hpd.teachers.remote.hpd_client import HpdClient
from hpd.teachers.remote.wire import WireRow, grouped, rows_of
from hpd.teachers.teacher import RemoteTeacher

__all__ = ["ServedTeacher", "why_not_served"]

T = TypeVar("T")

_LOGGER = logging.getLogger("hpd")

_ROWS_PER_REQUEST = 8

# Bytes of an answer about one token that a server names: number, rank and text, escaped.
_TOKEN_BYTES = 512

# As many as vLLM allows unless it is started with a larger --max-logprobs.
_DEFAULT_TOP_K = 20

# llama.cpp's server, whose later versions say it with status 500.
_NO_ECHO = "Only no echo is supported"

_PROBE = (
    "The 27 quick brown foxes don't jump over 1,234 lazy dogs: f(x) = x**2 + 3; déjà vu, naïve Ünïcode! "
    "Return None."
)

_OTHER_TOKENIZER = {
    "student": "Choose a teacher of the student's family.",
    "teacher": "Name that of the model which is served in teacher.tokenizer.",
}


class Client(Protocol):
    """One kind of server, asked."""

    config: PreTrainedConfig
    """Its vocabulary size, as far as pairs are checked by it."""
    max_row_tokens: int
    max_request_tokens: int
    fingerprint: str | None
    """Fingerprint of the weights that answer, where the server tells it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Rebuilt from what the server says; None where it says nothing."""
        ...

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        """Ask the server who it is; raises ValueError where it cannot be this student's teacher."""
        ...

    def prepare(self, device: torch.device) -> None:
        """Fetch what is needed once."""
        ...

    def ask(self, rows: Sequence[WireRow]) -> dict[str, Tensor]:
        """The answer about the label positions of some rows, concatenated."""
        ...

    def scores(self, answer: dict[str, Tensor]) -> TeacherScores:
        """Answers of several requests, concatenated, as what the operator reads; empty for a batch without
        labels."""
        ...


class ServedTeacher(RemoteTeacher):
    """A teacher that answers over HTTP; no weights here but the head, and that only with protocol hpd.

    Args:
        source: the recipe's `teacher`, of type server.
        vocab: tokens of the vocabulary whose ids it is sent.
        owner: whose vocabulary that is, for messages: the student's, or with `train.vocabulary: bytes` the
            teacher's own.
    """

    def __init__(self, source: TeacherConfig, vocab: int, owner: Literal["student", "teacher"] = "student"):
        self._approximated: list[str] = []
        assert source.url is not None
        self.source, self._owner = source, owner
        self._connection = Connection(
            source.url.rstrip("/").removesuffix("/v1"),
            name="The teacher",
            api_key=read_key(source.api_key_env, "teacher.api_key_env"),
            hide=redact,
            timeout_seconds=source.timeout_seconds,
            wait_seconds=source.wait_seconds,
            connections=source.concurrency,
            failure=TeacherUnavailable,
            refusals=[_NO_ECHO],
        )
        self._pool = ThreadPoolExecutor(source.concurrency, thread_name_prefix="teacher")
        self._client: Client = (
            HpdClient(self._connection, source)
            if source.protocol == "hpd"
            else _TopKClient(self._connection, source, vocab, owner)
        )

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        """Find out who answers, before anything is loaded or written.

        Args:
            student: the tokenizer whose token ids will be sent: the student's, or the `owner`'s.

        Raises:
            ValueError: the server refuses the key or the request, or is another kind of server or tokenizer;
                nothing that trying again would change.
            TeacherUnavailable: it does not answer within `wait_seconds`.
        """
        try:
            self._client.connect(student)
        except TeacherUnavailable as error:
            if error.final or error.garbled:
                raise ValueError(str(error)) from None
            raise

    @property
    def config(self) -> PreTrainedConfig:
        return self._client.config

    @property
    def vocab(self) -> int:
        return self.config.get_text_config().vocab_size  # type: ignore[attr-defined]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self._client.tokenizer

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the weights that answer, where the server tells it."""
        return self._client.fingerprint

    @property
    def max_row_tokens(self) -> int:
        """The longest row that the server takes."""
        return self._client.max_row_tokens

    def check_rows(self, max_length: int | None) -> None:
        """Raise ValueError where rows may be longer than the server takes."""
        limit = self.max_row_tokens
        if max_length is not None and max_length > limit:
            raise ValueError(
                f"train.max_length is {max_length} and the teacher at {self.source.url} takes {limit} tokens "
                "a row."
            )

    def check_terms(self, terms: Sequence[Term | TermConfig]) -> None:
        """Raise ValueError where the loss needs what the server cannot tell."""
        if not isinstance(self._client, _TopKClient):
            return
        reasons = why_not_served(terms, self._client.top_k)
        if reasons and self.source.tail == "exact":
            raise ValueError(
                f"The teacher at {self.source.url} tells its {self._client.top_k} likeliest tokens and the "
                f"label, and that is not enough: {'; '.join(reasons)}. Teachers that can: type model, type "
                "cached, or a server that hpd serve-teacher runs (protocol: hpd). Methods that this one can "
                "serve exactly: support: label, or top_k and label+top_k with top_k <= "
                f"{self._client.top_k}. Or accept an approximation with teacher.tail: uniform: tokens "
                "beyond the likeliest share the rest of the mass evenly."
            )
        if reasons and reasons != self._approximated:
            self._approximated = reasons  # said once
            _LOGGER.warning(
                "tail: uniform approximates the teacher beyond its likeliest tokens: %s", "; ".join(reasons)
            )

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        self._client.prepare(accelerator.device)

    def ask(self, inputs: Mapping[str, Any], batch: TokenBatch) -> list[Future[dict[str, Tensor]]]:
        groups = grouped(rows_of(inputs, batch), _ROWS_PER_REQUEST, self._client.max_request_tokens)
        return [self._pool.submit(self._client.ask, group) for group in groups]

    def wait(self, handle: Sequence[Future[dict[str, Tensor]]]) -> None:
        try:
            for future in handle:
                future.result()
        except BaseException:
            for future in handle:
                future.cancel()
            raise

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores:
        handle = inputs.get("asked")
        if handle is None:
            handle = self.ask(inputs, batch)
        self.wait(handle)
        answers = [future.result() for future in handle]
        names = answers[0] if answers else ()
        return self._client.scores({name: torch.cat([answer[name] for answer in answers]) for name in names})

    def close(self) -> None:
        """Stop waiting; called once, when the run ends in whatever way."""
        self._connection.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def verdicts(self) -> list[CheckResult]:
        """The checks that are possible with a server that does not tell its tokenizer."""
        text = f"{self.source.url} reads a probe of token ids as the {self._owner}'s tokenizer does"
        unknown = (
            "unknown: the server does not tell its tokenizer; name it in teacher.tokenizer to have it "
            "compared"
        )
        return [
            CheckResult("ok", "vocabulary", text),
            CheckResult("warning", "end of sequence, chat template", unknown),
        ]


class _TopKClient:
    """An OpenAI-compatible server: likeliest tokens and label, from the log-probabilities of a prompt."""

    def __init__(self, connection: Connection, source: TeacherConfig, vocab: int, owner: str):
        self._connection = connection
        self._source, self._owner = source, owner
        self._dialect = DIALECTS[source.protocol or "openai"]
        self.top_k = source.top_k or _DEFAULT_TOP_K
        self.config = PreTrainedConfig(vocab_size=vocab)  # type: ignore[call-arg]
        self.vocab = vocab
        self.tokenizer = None
        self.fingerprint: str | None = None
        self.max_row_tokens = 2**31
        self.max_request_tokens = 32768

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        """One probe: does the server know the fields, give enough tokens, and call them by the student's
        names?

        Raises:
            TeacherUnavailable: not one of the servers that can be a teacher, or not reached.
        """
        prompt: list[int] = student(_PROBE, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        row = WireRow(prompt, list(range(len(prompt) - 1)))
        try:
            self._request([row], self._tensors_of([row]), probe=True)
        except TeacherUnavailable as error:
            if _NO_ECHO in str(error):
                raise TeacherUnavailable(self._only_writes("it refuses echo"), final=True) from None
            raise
        (places,) = self._request([row], lambda places: places, texts=True, probe=True)
        pairs = [
            (str(student.decode([token])), place.text)
            for token, place in zip(prompt, places, strict=True)
            if place is not None and place.text is not None
        ]
        # A token that is part of a character has no text of its own.
        known = [(name.strip(), text.strip(" ▁Ġ")) for name, text in pairs if "�" not in name + text]
        differing = [pair for pair in known if pair[0] != pair[1]]
        if len(differing) > len(known) // 4:
            expected, found = differing[0]
            raise ValueError(
                f"The teacher at {self._connection.url} reads token ids of the {self._owner}'s tokenizer as "
                f"other text ({shown(found)!r} where that has {expected!r}, {len(differing)} of {len(known)} "
                f"tokens): its tokenizer is another. {_OTHER_TOKENIZER[self._owner]}"
            )

    def ask(self, rows: Sequence[WireRow]) -> dict[str, Tensor]:
        return self._request(rows, self._tensors_of(rows))

    def _tensors_of(self, rows: Sequence[WireRow]) -> Callable[[list[list[Place | None]]], dict[str, Tensor]]:
        return lambda places: top_k_tensors(rows, places, self.top_k, self.vocab, self._owner)

    def _request(
        self,
        rows: Sequence[WireRow],
        read: Callable[[list[list[Place | None]]], T],
        texts: bool = False,
        probe: bool = False,
    ) -> T:
        """The response about rows, as `read` understands it; what `read` refuses is asked for again, but for
        a probe's that shows what the server is."""
        prompts = [row.tokens for row in rows]

        def reading(_: Any, body: bytes) -> T:
            try:
                return read(read_places(self._dialect, body, prompts))
            except NoPromptLogprobs as error:
                if probe:
                    raise TeacherUnavailable(self._only_writes(error), final=True) from None
                raise

        return self._connection.request(
            "POST",
            self._dialect.path,
            reading,
            json=self._dialect.request(self._source.model, prompts, self.top_k, texts),
            max_bytes=2**20 + _TOKEN_BYTES * (self.top_k + 2) * sum(map(len, prompts)),
        )

    def _only_writes(self, why: object) -> str:
        return (
            f"The teacher at {self._connection.url} completes prompts, as llama.cpp's server does, and tells "
            f"no log-probabilities of their own tokens ({why}), from which a loss is computed: it can write "
            "training data (hpd generate, then method: sft), and for a teacher's log-probabilities serve the "
            "model with vLLM, SGLang or hpd serve-teacher, or set teacher.protocol to another of "
            f"{', '.join(DIALECTS)} if this server speaks it."
        )

    def prepare(self, device: torch.device) -> None:
        self._device = device

    def scores(self, answer: dict[str, Tensor]) -> TopKScores:
        answer = answer or top_k_tensors([], [], self.top_k, self.vocab)
        on_device = {name: tensor.to(self._device) for name, tensor in answer.items()}
        told = (on_device[name] for name in ("tokens", "logprobs", "label_logprobs"))
        return TopKScores(*told, vocab=self.vocab)


def why_not_served(terms: Sequence[Term | TermConfig], top_k: int) -> list[str]:
    """Reasons why a teacher that is known at its `top_k` likeliest tokens and the label cannot serve these
    terms exactly."""
    return reasons_against(terms, lambda term: why_not_top_k(term, top_k))
