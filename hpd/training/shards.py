"""From a teacher's answers to the tensors of a shard, and their size.

Axes: N label positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpd.batch import uniforms
from hpd.config.schema import CacheConfig
from hpd.losses import Scores, TeacherScores, TopKScores
from hpd.losses.products import chunks, for_products, project_
from hpd.methods.systematic import systematic_draws
from hpd.teachers.cache import BLOCK
from hpd.teachers.cached import stored_hidden
from hpd.training.plan import Plan

__all__ = [
    "Layout",
    "TeacherAnswer",
    "head_bytes",
    "index_bytes",
    "lay_out",
    "position_bytes_of",
    "size_text",
    "stored_dtype",
    "stored_tensors",
]

_CHUNK_BYTES = 64 * 2**20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class TeacherAnswer(NamedTuple):
    """A teacher's scores at some label positions, their labels and keys."""

    scores: TeacherScores
    labels: Tensor
    keys: Tensor


def position_bytes_of(config: CacheConfig, planned: Plan) -> int:
    """Bytes on disk of one label position."""
    dtype = stored_dtype(config, planned)
    if config.kind == "top_k":
        return int(config.top_k or 0) * (4 + dtype.itemsize) + (4 if dtype == torch.float32 else 8)
    if config.kind == "sampled":
        return int(config.draws or 0) * (4 + dtype.itemsize) + 4
    width = next(iter(planned.teacher_configs.values())).get_text_config().hidden_size
    return width * dtype.itemsize + 4 + (4 if dtype == torch.int8 else 0)


def head_bytes(planned: Plan, config: CacheConfig) -> int:
    """Bytes on disk of the output head, which a cache of hidden states keeps once."""
    if config.kind != "hidden":
        return 0
    text = next(iter(planned.teacher_configs.values())).get_text_config()
    return text.vocab_size * text.hidden_size * (4 if stored_dtype(config, planned) == torch.float32 else 2)


def index_bytes(positions: int) -> int:
    """Bytes on disk of the index of so many positions: a key and a place of each, a digest per block."""
    return 16 * positions + 8 * math.ceil(positions / BLOCK)


def stored_dtype(config: CacheConfig, planned: Plan) -> torch.dtype:
    """The dtype of the numbers on disk, `auto` resolved."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    teacher = planned.recipe.teacher
    if config.kind != "hidden":
        return torch.float32 if config.kind == "top_k" else torch.float16
    if teacher.type == "model" and teacher.dtype != "auto":
        return _DTYPES[teacher.dtype]
    if teacher.type == "self":
        return _DTYPES.get(planned.recipe.student.dtype, torch.float32)
    return getattr(next(iter(planned.teacher_configs.values())), "dtype", None) or torch.float32


def stored_tensors(answer: TeacherAnswer, config: CacheConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a shard, on the CPU.

    Raises:
        ValueError: the teacher does not give what the kind needs, or a number does not fit into `dtype`.
    """
    scores = answer.scores
    if config.kind != "hidden":
        found = (
            _likeliest(answer, config.top_k or 0, dtype)
            if config.kind == "top_k"
            else _drawn(answer, config.draws or 0, config.seed, dtype)
        )
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}
    if not isinstance(scores, Scores) or scores.head.weight is None:
        raise ValueError("This teacher gives no hidden states: choose cache.kind: top_k.")
    stored: dict[str, Tensor] = {}
    if dtype == torch.int8:
        hidden = scores.hidden.float()
        stored["scale"] = hidden.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        stored["hidden"] = (hidden / stored["scale"][:, None]).round().to(torch.int8)
    else:
        stored["hidden"] = scores.hidden.to(dtype)
        if not torch.isfinite(stored["hidden"]).all():
            raise ValueError(
                f"A hidden state of the teacher does not fit into {dtype}: choose cache.dtype: bfloat16 or "
                "float32."
            )
    # Of what is stored, not of what was computed: so the cached distribution sums to one.
    kept = scores._replace(hidden=stored_hidden(stored))
    stored["log_z"] = torch.cat([torch.logsumexp(logits, -1) for logits in _logits(kept)]).float()
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


def _logits(scores: Scores) -> Iterator[Tensor]:
    ready = for_products(scores, scores.vocab)
    for chunk in chunks(len(scores.hidden), 4 * scores.vocab, _CHUNK_BYTES):
        hidden = ready.hidden[chunk]
        yield project_(
            ready._replace(hidden=hidden), hidden.new_empty(len(hidden), scores.vocab, dtype=torch.float32)
        )


def _likeliest(answer: TeacherAnswer, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    scores, labels, _ = answer
    if isinstance(scores, TopKScores):
        if scores.tokens.shape[1] != k:
            raise ValueError(
                f"The teacher gives {scores.tokens.shape[1]} tokens a position, and cache.top_k asks for {k}."
            )
        tokens, logprobs, label_logprobs = scores.tokens, scores.logprobs, scores.label_logprobs
    else:
        if k > scores.vocab:
            raise ValueError(f"cache.top_k {k} is more than the {scores.vocab} tokens of the teacher.")
        parts, first = [], 0
        for logits in _logits(scores):
            logprobs = torch.log_softmax(logits, -1)
            top = logprobs.topk(k, -1)
            label = labels[first : first + len(logits), None]
            parts.append((top.indices, top.values, logprobs.gather(1, label)[:, 0]))
            first += len(logits)
        tokens, logprobs, label_logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
    stored = {
        "tokens": tokens.int(),
        "logprobs": logprobs.to(dtype),
        "label_logprobs": label_logprobs.float(),
    }
    if dtype != torch.float32:
        # Rounded to 16 bits, k probabilities may sum to more than one, and nothing would be left for all
        # other tokens. The least tail is what one minus a float32 sum of k numbers can still tell from
        # nothing.
        stored["tail"] = (1.0 - logprobs.double().exp().sum(-1)).clamp_min(2.0**-20).float()
    return stored


def _drawn(answer: TeacherAnswer, n: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    scores, labels, keys = answer
    if isinstance(scores, TopKScores):
        raise ValueError("Kind sampled draws from whole distributions, and this teacher gives a few tokens.")
    if n >= scores.vocab:
        raise ValueError(f"cache.draws {n} must be less than the {scores.vocab} tokens of the teacher.")
    # By key alone: a position's draws are the same in every batch, shard and process.
    numbers = uniforms(keys, seed=seed, step=0, count=1)[:, 0]
    parts, first = [], 0
    for logits in _logits(scores):
        logprobs, rows = torch.log_softmax(logits, -1), slice(first, first + len(logits))
        drawn = systematic_draws(logprobs, numbers[rows], n)
        parts.append((drawn.tokens, drawn.logprobs, logprobs.gather(1, labels[rows, None])[:, 0]))
        first += len(logits)
    tokens, weights, label_logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"tokens": tokens.int(), "logprobs": weights.to(dtype), "label_logprobs": label_logprobs.float()}


class Layout(NamedTuple):
    """The place of every row and position."""

    rows: npt.NDArray[np.int64]
    """Numbers of the rows with something new, shard after shard."""
    starts: npt.NDArray[np.int64]
    """Where in `rows` each shard starts, and the end."""
    masks: list[npt.NDArray[np.bool_]]
    """Of each row in `rows`: which of its label positions are stored (one seen before is not)."""
    keys: npt.NDArray[np.int64]
    """Of all stored positions, in the order of `rows`."""

    def shard(self, number: int) -> range:
        return range(int(self.starts[number]), int(self.starts[number + 1]))


def lay_out(rows: Iterable[tuple[Any, Tensor]], shard_positions: int) -> Layout:
    """Cut prepared rows into shards of about `shard_positions` positions; depends on the rows alone.

    Args:
        rows: each with the keys of its label positions.

    Raises:
        ValueError: no row has a label.
    """
    keys, lengths = [], []
    for row, row_keys in rows:
        keys.append(row_keys.numpy())
        lengths.append(len(row["input_ids"]))
    ends = np.cumsum([len(k) for k in keys])
    if not len(ends) or not ends[-1]:
        raise ValueError("Every label is masked: no row keeps a completion token within train.max_length.")
    everything = np.concatenate(keys)
    new = np.zeros(len(everything), dtype=bool)
    new[np.unique(everything, return_index=True)[1]] = True
    masks = np.split(new, ends[:-1])
    counts = np.array([mask.sum() for mask in masks])
    # A row lies in one shard whole: the one in which its first position falls.
    number = (np.cumsum(counts) - counts) // shard_positions
    # Rows of a length beside each other, or half of every batch would be padding.
    order = np.lexsort((lengths, number))
    order = order[counts[order] > 0]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(number[order])) + 1, [len(order)]])
    chosen = [masks[i] for i in order]
    return Layout(
        order, starts, chosen, np.concatenate([keys[i][mask] for i, mask in zip(order, chosen, strict=True)])
    )


def size_text(num_bytes: float) -> str:
    """A size in the unit that people read."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
