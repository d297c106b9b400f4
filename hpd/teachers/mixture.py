"""Several teachers: each row has its own, or all of them are mixed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores, TopKScores
from hpd.losses.products import chunks, for_products, project_, wide
from hpd.methods.terms import Term, TermConfig
from hpd.models.pairing import CheckResult
from hpd.teachers.teacher import RoutedScores, Teacher

__all__ = ["MixtureTeacher", "RoutedTeacher"]

# Logits of one teacher beside the mixture: a small part of what the mixture itself takes.
_CHUNK_BYTES = 64 * 2**20


class _SeveralTeachers(Teacher):
    """Teachers by name."""

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = dict(teachers)
        parts = self.teachers.values()
        self.vocab = min((part.vocab for part in parts if part.vocab is not None), default=None)
        self.asks_ahead = any(part.asks_ahead for part in parts)
        self.remote = any(part.remote for part in parts)
        self.may_fail = any(part.may_fail for part in parts)
        self.follows = any(part.follows for part in parts)

    def check_terms(self, terms: Sequence[Term | TermConfig]) -> None:
        for teacher in self.teachers.values():
            teacher.check_terms(terms)

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        for teacher in self.teachers.values():
            teacher.prepare(student, accelerator)

    def follow(self) -> None:
        for teacher in self.teachers.values():
            teacher.follow()

    def state_dict(self) -> dict[str, Any]:
        return {name: teacher.state_dict() for name, teacher in self.teachers.items() if teacher.follows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in state.items():
            self.teachers[name].load_state_dict(part)

    def probe(self, packed: bool) -> list[CheckResult]:
        return [
            replace(verdict, topic=f"{verdict.topic} (teacher {name})")
            for name, teacher in self.teachers.items()
            for verdict in teacher.probe(packed)
        ]


class MixtureTeacher(_SeveralTeachers):
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
        super().__init__(teachers)
        total = sum(weights.values())
        self.weights = {name: weights[name] / total for name in teachers}

    def register_rows(self, rows: Iterable[tuple[Mapping[str, Any], Tensor]]) -> None:
        # Read as often as a teacher wants them, at most: live teachers want none.
        copies = list(itertools.tee(rows, len(self.teachers)))
        for teacher in self.teachers.values():
            teacher.register_rows(copies.pop())

    def ask(self, inputs: Mapping[str, Any], batch: TokenBatch) -> dict[str, Any]:
        return {name: teacher.ask(inputs, batch) for name, teacher in self.teachers.items()}

    def wait(self, handle: Mapping[str, Any]) -> None:
        for name, asked in handle.items():
            self.teachers[name].wait(asked)

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> Scores:
        asked = inputs.get("asked") or {}
        mixture: Tensor | None = None
        for name, teacher in self.teachers.items():
            part = teacher.scores({**inputs, "asked": asked.get(name)}, batch)
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


class RoutedTeacher(_SeveralTeachers):
    """Every row has one teacher, named by a column of the dataset.

    Rows are known by the keys of their label positions, so the order of training does not matter. A live
    teacher runs on the rows of its own, and not at all on a micro-batch without any.

    Args:
        teachers: by the names that stand in the column.
        column: of the dataset.
    """

    def __init__(self, teachers: Mapping[str, Teacher], column: str):
        super().__init__(teachers)
        self.asks_ahead = True  # finding out which positions are whose would wait for the device in a step
        self.column = column
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
        super().prepare(student, accelerator)

    def register_rows(self, rows: Iterable[tuple[Mapping[str, Any], Tensor]]) -> None:
        """Learn which teacher each row has.

        Raises:
            ValueError: the column is missing, names no teacher, or gives one and the same row to two.
        """
        found: list[tuple[Tensor, int]] = []
        for number, (row, keys) in enumerate(rows):
            if self.column not in row:
                raise ValueError(
                    f"Rows are routed by {self.column!r}, which the dataset does not have: {', '.join(row)}."
                )
            if row[self.column] not in self.teachers:
                raise ValueError(
                    f"Row {number} has {self.column}: {row[self.column]!r}, and there is no such teacher: "
                    f"{', '.join(self._names)}."
                )
            found.append((keys, self._names.index(row[self.column])))
        counts = [len(keys) for keys, _ in found]
        self._learn(
            np.concatenate([keys.numpy() for keys, _ in found]),
            np.repeat([choice for _, choice in found], counts),
            np.repeat(np.arange(len(found)), counts),
        )
        for number, teacher in enumerate(self.teachers.values()):
            teacher.register_rows(({}, keys) for keys, choice in found if choice == number)

    def _learn(self, keys: np.ndarray, choices: np.ndarray, numbers: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        keys, choices, numbers = keys[order], choices[order], numbers[order]
        torn = np.flatnonzero((keys[1:] == keys[:-1]) & (choices[1:] != choices[:-1]))
        if len(torn):
            one = int(torn[0])
            other = one + 1
            raise ValueError(
                f"Rows {numbers[one]} and {numbers[other]} are the same, and go to "
                f"{self._names[choices[one]]!r} and {self._names[choices[other]]!r}: remove one of them."
            )
        self._keys = keys
        self._choices = choices

    def ask(self, inputs: Mapping[str, Any], batch: TokenBatch) -> dict[str, dict[str, Any]]:
        """The positions of each teacher, and its handle for them."""
        choices = self._choices_of(batch.keys.numpy())
        parts = {}
        for number, name in enumerate(self._names):
            positions = (choices == number).nonzero().flatten()
            # Someone must answer a batch without labels, too.
            if len(positions) or self._lockstep or (number == 0 and not len(choices)):
                # A dict: the Trainer's device transfer rebuilds tuples by type and breaks named ones.
                part = _part_of(inputs, batch, positions)
                parts[name] = {**part, "asked": self.teachers[name].ask(*_inputs_of(inputs, batch, part))}
        return parts

    def wait(self, handle: Mapping[str, Mapping[str, Any]]) -> None:
        for name, part in handle.items():
            self.teachers[name].wait(part["asked"])

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> RoutedScores:
        parts = inputs.get("asked")
        if parts is None:
            on_cpu = {k: v.cpu() for k, v in inputs.items() if isinstance(v, Tensor)}
            parts = self.ask(on_cpu, _on_cpu(batch))
        answers = []
        for name, part in parts.items():
            part = {k: v.to(batch.labels.device) if isinstance(v, Tensor) else v for k, v in part.items()}
            part_inputs, part_batch = _inputs_of(inputs, batch, part)
            answer = self.teachers[name].scores({**part_inputs, "asked": part["asked"]}, part_batch)
            assert isinstance(answer, (Scores, TopKScores)), "routes do not nest"
            answers.append((part["positions"], answer))
        return RoutedScores(tuple(answers))

    def _choices_of(self, keys: np.ndarray) -> Int[Tensor, "N"]:
        at = np.searchsorted(self._keys, keys).clip(max=max(len(self._keys) - 1, 0))
        if len(keys) and (not len(self._keys) or (self._keys[at] != keys).any()):
            raise ValueError(
                f"A row was not in the datasets that were routed by {self.column!r} at the start of training."
            )
        return torch.from_numpy(self._choices[at] if len(keys) else np.empty(0, dtype=np.int64))


def _part_of(inputs: Mapping[str, Any], batch: TokenBatch, positions: Int[Tensor, "n"]) -> dict[str, Tensor]:
    """The smaller batch that holds a teacher's `positions`: its `rows` among those of the padded batch (all,
    where rows lie one behind the other), and the `index` of the positions in it, flattened."""
    num_rows, length = inputs["input_ids"].shape
    index = batch.index[positions]
    if "position_ids" in inputs:
        return {"positions": positions, "rows": torch.arange(num_rows), "index": index}
    rows, place = (index // length).unique(return_inverse=True)
    rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)
    return {"positions": positions, "rows": rows, "index": place * length + index % length}


def _inputs_of(
    inputs: Mapping[str, Any], batch: TokenBatch, part: Mapping[str, Any]
) -> tuple[dict[str, Any], TokenBatch]:
    count = len(inputs["input_ids"])
    smaller = {
        name: value[part["rows"]]
        if isinstance(value, Tensor) and value.shape[:1] == (count,) and value.dim() > 1
        else value
        for name, value in inputs.items()
        if name != "asked"
    }
    return smaller, batch.at(part["positions"])._replace(index=part["index"])


def _on_cpu(batch: TokenBatch) -> TokenBatch:
    moved = (None if tensor is None else tensor.cpu() for tensor in batch)
    return TokenBatch(*moved)  # type: ignore[arg-type] (optional fields stay None)


def _check_names(teachers: Mapping[str, Teacher], weights: Mapping[str, float]) -> None:
    if set(teachers) != set(weights) or min(weights.values(), default=0.0) <= 0.0:
        raise ValueError(
            f"A mixture needs a weight > 0 for each teacher ({', '.join(teachers)}), got {dict(weights)}."
        )
