"""`DistillCollator`: rows laid out as a batch, with the positions that the loss reads.

Axes: B rows, T tokens, N label positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor

from hpd.batch import (
    IGNORE_INDEX,
    OF_TEACHER,
    POSITION_WEIGHTS,
    SOURCES,
    TEACHER_CHUNKS,
    TEACHER_PREFIXES,
    TokenBatch,
    as_teacher_reads,
    real_positions,
    token_batch,
)

__all__ = ["DistillCollator"]

_ROWS_AT_ONCE = 64


class DistillCollator:
    """A collator that adds the `TokenBatch`, computed beside the data: no device synchronization in the step.

    Rows padded on the left get `position_ids`. The labels that remain are written back, so that the trainer
    counts exactly the label tokens that the loss sums. Examples may say token by token who wrote them
    (`sources`), how likely that policy found them (`behavior_logprobs`), and what the teacher reads before
    them (`teacher_prefixes`); the teacher's rows are laid out as the student's.

    Args:
        inner: what pads or flattens the rows.
        vocab: as in `token_batch`.
    """

    def __init__(self, inner: Callable[[list[Any]], dict[str, Any]], vocab: int | None = None):
        self.inner = inner
        self.vocab = vocab
        self.ask: Callable[[dict[str, Any], TokenBatch], Any] | None = None
        """Begins to ask a teacher about a batch as it reads it, ahead of its step; what it returns is
        `inputs["asked"]`."""

    def rows(self, dataset: Iterable[Any]) -> Iterator[tuple[Any, Int[Tensor, "n"]]]:
        """Each row of a prepared dataset with the keys of its label positions, those of the teacher's row
        where it has its own, as many as it has in its own tokens; no teacher is asked.

        Rows are collated many at a time: alone, each would cost most of a millisecond.
        """
        remaining = iter(dataset)
        while group := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
            inputs, batch = self._collated(group)
            own, read = as_teacher_reads(inputs, batch)
            examples = group
            if TEACHER_CHUNKS in group[0]:
                inputs, batch, examples = own, read, _two_examples(group)[1]
            height, width = inputs["input_ids"].shape
            # Padded: a row each. Padding-free: one behind the other.
            lengths = [width if height == len(group) else len(row["input_ids"]) for row in examples]
            ends = torch.tensor(lengths).cumsum(0)
            counts = torch.bincount(torch.searchsorted(ends, batch.index, right=True), minlength=len(group))
            yield from zip(group, read.keys.split(counts.tolist()), strict=True)

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        inputs, batch = self._collated(examples)
        labels = torch.full_like(inputs["labels"], IGNORE_INDEX).flatten()
        labels[batch.index + 1] = batch.labels
        inputs["labels"] = labels.view_as(inputs["labels"])
        if self.ask is not None:
            inputs["asked"] = self.ask(*as_teacher_reads(inputs, batch))
        # Flat keys: the Trainer's device transfer rebuilds tuples by type and breaks named ones.
        inputs.update(
            {f"label_{field}": value for field, value in batch._asdict().items() if value is not None}
        )
        return inputs

    def _collated(self, examples: list[Any]) -> tuple[dict[str, Any], TokenBatch]:
        """The student's rows and, beside them, the teacher's own."""
        if TEACHER_CHUNKS in examples[0]:
            return self._in_chunks(examples)
        inputs, batch = self._of_one(examples)
        if TEACHER_PREFIXES not in examples[0]:
            return inputs, batch
        own, of_teacher = self._of_one([_teacher_example(example) for example in examples])
        assert torch.equal(of_teacher.labels, batch.labels), "both read the same completions"
        inputs.update({OF_TEACHER + name: value for name, value in own.items() if name != "labels"})
        return inputs, batch._replace(teacher_index=of_teacher.index, teacher_keys=of_teacher.keys)

    def _in_chunks(self, examples: list[Any]) -> tuple[dict[str, Any], TokenBatch]:
        """Rows of two tokenizers."""
        student, teacher = _two_examples(examples)
        inputs, batch = self._of_one(student)
        own, of_teacher = self._of_one(teacher)
        assert {*cast(Tensor, batch.chunks).tolist()} == {*cast(Tensor, of_teacher.chunks).tolist()}
        # The student's padding is perhaps no token of the teacher's.
        own["input_ids"] *= _laid_out(own, [[1] * len(example["input_ids"]) for example in teacher])
        inputs.update({OF_TEACHER + name: value for name, value in own.items() if name != "labels"})
        given = sum(label != IGNORE_INDEX for example in examples for label in example["labels"])
        return inputs, batch._replace(
            dropped=batch.dropped + given - len(batch.labels),
            teacher_index=of_teacher.index,
            teacher_keys=of_teacher.keys,
            teacher_labels=of_teacher.labels,
            teacher_chunks=of_teacher.chunks,
            teacher_chunk_of_token=of_teacher.chunk_of_token,
        )

    def _of_one(self, examples: list[Any]) -> tuple[dict[str, Any], TokenBatch]:
        """Rows as one of the models reads them."""
        # Processors of images give a mapping of their own.
        inputs = dict(self.inner(examples))
        by_token = {
            name: _laid_out(inputs, [example[name] for example in examples])
            for name in ("sources", "behavior_logprobs", "chunks", POSITION_WEIGHTS)
            if name in examples[0]
        }
        batch = token_batch(inputs, self.vocab, **by_token)
        mask = inputs.get("attention_mask")
        if mask is not None and "position_ids" not in inputs and not bool(mask[:, 0].all()):
            # Models with absolute positions would count the padding.
            inputs["position_ids"] = real_positions(mask)
        return inputs, batch


def _teacher_example(example: Mapping[str, Any]) -> dict[str, list[int]]:
    """An example, perhaps of several packed rows, as the teacher reads it."""
    ids, labels, prefixes = (example[name] for name in ("input_ids", "labels", TEACHER_PREFIXES))
    out: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    start = 0
    for length in example.get("seq_lengths") or [len(ids)]:
        end = start + length
        shared = next((place for place in range(start, end) if prefixes[place]), start)
        prefix, targets = list(prefixes[shared]), list(labels[shared:end])
        if shared == start:
            targets[0] = IGNORE_INDEX  # nothing predicts a row's first token for the student
        out["input_ids"] += prefix + list(ids[shared:end])
        out["labels"] += [IGNORE_INDEX] * len(prefix) + targets
        out["seq_lengths"].append(len(prefix) + end - shared)
        start = end
    return out if "seq_lengths" in example else {k: v for k, v in out.items() if k != "seq_lengths"}


def _two_examples(examples: list[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Examples, perhaps of several packed rows, as student and teacher read them, with the number of each
    token's chunk (0: none). A chunk that a cut took tokens from has no number; one before which nothing
    stands is not learned."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    number = 0
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        prefixes, ends = example[TEACHER_PREFIXES], example[TEACHER_CHUNKS]
        lengths = example.get("seq_lengths") or [len(ids)]
        student = _RowsOfOne(list(ids), [IGNORE_INDEX] * len(ids), [0] * len(ids), list(lengths))
        teacher, start = _RowsOfOne([], [], [], []), 0
        for length in lengths:
            end = start + length
            first = next((place for place in range(start, end) if prefixes[place]), end)
            # A row that was cut before its answer: the teacher reads any one token, and is asked nothing.
            before, begin = len(teacher.ids), first
            teacher.read(prefixes[first] if first < end else [0], 0, learned=False)
            for place in (place for place in range(first, end) if ends[place]):
                number, span = number + 1, slice(begin, place + 1)
                student.chunks[span] = [number] * (place + 1 - begin)
                if learned := begin > start and labels[begin] != IGNORE_INDEX:
                    student.labels[span] = ids[span]
                teacher.read(ends[place], number, learned)
                begin = place + 1
            teacher.lengths.append(len(teacher.ids) - before)
            start = end
        written = {SOURCES: example[SOURCES]} if SOURCES in example else {}
        sides[0].append({**student.example("seq_lengths" in example), **written})
        sides[1].append(teacher.example("seq_lengths" in example))
    return sides


class _RowsOfOne(NamedTuple):
    """One model's tokens of an example."""

    ids: list[int]
    labels: list[int]
    chunks: list[int]
    lengths: list[int]

    def read(self, tokens: list[int], number: int, learned: bool) -> None:
        """Append tokens of a chunk; 0: of none."""
        self.ids.extend(tokens)
        self.labels.extend(tokens if learned else [IGNORE_INDEX] * len(tokens))
        self.chunks.extend([number] * len(tokens))

    def example(self, packed: bool) -> dict[str, Any]:
        """As a collator takes it."""
        out: dict[str, Any] = {"input_ids": self.ids, "labels": self.labels, "chunks": self.chunks}
        return {**out, "seq_lengths": self.lengths} if packed else out


def _laid_out(inputs: Mapping[str, Any], values: list[list[Any]]) -> Tensor:
    """Values of each token in the layout of the collated rows: padded, or one behind the other."""
    flat = torch.tensor([value for row in values for value in row])
    out = torch.zeros(inputs["input_ids"].shape, dtype=flat.dtype)
    mask = inputs.get("attention_mask")
    if mask is None:
        out[0, : len(flat)] = flat
    else:
        out[mask.bool()] = flat
    return out
