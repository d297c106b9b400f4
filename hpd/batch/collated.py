"""TokenBatch: what flows from the data to the loss. The next-token shift happens here, once.

Axes: B rows, T tokens, N label positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hpd.batch.keys import row_keys

__all__ = [
    "DATASET",
    "IGNORE_INDEX",
    "POSITION_WEIGHTS",
    "STUDENT",
    "TEACHER_CHUNKS",
    "TEACHER_PREFIXES",
    "DistillCollator",
    "TokenBatch",
    "as_teacher_reads",
    "teacher_inputs",
    "token_batch",
]

IGNORE_INDEX = -100
DATASET, STUDENT = 0, 1
"""Who wrote a token."""
TEACHER_PREFIXES = "teacher_prefixes"
"""A column of rows that the teacher reads behind a prompt of its own: for each token, the tokens that the
teacher reads instead of all that the student reads before it. Empty but at one token, the first that both
read."""
TEACHER_CHUNKS = "teacher_chunks"
"""A column of rows whose teacher has another tokenizer: for each token, the teacher's tokens of the chunk
that ends with it (both cut the text there); empty within a chunk."""
POSITION_WEIGHTS = "position_weights"
"""A column of rows that weigh differently in a term: for each token, its row's weight."""
# Of the names in a collated batch that hold the teacher's own rows.
_OF_TEACHER = "teacher_"

_ROWS_AT_ONCE = 64


class TokenBatch(NamedTuple):
    """The label positions of a batch, and only those: prompt and padding positions never reach a head."""

    index: Int[Tensor, "N"]
    """Positions in the flattened `[B * T]` batch whose next token is a label."""
    labels: Int[Tensor, "N"]
    """That next token."""
    keys: Int[Tensor, "N"]
    """A hash of the content of the position's row and its place in it, whatever the packing or padding."""
    dropped: Int[Tensor, ""]
    """Labels taken out because the common vocabulary does not hold them."""
    rows: Int[Tensor, "N"] | None = None
    """The row of each position, counted from 0 over the rows that have a label."""
    row_lengths: Int[Tensor, "R"] | None = None
    """Label positions of each such row."""
    by_dataset: Int[Tensor, "D"] | None = None
    """Positions whose label the dataset holds; found beside the data: nothing waits for the device."""
    by_student: Int[Tensor, "S"] | None = None
    """Those whose label the student wrote."""
    behavior_logprobs: Float[Tensor, "N"] | None = None
    """Log-probability of the label, in nats, under the behavior policy that wrote it; NaN: not known."""
    teacher_index: Int[Tensor, "N"] | None = None
    """`index` in the teacher's own rows; None: the teacher reads the student's."""
    teacher_keys: Int[Tensor, "N"] | None = None
    """`keys` there."""
    chunks: Int[Tensor, "N"] | None = None
    """With two tokenizers, the chunk of each position, counted from 0: tokens whose bytes the teacher has in
    tokens of its own. Then the teacher has M positions, and its `index` and `keys` are as many."""
    teacher_chunks: Int[Tensor, "M"] | None = None
    """The chunk of each of the teacher's positions."""
    teacher_labels: Int[Tensor, "M"] | None = None
    """The teacher's label at each of them."""
    steps: Int[Tensor, "N"] | None = None
    """The stretch of labels that each position is in, counted from 0: where something else stands between two
    labels of a row, such as a tool's answer, a new one begins."""
    position_weights: Float[Tensor, "N"] | None = None
    """What the dataset's column says that each label weighs."""
    cut: Int[Tensor, ""] | None = None
    """Label positions that are left out of this batch since they weigh nothing; None: none."""

    def at(self, positions: Int[Tensor, "n"]) -> TokenBatch:
        """Some positions of a batch whose rows are all the dataset's."""
        everything = torch.arange(len(positions), device=positions.device)
        return TokenBatch(
            self.index[positions],
            self.labels[positions],
            self.keys[positions],
            self.dropped,
            by_dataset=everything,
            by_student=everything[:0],
            teacher_index=None if self.teacher_index is None else self.teacher_index[positions],
            teacher_keys=None if self.teacher_keys is None else self.teacher_keys[positions],
        )

    @classmethod
    def pop(cls, inputs: dict[str, Any]) -> TokenBatch:
        """Take the fields of `DistillCollator` out of a batch again; the model's own inputs remain."""
        optional = {field: inputs.pop(f"label_{field}", None) for field in cls._field_defaults}
        return cls(
            *(inputs.pop(f"label_{field}") for field in cls._fields if field not in optional), **optional
        )


def teacher_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's own rows within a collated batch; empty where it reads the student's."""
    return {k.removeprefix(_OF_TEACHER): value for k, value in inputs.items() if k.startswith(_OF_TEACHER)}


def as_teacher_reads(inputs: Mapping[str, Any], batch: TokenBatch) -> tuple[dict[str, Any], TokenBatch]:
    """A collated batch as the teacher reads it: with rows of its own where it has some.

    Returns:
        Model inputs, and the same label positions in the same order; their `index` and `keys` are those of
        the teacher's rows. Where it has another tokenizer, its own label positions.
    """
    if batch.teacher_index is None or batch.teacher_keys is None:
        return dict(inputs), batch
    own = teacher_inputs(inputs)
    if "asked" in inputs:
        own["asked"] = inputs["asked"]
    if batch.teacher_labels is not None:
        return own, TokenBatch(batch.teacher_index, batch.teacher_labels, batch.teacher_keys, batch.dropped)
    return own, batch._replace(
        index=batch.teacher_index, keys=batch.teacher_keys, teacher_index=None, teacher_keys=None
    )


def token_batch(
    inputs: Mapping[str, Tensor],
    vocab: int | None = None,
    sources: Int[Tensor, "B T"] | None = None,
    behavior_logprobs: Float[Tensor, "B T"] | None = None,
    chunks: Int[Tensor, "B T"] | None = None,
    position_weights: Float[Tensor, "B T"] | None = None,
) -> TokenBatch:
    """Find the label positions of a collated batch.

    Args:
        inputs: `input_ids`, `labels` (-100 is no label; position t labels itself, as in Hugging Face models),
            and `attention_mask` (padded) or `position_ids` (padding-free: a zero starts a new row).
        vocab: tokens that both models have; labels beyond are dropped and counted.
        sources: who wrote each token, DATASET or STUDENT; None: the dataset all of them.
        behavior_logprobs: log-probability of each token under the policy that wrote it.
        chunks: the number of each token's chunk, rising.
        position_weights: what each token weighs by a column of the dataset.
    """
    input_ids, labels = inputs["input_ids"], inputs["labels"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if positions is None:
        positions = _real_positions(torch.ones_like(input_ids) if mask is None else mask)
    targets = torch.full_like(labels, IGNORE_INDEX)
    # The token after position t is its label, unless a new row starts there.
    targets[:, :-1] = torch.where(positions[:, 1:] == 0, IGNORE_INDEX, labels[:, 1:])
    steps = _stretches((targets != IGNORE_INDEX).flatten())
    beyond = targets >= vocab if vocab is not None else torch.zeros_like(targets, dtype=torch.bool)
    targets = torch.where(beyond, IGNORE_INDEX, targets).flatten()
    index = (targets != IGNORE_INDEX).nonzero().flatten()
    segment = _segments(input_ids, positions)
    _, rows, lengths = segment[index].unique_consecutive(return_inverse=True, return_counts=True)
    keys = row_keys(input_ids, positions, mask, segment)
    # The label of position t is token t + 1, and so are its writer and that writer's log-probability.
    source = torch.zeros_like(index) if sources is None else sources.flatten()[index + 1]
    return TokenBatch(
        index,
        targets[index],
        keys.flatten()[index],
        beyond.sum(),
        rows,
        lengths,
        (source == DATASET).nonzero().flatten(),
        (source == STUDENT).nonzero().flatten(),
        None if behavior_logprobs is None else behavior_logprobs.flatten()[index + 1],
        chunks=None if chunks is None else _from_zero(chunks.flatten()[index + 1]),
        steps=_from_zero(steps[index]),
        position_weights=None if position_weights is None else position_weights.flatten()[index + 1],
    )


def _stretches(labeled: Bool[Tensor, "BT"]) -> Int[Tensor, "BT"]:
    """Numbers, rising, that are equal where no position without a label stands between two with one."""
    return (~labeled).long().cumsum(0)


def _from_zero(numbers: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    return numbers.unique_consecutive(return_inverse=True)[1]


def _real_positions(attention_mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Places counted from the first real token, so that padding on the left is a layout like the others."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def _segments(input_ids: Tensor, positions: Tensor) -> Int[Tensor, "BT"]:
    """The row that each position belongs to, rows of a packed batch told apart."""
    starts = (positions == 0).flatten()
    starts[:: input_ids.shape[1]] = True
    return starts.cumsum(0) - 1


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
        where it has its own; no teacher is asked.

        Rows are collated many at a time: alone, each would cost most of a millisecond.
        """
        remaining = iter(dataset)
        while group := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
            inputs, batch = self._collated(group)
            height, width = inputs["input_ids"].shape
            # Padded: a row each. Padding-free: one behind the other.
            lengths = [width] * height if height == len(group) else [len(row["input_ids"]) for row in group]
            ends = torch.tensor(lengths).cumsum(0)
            counts = torch.bincount(torch.searchsorted(ends, batch.index, right=True), minlength=len(group))
            _, read = as_teacher_reads(inputs, batch)
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
        inputs.update({_OF_TEACHER + name: value for name, value in own.items() if name != "labels"})
        return inputs, batch._replace(teacher_index=of_teacher.index, teacher_keys=of_teacher.keys)

    def _in_chunks(self, examples: list[Any]) -> tuple[dict[str, Any], TokenBatch]:
        """Rows of two tokenizers."""
        student, teacher = _two_examples(examples)
        inputs, batch = self._of_one(student)
        own, of_teacher = self._of_one(teacher)
        assert {*cast(Tensor, batch.chunks).tolist()} == {*cast(Tensor, of_teacher.chunks).tolist()}
        # The student's padding is perhaps no token of the teacher's.
        own["input_ids"] *= _laid_out(own, [[1] * len(example["input_ids"]) for example in teacher])
        inputs.update({_OF_TEACHER + name: value for name, value in own.items() if name != "labels"})
        given = sum(label != IGNORE_INDEX for example in examples for label in example["labels"])
        return inputs, batch._replace(
            dropped=batch.dropped + given - len(batch.labels),
            teacher_index=of_teacher.index,
            teacher_keys=of_teacher.keys,
            teacher_labels=of_teacher.labels,
            teacher_chunks=of_teacher.chunks,
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
            inputs["position_ids"] = _real_positions(mask)
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
    token's chunk (0: none). A chunk that a cut took tokens from, or before which nothing stands, is not
    learned."""
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
            teacher.read(prefixes[first] if first < end else [0], 0)
            for place in (place for place in range(first, end) if ends[place]):
                learned = begin > start and labels[begin] != IGNORE_INDEX
                if learned:
                    number, span = number + 1, slice(begin, place + 1)
                    student.labels[span], student.chunks[span] = ids[span], [number] * (place + 1 - begin)
                teacher.read(ends[place], number if learned else 0)
                begin = place + 1
            teacher.lengths.append(len(teacher.ids) - before)
            start = end
        sides[0].append(student.example("seq_lengths" in example))
        sides[1].append(teacher.example("seq_lengths" in example))
    return sides


class _RowsOfOne(NamedTuple):
    """One model's tokens of an example."""

    ids: list[int]
    labels: list[int]
    chunks: list[int]
    lengths: list[int]

    def read(self, tokens: list[int], number: int) -> None:
        """Append tokens of a chunk; 0: of none."""
        self.ids.extend(tokens)
        self.labels.extend(tokens if number else [IGNORE_INDEX] * len(tokens))
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
