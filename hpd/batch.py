"""TokenBatch: what flows from the data to the loss. The next-token shift happens here, once.

Axes: B rows, T tokens, N label positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "BEHAVIOR_LOGPROBS",
    "DATASET",
    "IGNORE_INDEX",
    "OF_TEACHER",
    "POSITION_WEIGHTS",
    "SOURCES",
    "STUDENT",
    "TEACHER_CHUNKS",
    "TEACHER_PREFIXES",
    "TokenBatch",
    "as_teacher_reads",
    "real_positions",
    "teacher_inputs",
    "token_batch",
    "uniforms",
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
BEHAVIOR_LOGPROBS = "behavior_logprobs"
"""A column of rows that somebody drew: for each token its log-probability, in nats, under the policy that
drew it; NaN for tokens that are no label."""
SOURCES = "sources"
"""A column of rows: for each token who wrote it, DATASET or STUDENT."""
OF_TEACHER = "teacher_"
"""Begins the names in a collated batch that hold the teacher's own rows."""

# Odd constants of the splitmix64 generator (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


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
    chunk_of_token: Int[Tensor, "B T"] | None = None
    """The chunk of every token of the batch, learned or not, rising from 1; 0: of none. With it a batch can
    be taken apart into rows again."""
    teacher_chunk_of_token: Int[Tensor, "B S"] | None = None
    """The same for the teacher's own rows of S tokens."""
    steps: Int[Tensor, "N"] | None = None
    """The stretch of labels that each position is in, counted from 0: where something else stands between two
    labels of a row, such as a tool's answer, a new one begins."""
    position_weights: Float[Tensor, "N"] | None = None
    """What the dataset's column says that each label weighs."""
    cut: Int[Tensor, ""] | None = None
    """Label positions that are left out of this batch since they weigh nothing; None: none."""

    def at(self, positions: Int[Tensor, "n"]) -> TokenBatch:
        """Some positions of a batch whose rows are all the dataset's: its text, or rollouts that it holds."""
        everything = torch.arange(len(positions), device=positions.device)
        if self.behavior_logprobs is not None and self.rows is not None:
            return TokenBatch(
                self.index[positions],
                self.labels[positions],
                self.keys[positions],
                self.dropped,
                self.rows[positions],
                self.row_lengths,
                by_dataset=everything[:0],
                by_student=everything,
                behavior_logprobs=self.behavior_logprobs[positions],
            )
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

    def of_teacher(self, positions: Int[Tensor, "m"]) -> tuple[Int[Tensor, "n"], TokenBatch]:
        """The student's positions beside some of one teacher's, and the batch of them.

        Args:
            positions: among the label positions of the teacher's rows; of two tokenizers, of whole chunks.
        """
        if self.chunks is None or self.teacher_chunks is None or self.teacher_labels is None:
            return positions, self.at(positions)
        chunks = self.teacher_chunks[positions]
        own = torch.isin(self.chunks, chunks).nonzero().flatten()
        return own, TokenBatch(
            self.index[own],
            self.labels[own],
            self.keys[own],
            self.dropped,
            chunks=_from_zero(self.chunks[own]),
            teacher_chunks=_from_zero(chunks),
            teacher_labels=self.teacher_labels[positions],
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
    return {k.removeprefix(OF_TEACHER): value for k, value in inputs.items() if k.startswith(OF_TEACHER)}


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
        positions = real_positions(torch.ones_like(input_ids) if mask is None else mask)
    targets = torch.full_like(labels, IGNORE_INDEX)
    # The token after position t is its label, unless a new row starts there.
    targets[:, :-1] = torch.where(positions[:, 1:] == 0, IGNORE_INDEX, labels[:, 1:])
    steps = _stretches((targets != IGNORE_INDEX).flatten())
    beyond = targets >= vocab if vocab is not None else torch.zeros_like(targets, dtype=torch.bool)
    targets = torch.where(beyond, IGNORE_INDEX, targets).flatten()
    index = (targets != IGNORE_INDEX).nonzero().flatten()
    segment = _segments(input_ids, positions)
    _, rows, lengths = segment[index].unique_consecutive(return_inverse=True, return_counts=True)
    keys = _row_keys(input_ids, positions, mask, segment)
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
        chunk_of_token=chunks,
        steps=_from_zero(steps[index]),
        position_weights=None if position_weights is None else position_weights.flatten()[index + 1],
    )


def _stretches(labeled: Bool[Tensor, "BT"]) -> Int[Tensor, "BT"]:
    """Numbers, rising, that are equal where no position without a label stands between two with one."""
    return (~labeled).long().cumsum(0)


def _from_zero(numbers: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    return numbers.unique_consecutive(return_inverse=True)[1]


def real_positions(attention_mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Places counted from the first real token, so that padding on the left is a layout like the others."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def _segments(input_ids: Tensor, positions: Tensor) -> Int[Tensor, "BT"]:
    """The row that each position belongs to, rows of a packed batch told apart."""
    starts = (positions == 0).flatten()
    starts[:: input_ids.shape[1]] = True
    return starts.cumsum(0) - 1


def _row_keys(
    input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None, segment: Int[Tensor, "BT"]
) -> Int[Tensor, "B T"]:
    """64-bit keys: a hash of the whole row's tokens, then of the place in it."""
    tokens = _mix(input_ids.long() * _GOLDEN + positions.long() * _MIX_1)
    if attention_mask is not None:
        tokens = tokens * attention_mask
    rows = torch.zeros(int(segment[-1]) + 1, dtype=torch.int64).index_add_(0, segment, tokens.flatten())
    return _mix(rows[segment].view_as(input_ids) + positions.long() * _GOLDEN)


def uniforms(keys: Int[Tensor, "N"], *, seed: int, step: int, count: int) -> Float[Tensor, "N count"]:
    """Uniforms in [0, 1) that depend on (seed, optimizer step, row, position, draw) and on nothing else.

    So draws are the same whatever the chunk size, packing, padding, number of processes, or point of
    resumption. Counter based (splitmix64), float64: 53 random bits.
    """
    stream = (
        torch.arange(count, device=keys.device) * _MIX_2 + (seed * 0x9E3779B1 + step * 0x85EBCA77) % 2**62
    )
    bits = _mix(keys[:, None] ^ _mix(stream))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64; int64 products wrap, and the mask makes the shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))
