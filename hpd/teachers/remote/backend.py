"""The computation of `hpd serve-teacher`: a live teacher asked about rows, many requests in one forward.

Axes: B rows, T tokens, N label positions, D hidden, V vocabulary.
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
from hpd.models.forward import has_own_logits, scores_of
from hpd.teachers.fingerprints import model_fingerprint, tokenizer_hash
from hpd.teachers.model import ModelTeacher
from hpd.teachers.remote.wire import ScoreRequest, check_finite

__all__ = ["Backend", "Batcher", "Busy", "Wanted"]

_CHUNK_BYTES = 64 * 2**20


class Wanted(NamedTuple):
    """The tensors that a request asks for, at each position."""

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
        self._teacher.probe(packed=False)
        if has_own_logits(model):
            raise ValueError(
                f"The teacher's head ({type(model).__name__}) is more than a product, a scale and a cap, and "
                "a server hands out hidden states and head: load this teacher next to the student "
                "(teacher.type: model)."
            )
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

    def answer(self, requests: Sequence[tuple[ScoreRequest, Wanted]]) -> list[dict[str, Tensor] | Exception]:
        """Responses in the order of the requests; a failure of one request is its own."""
        rows = [row for request, _ in requests for row in request.rows]
        positions = [each for request, _ in requests for each in request.positions]
        with torch.no_grad():
            found = self._score(rows, positions)
            responses: list[dict[str, Tensor] | Exception] = []
            for request, wanted in requests:
                part = found[: len(request.rows)]
                found = found[len(request.rows) :]
                try:
                    responses.append(self._response(torch.cat([scores.hidden for scores in part]), wanted))
                except ValueError as error:  # this row makes the teacher overflow; the others are answered
                    responses.append(error)
        return responses

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

    def _response(self, hidden: Float[Tensor, "N D"], wanted: Wanted) -> dict[str, Tensor]:
        """The tensors that are asked for; logits exist one chunk at a time."""
        parts: dict[str, list[Tensor]] = {}
        for chunk in chunks(len(hidden), 4 * self.vocab, _CHUNK_BYTES):
            part = hidden[chunk]
            logits = torch.empty(len(part), self.vocab, device=part.device)  # [n, V]
            project_(Scores(part.to(_weight(self._head).dtype), self._head), logits)
            log_z = torch.logsumexp(logits, -1)
            check_finite("the teacher's distribution", log_z)
            found = {"log_z": log_z}
            if wanted.top_k:
                values, ids = logits.topk(min(wanted.top_k, self.vocab), -1)
                found |= {"top_tokens": ids, "top_logprobs": values - log_z[:, None]}
            for name, tensor in found.items():
                parts.setdefault(name, []).append(tensor.cpu())
        response = {name: torch.cat(tensors) for name, tensors in parts.items()}
        if wanted.hidden is not None:
            response["hidden"] = hidden.to(wanted.hidden).cpu()
            check_finite("hidden", response["hidden"])
        return response


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


class _Waiting(NamedTuple):
    request: ScoreRequest
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
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self.pending = 0

    async def submit(
        self, request: ScoreRequest, wanted: Wanted, abandoned: Callable[[], Awaitable[bool]]
    ) -> dict[str, Tensor]:
        """The response to a request.

        Args:
            request, wanted: what is asked.
            abandoned: true if the client has gone; then nothing is computed.

        Raises:
            Busy: too many requests wait.
            ValueError: the model's scores are not finite.
        """
        if self.pending >= self._max_waiting:
            raise Busy
        self.pending += 1
        try:
            done: asyncio.Future[dict[str, Tensor]] = asyncio.get_running_loop().create_future()
            self._queue.put_nowait(_Waiting(request, wanted, abandoned, done))
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
            batch = [await self._queue.get()]
            size = batch[0].request.num_tokens
            while not self._queue.empty() and size < self._max_tokens:
                batch.append(self._queue.get_nowait())
                size += batch[-1].request.num_tokens
            batch = [each for each in batch if not each.done.done() and not await self._is_abandoned(each)]
            if batch:
                await self._answer(batch)

    async def _is_abandoned(self, waiting: _Waiting) -> bool:
        gone = await waiting.abandoned()
        if gone:
            waiting.done.cancel()
        return gone

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        requests = [(each.request, each.wanted) for each in batch]
        responses: Sequence[dict[str, Tensor] | Exception]
        try:
            responses = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._backend.answer, requests
            )
        except Exception as error:  # out of memory, a driver's error: the requests fail, the server goes on
            responses = [error] * len(batch)
        for each, response in zip(batch, responses, strict=True):
            if each.done.done():
                continue
            if isinstance(response, Exception):
                each.done.set_exception(response)
            else:
                each.done.set_result(response)
