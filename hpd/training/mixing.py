"""On-policy text is another source of rows: before a step, some of its dataset rows become rows that the
student wrote.

What follows (collator, TokenBatch, operator) is the same for both.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpd.batch import DATASET, IGNORE_INDEX, SOURCES, STUDENT, uniforms
from hpd.data.taken_apart import TrainingRow, rows_of
from hpd.data.written_rows import AnswerReader
from hpd.generation.rollouts import Rollout, RolloutEngine
from hpd.methods.prefixes import Prefixes, ReplayConfig, RolloutConfig
from hpd.methods.schedules import ValidationRamp, value_at

__all__ = [
    "PrefixMixer",
    "ReplayBuffer",
    "Stored",
    "repeated_share",
    "rollout_metrics",
]

# Uniforms of a row before those of its tokens: who writes it, where it is cut, new or old, which old one.
_COINS = 4
_NGRAM_TOKENS = 4


class RolloutRequest(NamedTuple):
    """A completion to be written."""

    place: int
    """Index of the row in the step."""
    prefix: TrainingRow
    limit: int
    uniforms: Tensor
    """Of its tokens' draws."""


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that occurred before, in [0, 1]: near 1 in a loop."""
    grams = [tuple(tokens[i : i + _NGRAM_TOKENS]) for i in range(len(tokens) - _NGRAM_TOKENS + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class PrefixMixer:
    """Replaces rows of a step's batches by the student's own.

    Which rows, where they are cut and what is drawn depends on (seed, optimizer step, content of the row,
    number among equal rows of the step) alone: not on world size, accumulation, batch order or the point of
    resumption.

    Args:
        prefixes: the shares.
        rollouts: how the student writes.
        collate: makes a batch of rows, as for the dataset's.
        engine: called once, at the first rollout, when the model is in its final wrapping.
        seed: of the run.
        max_length: longest row, in tokens; None: only the rollout's own limits.
        on_dataset: True if any term learns from the dataset's tokens; otherwise they are no labels.
        num_updates: optimizer steps per batch of rollouts.
        collective: True if other processes wait for this one to generate.
        with_behavior_logprobs: True if rows carry the log-probabilities of those who wrote them.
        reader: of a teacher with another tokenizer.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        rollouts: RolloutConfig,
        collate: Callable[[list[Any]], dict[str, Any]],
        engine: Callable[[], RolloutEngine],
        *,
        seed: int,
        max_length: int | None,
        on_dataset: bool = True,
        num_updates: int = 1,
        collective: bool = False,
        with_behavior_logprobs: bool = False,
        reader: AnswerReader | None = None,
    ):
        self.prefixes, self.rollouts = prefixes, rollouts
        self.reader = reader
        self._collate, self._make_engine = collate, engine
        self._engine: RolloutEngine | None = None
        self._seed, self._max_length, self._on_dataset = seed, max_length, on_dataset
        self._num_updates, self._collective = num_updates, collective
        self._with_behavior_logprobs = with_behavior_logprobs
        schedule = prefixes.adaptive
        self.ramp = None
        if schedule is not None and schedule.end is not None:
            self.ramp = ValidationRamp(
                schedule.start, schedule.end, prefixes.adaptive_step, prefixes.adaptive_margin
            )
        self.replay = ReplayBuffer(rollouts.replay) if rollouts.replay else None
        self._current: list[list[dict[str, list[Any]]]] | None = None
        self._sums: defaultdict[str, float] = defaultdict(float)

    def share(self, progress: float) -> float:
        """The student's share of the rows now."""
        return self.prefixes.student_share(progress) if self.ramp is None else self.ramp.share

    def __call__(self, batches: Sequence[dict[str, Any]], step: int, progress: float) -> list[dict[str, Any]]:
        """The batches of an optimizer step, some rows written by the student.

        Args:
            batches: collated, one a micro-batch.
            step: the optimizer step, counted from 0.
            progress: share of the training steps that lie behind.
        """
        if step % self._num_updates == 0 or self._current is None:
            share = self.share(progress)
            if share == 0.0 and self._on_dataset:
                self._current = None
                return list(batches)
            self._current = self._write([rows_of(batch) for batch in batches], step, progress, share)
        return [self._collate(group) for group in self._current]

    def _write(
        self, groups: Sequence[Sequence[TrainingRow]], step: int, progress: float, share: float
    ) -> list[list[dict[str, list[Any]]]]:
        rows = [row for group in groups for row in group]
        out = [self._dataset_row(row) for row in rows]
        requests = self._choose(rows, out, step, progress, share)
        started = time.perf_counter()
        if requests or self._collective:
            written = self._generate(requests, step)
            for request, rollout in zip(requests, written, strict=True):
                out[request.place] = self._student_row(request, rollout)
                self._observe(rows[request.place], rollout)
            if self.replay is not None:
                self.replay.add((out[request.place] for request in requests), step)
        self._sums["seconds"] += time.perf_counter() - started
        # Rows without a label fill the last batch of several processes.
        self._sums["rows"] += sum(any(label != IGNORE_INDEX for label in row.labels) for row in rows)
        sizes = [len(group) for group in groups]
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return [out[a:b] for a, b in itertools.pairwise(bounds)]

    def _choose(
        self,
        rows: Sequence[TrainingRow],
        out: list[dict[str, list[Any]]],
        step: int,
        progress: float,
        share: float,
    ) -> list[RolloutRequest]:
        """Toss the coins: rows to be written are returned, rows from the buffer are put into `out`."""
        of_rows = uniforms(_row_keys(rows), seed=self._seed, step=step, count=_COINS + self._longest())
        whole_batch = bool(
            uniforms(torch.zeros(1, dtype=torch.int64), seed=self._seed, step=step, count=1)[0, 0] < share
        )
        fresh = 1.0
        if self.replay is not None and self.rollouts.replay is not None:
            self._sums["expired"] += self.replay.expire(step)
            fresh = float(value_at(self.rollouts.replay.fresh, progress)) if self.replay.full else 1.0
        requests = []
        for place, (row, of_row) in enumerate(zip(rows, of_rows, strict=True)):
            coin, cut, age, which = of_row[:_COINS].tolist()
            chosen = whole_batch if self.prefixes.mix == "batch" else coin < share
            if not chosen or all(label == IGNORE_INDEX for label in row.labels):
                continue
            self._sums["student_rows"] += 1
            if self.replay is None or len(self.replay) == 0 or age < fresh:
                requests.append(self._request(place, row, cut, of_row[_COINS:]))
            else:
                stored = self.replay.draw(which)
                out[place] = stored.row
                self._sums["replayed"] += 1
                self._sums["age"] += step - stored.step
        return requests

    def _longest(self) -> int:
        return self.prefixes.continue_tokens or self.rollouts.max_new_tokens

    def _request(self, place: int, row: TrainingRow, cut: float, of_tokens: Tensor) -> RolloutRequest:
        # A token is a label only where something stands before it, so a row of text alone is continued from
        # its first token.
        labeled = [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX]
        start = row.answer if self.prefixes.continue_tokens is None else labeled[int(cut * len(labeled))]
        prefix = row._replace(input_ids=row.input_ids[:start], labels=row.labels[:start])
        limit = self.rollouts.max_prompt_tokens
        if limit is not None and self.prefixes.continue_tokens is None:
            prefix = prefix._replace(input_ids=prefix.input_ids[-limit:], labels=prefix.labels[-limit:])
            prefix = prefix._replace(begin=None if row.begin is None else len(prefix.input_ids))
        room = self._longest() if self._max_length is None else self._max_length - len(prefix.input_ids)
        return RolloutRequest(place, prefix, min(self._longest(), room), of_tokens)

    def _generate(self, requests: Sequence[RolloutRequest], step: int) -> list[Rollout]:
        if self._engine is None:
            self._engine = self._make_engine()
        draws = [request.uniforms for request in requests]
        return self._engine.generate(
            [request.prefix.input_ids for request in requests],
            [request.limit for request in requests],
            torch.stack(draws) if draws else torch.zeros(0, 1, dtype=torch.float64),
            step,
        )

    def _dataset_row(self, row: TrainingRow) -> dict[str, list[Any]]:
        return self._row(row, [], [])

    def _student_row(self, request: RolloutRequest, rollout: Rollout) -> dict[str, list[Any]]:
        masked = self.rollouts.truncated == "mask" and not rollout.ended
        labels = [IGNORE_INDEX] * len(rollout.tokens) if masked else rollout.tokens
        row = request.prefix._replace(input_ids=request.prefix.input_ids + rollout.tokens)
        if self.reader is not None:
            start, before = row.answer, len(request.prefix.input_ids)
            read = self.reader.read(row.input_ids[start:], rollout.ended, before - start)
            known = [True] * start + read.learned
            self._sums["unread"] += known[before:].count(False)
            chunks = [[] for _ in range(start)] + read.chunks
            row = row._replace(labels=_kept(row.labels, known[:before]), teacher_chunks=chunks)
            labels = _kept(labels, known[before:])
        return self._row(row, labels, rollout.logprobs)

    def _row(self, row: TrainingRow, new_labels: list[int], logprobs: list[float]) -> dict[str, list[Any]]:
        """`row`, whose last tokens are the student's where there are new labels for them."""
        old = row.labels if self._on_dataset else [IGNORE_INDEX] * len(row.labels)
        out: dict[str, list[Any]] = {
            "input_ids": row.input_ids,
            "labels": old + new_labels,
            SOURCES: [DATASET] * len(old) + [STUDENT] * len(new_labels),
        }
        if self._with_behavior_logprobs:
            out["behavior_logprobs"] = [math.nan] * len(old) + logprobs
        return out | row.teacher_columns()

    def _observe(self, row: TrainingRow, rollout: Rollout) -> None:
        self._sums["rollouts"] += 1
        self._sums["tokens"] += len(rollout.tokens)
        self._sums["truncated"] += not rollout.ended
        self._sums["repetition"] += repeated_share(rollout.tokens)
        self._sums["dataset_tokens"] += sum(label != IGNORE_INDEX for label in row.labels)

    def read(self) -> dict[str, float]:
        """Sums since the last call, as `rollout_metrics` takes them."""
        sums = dict(self._sums)
        self._sums.clear()
        return sums

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must hold on every process."""
        return {
            "replay": None if self.replay is None else self.replay.state_dict(),
            "current": self._current if self._num_updates > 1 else None,
            "sums": dict(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if self.replay is not None and state["replay"] is not None:
            self.replay.load_state_dict(state["replay"])
        self._current = state["current"]
        self._sums = defaultdict(float, state["sums"])


def _kept(labels: Sequence[int], learned: Sequence[bool]) -> list[int]:
    return [label if bit else IGNORE_INDEX for label, bit in zip(labels, learned, strict=True)]


def rollout_metrics(sums: Mapping[str, float], whole: bool) -> dict[str, float]:
    """Figures about the student's writing, as they are logged, from sums over processes.

    Args:
        sums: as `PrefixMixer.read` gives them, added up.
        whole: True if completions are written to their end (truncation and length mean nothing otherwise).
    """
    if not sums.get("rows"):
        return {}
    metrics = {"rollouts/share": sums.get("student_rows", 0.0) / sums["rows"]}
    if count := sums.get("rollouts", 0.0):
        metrics["rollouts/tokens"] = sums["tokens"]
        metrics["rollouts/length"] = sums["tokens"] / count
        metrics["rollouts/repetition"] = sums["repetition"] / count
        metrics["rollouts/tokens_per_second"] = sums["tokens"] / max(sums["seconds"], 1e-9)
        if whole:
            metrics["rollouts/truncated"] = sums["truncated"] / count
            metrics["rollouts/length_ratio"] = sums["tokens"] / max(sums["dataset_tokens"], 1.0)
        if "unread" in sums:
            metrics["rollouts/unread"] = sums["unread"] / max(sums["tokens"], 1.0)
    if "expired" in sums:
        replayed = sums.get("replayed", 0.0)
        metrics["replay/share"] = replayed / max(sums.get("student_rows", 0.0), 1.0)
        metrics["replay/age_steps"] = sums.get("age", 0.0) / max(replayed, 1.0)
        metrics["replay/expired"] = sums["expired"]
    return metrics


def _row_keys(rows: Sequence[TrainingRow]) -> Tensor:
    """A 64-bit key a row: its tokens, and its number among equal ones."""
    seen: Counter[bytes] = Counter()
    keys = []
    for row in rows:
        content = b",".join(str(token).encode() for token in row.input_ids)
        digest = hashlib.blake2b(content + b"#" + str(seen[content]).encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "big", signed=True))
        seen[content] += 1
    return torch.tensor(keys, dtype=torch.int64)


class Stored(NamedTuple):
    """A row that the student wrote."""

    row: dict[str, list[Any]]
    """As the collator takes it."""
    step: int
    """The optimizer step whose weights wrote it."""


class ReplayBuffer:
    """First in, first out; rows that are too old leave before they are drawn.

    Args:
        config: capacity and staleness limit.
    """

    def __init__(self, config: ReplayConfig):
        self._config = config
        self._stored: deque[Stored] = deque(maxlen=config.capacity)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def full(self) -> bool:
        """True if the next row pushes the oldest one out."""
        return len(self._stored) == self._config.capacity

    def add(self, rows: Iterable[Mapping[str, list[Any]]], step: int) -> None:
        """Keep rows that the weights of `step` wrote."""
        self._stored.extend(Stored(dict(row), step) for row in rows)

    def expire(self, step: int) -> int:
        """Drop what is too old at `step`; returns how many rows that were."""
        limit, before = self._config.max_age_steps, len(self._stored)
        while limit is not None and self._stored and step - self._stored[0].step > limit:
            self._stored.popleft()
        return before - len(self._stored)

    def draw(self, uniform: float) -> Stored:
        """The row at a place in [0, 1) of the buffer; the row stays.

        Raises:
            IndexError: the buffer is empty.
        """
        return self._stored[int(uniform * len(self._stored))]

    def state_dict(self) -> list[tuple[dict[str, list[Any]], int]]:
        """State that a checkpoint must hold."""
        return [(stored.row, stored.step) for stored in self._stored]

    def load_state_dict(self, state: Iterable[tuple[dict[str, list[Any]], int]]) -> None:
        """Go on where `state_dict` was taken."""
        self._stored = deque((Stored(row, step) for row, step in state), maxlen=self._config.capacity)
