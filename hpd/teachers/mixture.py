"""Several teachers: each row has its own, or all of them are mixed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores, TopKScores
from hpd.losses.products import chunks, for_products, project_, wide
from hpd.teachers.model import RoutedScores, Teacher

__all__ = ["MixtureTeacher", "RoutedTeacher", "vocab_of"]

# Logits of one teacher beside the mixture: a small part of what the mixture itself takes.
_CHUNK_BYTES = 64 * 2**20


class MixtureTeacher:
    r"""A weighted mixture of distributions: :math:`p = \sum_i w_i\, p_i`.

    A mixture has no hidden state, so it is computed on the whole vocabulary: every teacher's forward and head
    product, and `[N, V]` float32 numbers per micro-batch (4 bytes x label positions x vocabulary: 1.2 GB for
    2,048 positions of 151,936 tokens). Smaller micro-batches with more accumulation cost less memory and give
    the same gradient.

    Args:
        teachers: by name; those known at their k likeliest tokens only cannot be mixed.
        weights: of each, > 0; divided by their sum.
    """

    def __init__(self, teachers: Mapping[str, Teacher], weights: Mapping[str, float]):
        _check_names(teachers, weights)
        self.teachers = dict(teachers)
        total = sum(weights.values())
        self.weights = {name: weights[name] / total for name in teachers}
        self.vocab = _smallest_vocab(self.teachers.values())

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        for teacher in self.teachers.values():
            teacher.prepare(student, accelerator)

    def read_rows(self, rows: Iterable[tuple[Mapping[str, Any], Tensor]]) -> None:
        _read_rows(self.teachers.values(), rows)

    def fetch(self, inputs: Mapping[str, Any], batch: TokenBatch) -> dict[str, Any]:
        return {name: _fetch(teacher, inputs, batch) for name, teacher in self.teachers.items()}

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> Scores:
        fetched = inputs.get("fetched") or {}
        mixture: Tensor | None = None
        for name, teacher in self.teachers.items():
            part = teacher.scores({**inputs, "fetched": fetched.get(name)}, batch)
            if not isinstance(part, Scores):
                raise ValueError(
                    f"A mixture needs whole distributions, and teacher {name!r} knows its likeliest tokens "
                    "only: use a live teacher or a hidden cache, or route rows instead."
                )
            mixture = _mix(mixture, part, self.weights[name], self.vocab or part.vocab)
        assert mixture is not None
        return Scores(mixture, Head(None))


def _mix(mixture: Tensor | None, scores: Scores, weight: float, vocab: int) -> Float[Tensor, "N V"]:
    """Add `weight` times the distribution of `scores` over the first `vocab` tokens, chunk by chunk, all in
    logarithms."""
    num_tokens = len(scores.hidden)
    first = mixture is None
    if mixture is None:
        mixture = scores.hidden.new_empty(num_tokens, vocab, dtype=wide(scores.hidden))
    ready = for_products(scores, vocab)
    for chunk in chunks(num_tokens, vocab * mixture.element_size(), _CHUNK_BYTES):
        part = mixture[chunk]
        logits = project_(ready._replace(hidden=ready.hidden[chunk]), torch.empty_like(part))
        logprobs = torch.log_softmax(logits, -1, out=logits).add_(math.log(weight))
        # Sums of probabilities would lose what is below the least float32, and reverse KLs look there.
        part.copy_(logprobs) if first else torch.logaddexp(part, logprobs, out=part)
    return mixture


class RoutedTeacher:
    """Every row has one teacher, named by a column of the dataset.

    Rows are known by the keys of their label positions, so the order of training does not matter. A live
    teacher runs on the rows of its own, and not at all on a micro-batch without any.

    Args:
        teachers: by the names that stand in the column.
        column: of the dataset.
    """

    def __init__(self, teachers: Mapping[str, Teacher], column: str):
        self.teachers = dict(teachers)
        self.column = column
        self.vocab = _smallest_vocab(self.teachers.values())
        self._names = list(self.teachers)
        self._keys = self._choices = np.empty(0, dtype=np.int64)
        self._lockstep = False

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        # Sharded weights are gathered by all processes together: then every teacher runs on every
        # micro-batch.
        self._lockstep = any(
            getattr(accelerator.state, plugin, None) is not None
            for plugin in ("deepspeed_plugin", "fsdp_plugin")
        )
        for teacher in self.teachers.values():
            teacher.prepare(student, accelerator)

    def read_rows(self, rows: Iterable[tuple[Mapping[str, Any], Tensor]]) -> None:
        """Learn which teacher each row has.

        Raises:
            ValueError: the column is missing, names no teacher, or gives one and the same row to two.
        """
        keys, choices, numbers = [], [], []
        own: list[list[tuple[Mapping[str, Any], Tensor]]] = [[] for _ in self._names]
        for number, (row, own_keys) in enumerate(rows):
            if self.column not in row:
                raise ValueError(
                    f"Rows are routed by {self.column!r}, which the dataset does not have: {', '.join(row)}."
                )
            if row[self.column] not in self.teachers:
                raise ValueError(
                    f"Row {number} has {self.column}: {row[self.column]!r}, and there is no such teacher: "
                    f"{', '.join(self._names)}."
                )
            choice = self._names.index(row[self.column])
            keys.append(own_keys.numpy())
            choices.append(np.full(len(own_keys), choice))
            numbers.append(np.full(len(own_keys), number))
            if hasattr(self.teachers[row[self.column]], "read_rows"):
                own[choice].append(({}, own_keys))
        self._learn(*(np.concatenate(parts) for parts in (keys, choices, numbers)))
        for name, its_rows in zip(self._names, own, strict=True):
            _read_rows([self.teachers[name]], its_rows)

    def _learn(self, keys: np.ndarray, choices: np.ndarray, numbers: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        keys, choices, numbers = keys[order], choices[order], numbers[order]
        torn = np.flatnonzero((keys[1:] == keys[:-1]) & (choices[1:] != choices[:-1]))
        if len(torn):
            one, other = int(torn[0]), int(torn[0]) + 1
            raise ValueError(
                f"Rows {numbers[one]} and {numbers[other]} are the same, and go to "
                f"{self._names[choices[one]]!r} and {self._names[choices[other]]!r}: remove one of them."
            )
        self._keys, self._choices = keys, choices

    def fetch(self, inputs: Mapping[str, Any], batch: TokenBatch) -> dict[str, Any]:
        """Which positions are whose, and what each teacher fetches for its own."""
        choices = self._choices_of(batch.keys.numpy())
        fetched = {}
        for number, name in enumerate(self._names):
            positions = (choices == number).nonzero().flatten()
            # Someone must answer a batch without labels, too.
            if len(positions) or self._lockstep or (number == 0 and not len(choices)):
                own = _rows_of(inputs, batch, positions)
                fetched[name] = {**own._asdict(), "positions": positions}
                fetched[name]["fetched"] = _fetch(
                    self.teachers[name], *_inputs_of(inputs, batch, fetched[name])
                )
        return fetched

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> RoutedScores:
        fetched = inputs.get("fetched")
        if fetched is None:
            fetched = self.fetch(
                {k: v.cpu() for k, v in inputs.items() if isinstance(v, Tensor)}, _on_cpu(batch)
            )
        parts = []
        for name, own in fetched.items():
            own = {k: v.to(batch.labels.device) if isinstance(v, Tensor) else v for k, v in own.items()}
            part_inputs, part = _inputs_of(inputs, batch, own)
            answer = self.teachers[name].scores({**part_inputs, "fetched": own["fetched"]}, part)
            assert isinstance(answer, (Scores, TopKScores)), "routes do not nest"
            parts.append((own["positions"], answer))
        return RoutedScores(tuple(parts))

    def _choices_of(self, keys: np.ndarray) -> Int[Tensor, "N"]:
        at = np.searchsorted(self._keys, keys).clip(max=max(len(self._keys) - 1, 0))
        if len(keys) and (not len(self._keys) or (self._keys[at] != keys).any()):
            raise ValueError(
                f"A row was not in the datasets that were routed by {self.column!r} at the start of training."
            )
        return torch.from_numpy(self._choices[at] if len(keys) else np.empty(0, dtype=np.int64))


class _Rows(NamedTuple):
    rows: Int[Tensor, "R"]
    """Rows of the padded batch that hold a teacher's positions; all where rows lie one behind the other."""
    index: Int[Tensor, "n"]
    """Their positions in the flattened smaller batch."""


def _rows_of(inputs: Mapping[str, Any], batch: TokenBatch, positions: Int[Tensor, "n"]) -> _Rows:
    num_rows, length = inputs["input_ids"].shape
    index = batch.index[positions]
    if "position_ids" in inputs:
        return _Rows(torch.arange(num_rows), index)
    rows, place = (index // length).unique(return_inverse=True)
    return _Rows(rows if len(rows) else torch.zeros(1, dtype=torch.long), place * length + index % length)


def _inputs_of(
    inputs: Mapping[str, Any], batch: TokenBatch, own: Mapping[str, Any]
) -> tuple[dict[str, Any], TokenBatch]:
    count, positions = len(inputs["input_ids"]), own["positions"]
    smaller = {
        name: value[own["rows"]]
        if isinstance(value, Tensor) and value.shape[:1] == (count,) and value.dim() > 1
        else value
        for name, value in inputs.items()
        if name != "fetched"
    }
    return smaller, batch.at(positions)._replace(index=own["index"])


def _on_cpu(batch: TokenBatch) -> TokenBatch:
    moved = (None if tensor is None else tensor.cpu() for tensor in batch)
    return TokenBatch(*moved)  # type: ignore[arg-type] (optional fields stay None)


def _fetch(teacher: Any, inputs: Mapping[str, Any], batch: TokenBatch) -> Any:
    return teacher.fetch(inputs, batch) if hasattr(teacher, "fetch") else None


def _read_rows(teachers: Iterable[Any], rows: Iterable[tuple[Mapping[str, Any], Tensor]]) -> None:
    readers = [teacher for teacher in teachers if hasattr(teacher, "read_rows")]
    if len(readers) > 1:
        rows = list(rows)
    for teacher in readers:
        teacher.read_rows(rows)


def _smallest_vocab(teachers: Iterable[Any]) -> int | None:
    sizes = [size for size in map(vocab_of, teachers) if size is not None]
    return min(sizes, default=None)


def vocab_of(teacher: Any) -> int | None:
    """Tokens of a teacher's vocabulary; None for a teacher that is the student."""
    known = getattr(teacher, "model", None) or getattr(teacher, "config", None)
    return (
        getattr(known, "config", known).get_text_config().vocab_size
        if known is not None
        else getattr(teacher, "vocab", None)
    )


def _check_names(teachers: Mapping[str, Teacher], weights: Mapping[str, float]) -> None:
    if set(teachers) != set(weights) or min(weights.values(), default=0.0) <= 0.0:
        raise ValueError(
            f"A mixture needs a weight > 0 for each teacher ({', '.join(teachers)}), got {dict(weights)}."
        )
