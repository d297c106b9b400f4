"""What `hpd serve-teacher` computes: a live teacher asked about rows, many requests in one forward.

Axes: B rows, T tokens, N label positions, D hidden, V vocabulary, K tokens asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hpd.losses import Head, Scores
from hpd.losses.products import chunks, project_
from hpd.models.forward import scores_of
from hpd.teachers.fingerprints import model_fingerprint, tokenizer_hash
from hpd.teachers.model import ModelTeacher
from hpd.teachers.remote.wire import Query, check_finite

__all__ = ["Backend", "Batcher", "Busy", "Wanted"]


_CHUNK_BYTES = 64 * 2**20


class Wanted(NamedTuple):
    """What a request asks to be told at each position."""

    hidden: torch.dtype | None
    """Hidden states in this dtype, and log_z."""
    top_k: int
    """The k likeliest tokens; 0 for none."""


class Backend:
    """A frozen model and its tokenizer.

    Args:
        model: the teacher, placed on its device.
        tokenizer: its tokenizer, whose hash and map students compare with their own.
        max_batch_tokens: tokens of one forward, padding included.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_batch_tokens: int = 16384
    ):
        self._teacher = ModelTeacher(model)
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        config: Any = model.config.get_text_config()
        self.vocab = int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.max_row_tokens = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self.fingerprint = model_fingerprint(model)
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        with torch.no_grad():
            self.head = self._score([torch.zeros(1, dtype=torch.int64)], [torch.zeros(1, dtype=torch.int64)])[
                0
            ].head
        self._head = _for_products(self.head)

    def answer(self, queries: Sequence[tuple[Query, Wanted]]) -> list[dict[str, Tensor] | Exception]:
        """Answers in the order of the queries; a failure of one query is its own."""
        rows = [row for query, _ in queries for row in query.rows]
        positions = [own for query, _ in queries for own in query.positions]
        with torch.no_grad():
            found = self._score(rows, positions)
            answers: list[dict[str, Tensor] | Exception] = []
            for query, wanted in queries:
                part, found = found[: len(query.rows)], found[len(query.rows) :]
                hidden = torch.cat([scores.hidden for scores in part])
                try:
                    answers.append(self._tell(hidden, query.tokens, wanted))
                except ValueError as error:  # this row makes the teacher overflow; the others are answered
                    answers.append(error)
        return answers

    def _score(self, rows: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Scores]:
        """Hidden states at the positions of each row; rows of similar length share a forward."""
        found: dict[int, Scores] = {}
        for group in self._groups([len(row) for row in rows]):
            padded = pad_sequence([rows[i] for i in group], batch_first=True)  # [B, T], padded on the right
            mask = pad_sequence([torch.ones_like(rows[i]) for i in group], batch_first=True)
            index = torch.cat([positions[i] + place * padded.shape[1] for place, i in enumerate(group)])
            device = self._teacher.model.device
            inputs = {"input_ids": padded.to(device), "attention_mask": mask.to(device)}
            scores = scores_of(self._teacher.model, inputs, index.to(device))
            for i, hidden in zip(group, scores.hidden.split([len(positions[i]) for i in group]), strict=True):
                found[i] = Scores(hidden, scores.head)
        return [found[i] for i in range(len(rows))]

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        group: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            # The first row of a group is its longest.
            if group and (len(group) + 1) * lengths[group[0]] > self.max_batch_tokens:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _tell(self, hidden: Float[Tensor, "N D"], tokens: Tensor | None, wanted: Wanted) -> dict[str, Tensor]:
        """The numbers that are asked for; logits exist one chunk at a time."""
        parts: dict[str, list[Tensor]] = {}
        for chunk in chunks(len(hidden), 4 * self.vocab, _CHUNK_BYTES):
            part = hidden[chunk]
            logits = torch.empty(len(part), self.vocab, device=part.device)  # [n, V]
            project_(Scores(part.to(_weight(self._head).dtype), self._head), logits)
            log_z = torch.logsumexp(logits, -1)
            check_finite("the teacher's distribution", log_z)
            told = {"log_z": log_z}
            if wanted.top_k:
                values, ids = logits.topk(min(wanted.top_k, self.vocab), -1)
                told |= {"top_tokens": ids, "top_logprobs": values - log_z[:, None]}
            if tokens is not None:
                asked = tokens[chunk].to(logits.device)
                told["token_logprobs"] = logits.gather(1, asked) - log_z[:, None]
            for name, tensor in told.items():
                parts.setdefault(name, []).append(tensor.cpu())
        told = {name: torch.cat(tensors) for name, tensors in parts.items()}
        if wanted.hidden is not None:
            told["hidden"] = hidden.to(wanted.hidden).cpu()
            check_finite("hidden", told["hidden"])
        return told


def _weight(head: Head) -> Tensor:
    assert head.weight is not None
    return head.weight


def _for_products(head: Head) -> Head:
    # A CPU's low-precision products round to the operands' dtype; the live teacher's operator raises them
    # too.
    weight = _weight(head)
    raised = weight.float() if weight.device.type == "cpu" else weight
    return head._replace(weight=raised, bias=None if head.bias is None else head.bias.float())


class Busy(Exception):
    """The queue is full."""


class _Job(NamedTuple):
    query: Query
    wanted: Wanted
    abandoned: Callable[[], Awaitable[bool]]
    done: asyncio.Future[dict[str, Tensor]]


class Batcher:
    """Puts waiting requests into one forward; a bounded number may wait.

    Args:
        backend: what answers.
        max_waiting: requests that may wait or run; one more is refused.
        max_tokens: tokens of the requests that are answered together.
    """

    def __init__(self, backend: Backend, max_waiting: int, max_tokens: int):
        self._backend = backend
        self._max_waiting = max_waiting
        self._max_tokens = max_tokens
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self.pending = 0

    async def submit(
        self, query: Query, wanted: Wanted, abandoned: Callable[[], Awaitable[bool]]
    ) -> dict[str, Tensor]:
        """The answer to a query.

        Args:
            query, wanted: what is asked.
            abandoned: whether the client has gone; then the query is not computed.

        Raises:
            Busy: too many requests wait.
            ValueError: the model's answer to it is not finite.
        """
        if self.pending >= self._max_waiting:
            raise Busy
        self.pending += 1
        try:
            done: asyncio.Future[dict[str, Tensor]] = asyncio.get_running_loop().create_future()
            self._jobs.put_nowait(_Job(query, wanted, abandoned, done))
            return await done
        finally:
            self.pending -= 1

    @contextlib.asynccontextmanager
    async def running(self):
        """Answers while inside; what is still waiting at the end has been answered by then."""
        worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            jobs = [await self._jobs.get()]
            size = jobs[0].query.num_tokens
            while not self._jobs.empty() and size < self._max_tokens:
                jobs.append(self._jobs.get_nowait())
                size += jobs[-1].query.num_tokens
            jobs = [job for job in jobs if not job.done.done() and not await self._is_abandoned(job)]
            if jobs:
                await self._answer(jobs)

    async def _is_abandoned(self, job: _Job) -> bool:
        gone = await job.abandoned()
        if gone:
            job.done.cancel()
        return gone

    async def _answer(self, jobs: Sequence[_Job]) -> None:
        ask = [(job.query, job.wanted) for job in jobs]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._backend.answer, ask
            )
        except Exception as error:  # out of memory, a driver's error: the requests fail, the server goes on
            answers = [error] * len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            if job.done.done():
                continue
            if isinstance(answer, Exception):
                job.done.set_exception(answer)
            else:
                job.done.set_result(answer)
