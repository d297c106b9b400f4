"""A teacher that was asked before: its answers come from a cache, its weights are never loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores, TeacherScores, TopKScores
from hpd.methods.terms import Term, TermConfig
from hpd.teachers.cache import Cache, CorruptCacheError
from hpd.teachers.errors import TeacherUnavailable
from hpd.teachers.limits import check_cached_terms
from hpd.teachers.teacher import Teacher

__all__ = ["CachedTeacher", "scores_of_stored", "stored_hidden"]


class CachedTeacher(Teacher):
    """Looks the label positions of a batch up by their keys, whatever the order, packing, padding or number
    of processes.

    Kind hidden answers with hidden states, head and log-normalizer: exact for every objective. Kind top_k
    answers with the k likeliest tokens and the label. Kind sampled answers with drawn tokens and their
    weights, whose expectation is the teacher's distribution, and the label.

    Args:
        path: the folder that `hpd cache` wrote.

    Raises:
        ValueError: no cache, an unfinished or a damaged one.
    """

    asks_ahead = True
    may_fail = True  # a disk loses files in the middle of a run

    def __init__(self, path: str | Path):
        self.cache = Cache(path)
        about = self.cache.about
        self.vocab = int(about["vocab"])
        self._kind: str = about["kind"]
        self.drawn = self._kind == "sampled"
        self._head = self.cache.head if self._kind == "hidden" else None
        self._device = torch.device("cpu")
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker asks and nothing else.
        return {**self.__dict__, "_head": None, "_pool": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def check_terms(self, terms: Sequence[Term | TermConfig]) -> None:
        check_cached_terms(self.cache.path, self.cache.about, terms)

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        self._device = accelerator.device
        if self._head is not None:
            weight, bias = (
                None if t is None else t.to(self._device) for t in (self._head.weight, self._head.bias)
            )
            self._head = self._head._replace(weight=weight, bias=bias)

    def register_rows(self, rows: Iterable[tuple[Mapping[str, Any], Tensor]]) -> None:
        """Check that every label position of the dataset is in the cache.

        Raises:
            ValueError: how many are not, and which row is the first.
        """
        missing, total, first = 0, 0, None
        for number, (_, keys) in enumerate(rows):
            absent = int(self.cache.missing(keys.numpy()).sum())
            missing += absent
            total += len(keys)
            first = number if first is None and absent else first
        if missing:
            fingerprint = self.cache.about["fingerprint"]
            raise ValueError(
                f"{missing:,} of {total:,} label positions are not in the cache {self.cache.path} (first in "
                f"row {first}), written for {fingerprint['data']} with max_length "
                f"{fingerprint['max_length']}; another dataset, template, tokenizer or max_length makes "
                "other rows. Train on the rows that were cached, or cache these."
            )

    def ask(
        self, inputs: Mapping[str, Any], batch: TokenBatch
    ) -> dict[str, Tensor] | Future[dict[str, Tensor]] | CorruptCacheError:
        """Read the answers for a collated batch, beside the step: in a loader's worker here and now, else in
        a thread.

        accelerate collates one batch ahead, so a thread has a whole step to read in.
        """
        keys = batch.keys.cpu().numpy()
        if get_worker_info() is not None:
            try:
                return self.cache.read(keys)
            except CorruptCacheError as error:
                return error  # for `wait`, which all processes call
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="hpd-cache")
        return self._pool.submit(self._read, keys)

    def wait(self, handle: Any) -> None:
        try:
            _answer(handle)
        except CorruptCacheError as error:
            raise TeacherUnavailable(str(error)) from None

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores:
        found = inputs.get("asked")
        if found is None:
            found = self.cache.read(batch.keys.cpu().numpy())
        found = _answer(found)
        stored = {name: tensor.to(self._device, non_blocking=True) for name, tensor in found.items()}
        return scores_of_stored(stored, self._kind, cast(int, self.vocab), self._head)

    def _read(self, keys: np.ndarray) -> dict[str, Tensor]:
        found = self.cache.read(keys)
        return (
            {name: tensor.pin_memory() for name, tensor in found.items()}
            if self._device.type == "cuda"
            else found
        )


def _answer(handle: Any) -> dict[str, Tensor]:
    if isinstance(handle, CorruptCacheError):
        raise handle
    return handle.result() if isinstance(handle, Future) else handle


def stored_hidden(stored: Mapping[str, Tensor]) -> Tensor:
    """Hidden states as the cache holds them; int8 times the scale of each row."""
    hidden = stored["hidden"]
    return hidden.float() * stored["scale"][:, None] if "scale" in stored else hidden


def scores_of_stored(stored: Mapping[str, Tensor], kind: str, vocab: int, head: Head | None) -> TeacherScores:
    """A teacher's answer out of what the cache holds of some positions.

    Args:
        stored: the tensors of a shard at these positions.
        kind: of the cache.
        vocab: of the teacher.
        head: the teacher's (kind hidden).
    """
    if kind == "hidden":
        assert head is not None
        return Scores(stored_hidden(stored), head, stored["log_z"])
    logprobs = stored["logprobs"].float()
    if "tail" in stored:
        kept = torch.log1p(-stored["tail"]) - torch.logsumexp(logprobs, -1)
        logprobs = logprobs + kept[:, None]
    labels, drawn = stored["label_logprobs"], kind == "sampled"
    return TopKScores(stored["tokens"].long(), logprobs, labels, vocab, drawn)
