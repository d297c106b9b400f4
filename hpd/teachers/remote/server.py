"""`teacher: {type: server}`: a teacher behind HTTP, ours (exact for every method) or an OpenAI-compatible one
(top-k).

Axes: N label positions, D hidden, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hpd.batch import TokenBatch
from hpd.config.models import TeacherConfig
from hpd.http import Connection, read_key
from hpd.losses import TeacherScores
from hpd.losses.heads import TopKScores
from hpd.methods.terms import Term, TermConfig
from hpd.models.pairing import CheckResult
from hpd.teachers.errors import TeacherUnavailable
from hpd.teachers.remote.dialects import DIALECTS, read_places, top_k_tensors
from hpd.teachers.remote.hpd_client import HpdClient
from hpd.teachers.remote.wire import Row, grouped, rows_of

__all__ = ["ServedTeacher", "why_not_served"]


_LOGGER = logging.getLogger("hpd")


_ROWS_PER_REQUEST = 8


_DEFAULT_TOP_K = 20  # what vLLM allows unless it is started with a larger --max-logprobs


# Answers that were asked for and never used (the end of an epoch, a stop) are forgotten beyond this number.
_KEPT_ANSWERS = 256


_PROBE = "The 27 quick brown foxes don't jump over 1,234 lazy dogs: f(x) = x**2 + 3; déjà vu, naïve Ünïcode! Return None."


class Backend(Protocol):
    """One kind of server."""

    config: PreTrainedConfig
    """Its vocabulary size, as far as pairs are checked by it."""
    max_row_tokens: int
    max_request_tokens: int

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

    def ask(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The answer about the label positions of some rows, concatenated."""
        ...

    def scores(self, answer: dict[str, Tensor]) -> TeacherScores:
        """Answers of several requests, concatenated, as what the operator reads; empty for a batch without
        labels."""
        ...


class ServedTeacher:
    """A teacher that answers over HTTP; no weights here but the head, and that only with protocol hpd.

    Args:
        source: the recipe's `teacher`, of type server.
        vocab: the student's vocabulary.
    """

    def __init__(self, source: TeacherConfig, vocab: int):
        assert source.url is not None
        self.source = source
        self._connection = Connection(
            source.url.rstrip("/").removesuffix("/v1"),
            name="The teacher",
            api_key=read_key(source.api_key_env),
            timeout_seconds=source.timeout_seconds,
            wait_seconds=source.wait_seconds,
            connections=source.concurrency,
            failure=TeacherUnavailable,
        )
        self._pool = ThreadPoolExecutor(source.concurrency, thread_name_prefix="teacher")
        self._answers: OrderedDict[bytes, list[Future[dict[str, Tensor]]]] = OrderedDict()
        self._backend: Backend = (
            HpdClient(self._connection, source)
            if source.protocol == "hpd"
            else _TopKClient(self._connection, source, vocab)
        )

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        """Find out who answers, before anything is loaded or written.

        Args:
            student: the student's tokenizer, whose token ids will be sent.

        Raises:
            ValueError: the server refuses the key or the request, or is another kind of server or tokenizer.
            TeacherUnavailable: it does not answer within `wait_seconds`.
        """
        try:
            self._backend.connect(student)
        except TeacherUnavailable as error:
            if error.final:
                raise ValueError(str(error)) from None
            raise

    @property
    def config(self) -> PreTrainedConfig:
        return self._backend.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self._backend.tokenizer

    @property
    def fingerprint(self) -> str | None:
        """Which weights answer, where the server says so."""
        return getattr(self._backend, "fingerprint", None)

    def check_rows(self, max_length: int | None) -> None:
        """Raise ValueError where rows may be longer than the server takes."""
        limit = self._backend.max_row_tokens
        if max_length is not None and max_length > limit:
            raise ValueError(
                f"train.max_length is {max_length} and the teacher at {self.source.url} takes {limit} tokens "
                "a row."
            )

    def check_terms(self, terms: Sequence[Term | TermConfig]) -> None:
        """Raise ValueError where the loss needs what the server cannot tell."""
        if not isinstance(self._backend, _TopKClient):
            return
        reasons = why_not_served(terms, self._backend.top_k)
        if reasons and self.source.tail == "exact":
            raise ValueError(
                f"The teacher at {self.source.url} tells its {self._backend.top_k} likeliest tokens and the "
                f"label, and that is not enough: {'; '.join(reasons)}. Teachers that can: type model, type "
                "cached, or a server that hpd serve-teacher runs (protocol: hpd). Methods that this one can "
                "serve exactly: support: label, or top_k and label+top_k with top_k <= "
                f"{self._backend.top_k}. Or accept an approximation with teacher.tail: uniform: tokens "
                "beyond the likeliest share the rest of the mass evenly."
            )
        if reasons:
            _LOGGER.warning(
                "tail: uniform approximates the teacher beyond its likeliest tokens: %s", "; ".join(reasons)
            )

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        self._backend.prepare(accelerator.device)

    def request(self, inputs: dict[str, Any]) -> None:
        """Start asking about a collated batch; what was asked already is not asked again."""
        key = _key(inputs["label_keys"])
        if key in self._answers:
            return
        batch = TokenBatch.pop(dict(inputs))
        groups = grouped(rows_of(inputs, batch), _ROWS_PER_REQUEST, self._backend.max_request_tokens)
        self._answers[key] = [self._pool.submit(self._backend.ask, group) for group in groups]
        while len(self._answers) > _KEPT_ANSWERS:
            for future in self._answers.popitem(last=False)[1]:
                future.cancel()

    def wait(self, inputs: dict[str, Any]) -> None:
        """Return when the answer about a collated batch is here."""
        self.request(inputs)
        key = _key(inputs["label_keys"])
        try:
            for future in self._answers[key]:
                future.result()
        except BaseException:
            # Failed answers are not kept: who asks again later deserves a new attempt.
            for future in self._answers.pop(key):
                future.cancel()
            raise

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores:
        self.wait({**inputs, **{f"label_{name}": value for name, value in batch._asdict().items()}})
        answers = [future.result() for future in self._answers.pop(_key(batch.keys))]
        joined = (
            {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]} if answers else {}
        )
        return self._backend.scores(joined)

    def close(self) -> None:
        """Stop waiting; called once, when the run ends in whatever way."""
        self._connection.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def verdicts(self) -> list[CheckResult]:
        """What could be checked about a server that does not tell its tokenizer."""
        text = f"{self.source.url} reads a probe of token ids as the student's tokenizer does"
        unknown = "unknown: the server does not tell its tokenizer; name it in teacher.tokenizer to have it compared"
        return [
            CheckResult("ok", "vocabulary", text),
            CheckResult("warning", "end of sequence, chat template", unknown),
        ]


def _key(keys: Tensor) -> bytes:
    return hashlib.sha256(keys.cpu().numpy().tobytes()).digest()


class _TopKClient:
    """An OpenAI-compatible server: likeliest tokens and label, from the log-probabilities of a prompt."""

    def __init__(self, connection: Connection, source: TeacherConfig, vocab: int):
        self._connection = connection
        self._source = source
        self._dialect = DIALECTS[source.protocol or "openai"]
        self.top_k = source.top_k or _DEFAULT_TOP_K
        self.config = PreTrainedConfig(vocab_size=vocab)  # type: ignore[call-arg]
        self.vocab = vocab
        self.tokenizer = None
        self.max_row_tokens = 2**31
        self.max_request_tokens = 32768

    def connect(self, student: PreTrainedTokenizerBase) -> None:
        """One probe: does the server know the fields, give enough tokens, and call them by the student's
        names?"""
        prompt: list[int] = student(_PROBE, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        row = Row(prompt, list(range(len(prompt) - 1)))
        self._ask([row], texts=False)
        told = [
            (t, p.text)
            for t, p in zip(prompt, self._places([row], texts=True)[0], strict=True)
            if p and p.text is not None
        ]
        # A token that is part of a character has no text of its own.
        pairs = [(str(student.decode([token])), text) for token, text in told]
        known = [(ours.strip(), text.strip(" ▁Ġ")) for ours, text in pairs if "�" not in ours + text]
        differing = [pair for pair in known if pair[0] != pair[1]]
        if len(differing) > len(known) // 4:
            ours, theirs = differing[0]
            raise ValueError(
                f"The teacher at {self._connection.url} reads the student's token ids as other text "
                f"({theirs!r} where the student has {ours!r}, {len(differing)} of {len(known)} tokens): its "
                "tokenizer is another. Choose a teacher of the student's family."
            )

    def ask(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return self._ask(rows, texts=False)

    def _ask(self, rows: Sequence[Row], texts: bool) -> dict[str, Tensor]:
        def read(response: Any, body: bytes) -> dict[str, Tensor]:
            places = read_places(self._dialect, body, [row.tokens for row in rows])
            return top_k_tensors(rows, places, self.top_k, self.vocab)

        return self._connection.request("POST", self._dialect.path, read, json=self._body(rows, texts))

    def _places(self, rows: Sequence[Row], texts: bool) -> list[list[Any]]:
        return self._connection.request(
            "POST",
            self._dialect.path,
            lambda _, body: read_places(self._dialect, body, [row.tokens for row in rows]),
            json=self._body(rows, texts),
        )

    def _body(self, rows: Sequence[Row], texts: bool) -> dict[str, Any]:
        return self._dialect.ask(self._source.model, [row.tokens for row in rows], self.top_k, texts)

    def prepare(self, device: torch.device) -> None:
        self._device = device

    def scores(self, answer: dict[str, Tensor]) -> TopKScores:
        on_device = {
            n: t.to(self._device)
            for n, t in (answer or top_k_tensors([], [], self.top_k, self.vocab)).items()
        }
        return TopKScores(**on_device, vocab=self.vocab)


def why_not_served(terms: Sequence[Term | TermConfig], top_k: int) -> list[str]:
    """What a teacher that is known at its `top_k` likeliest tokens and the label cannot tell these terms
    exactly."""
    reasons = []
    for config in terms:
        ends = [config] if isinstance(config, Term) else [config.at(0.0).build(), config.at(1.0).build()]
        reasons += [f"term {term.name} {why}" for term in ends if (why := _why_not(term, top_k))]
    return list(dict.fromkeys(reasons))


def _why_not(term: Term, top_k: int) -> str | None:
    support = term.support
    if support.whole:
        return "reads every token of the vocabulary"
    if support.draws:
        return (
            "reads tokens that the student draws"
            if support.draws_of == "student"
            else "draws from the whole vocabulary"
        )
    if support.top_k and support.top_k_of == "student":
        return "reads the student's likeliest tokens"
    if support.top_k > top_k:
        return f"reads {support.top_k} tokens"
    if term.temperature != 1.0:
        return f"softens by temperature {term.temperature:g}, which normalises over the whole vocabulary"
    return None
