"""Rows with a teacher's answers, written as others read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from jaxtyping import Float, Int
from torch import Tensor

from hpd.batch import IGNORE_INDEX
from hpd.files import JsonLines, write_atomically
from hpd.teachers.foreign.distillkit import CONFIG, Compressor, pack_bits

__all__ = ["AnsweredRow", "write_rows"]

_ROWS_AT_ONCE = 512
_UNMASKED = -1e9
"""What axolotl's collator pads log-probabilities with: finite, and exp() of it is 0."""


class AnsweredRow(NamedTuple):
    """A row of token ids, and a teacher's answers where its next token is a label."""

    ids: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    labels: Int[Tensor, "n"]
    tokens: Int[Tensor, "n k"]
    logprobs: Float[Tensor, "n k"]
    label_logprobs: Float[Tensor, "n"]

    @property
    def label_ids(self) -> npt.NDArray[np.int64]:
        """One for each token, -100 where it is no label."""
        found = np.full(len(self.ids), IGNORE_INDEX)
        found[self.places + 1] = self.labels.numpy()
        return found

    def spread(self, length: int, tokens: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of so many places; these where there is no answer."""
        k = self.tokens.shape[1]
        all_tokens = tokens.to(torch.int64).expand(length, k).clone()
        all_logprobs = logprobs.to(self.logprobs.dtype).expand(length, k).clone()
        places = torch.from_numpy(self.places)
        all_tokens[places] = self.tokens.long()
        all_logprobs[places] = self.logprobs
        return all_tokens, all_logprobs


def write_rows(form: str, folder: Path, rows: Iterable[AnsweredRow], k: int, vocab: int, dtype: Any) -> int:
    """Write rows in a format of FORMATS into a new folder.

    Args:
        form: the format.
        folder: where to.
        rows: what to write.
        k: tokens of a position.
        vocab: tokens of the teacher.
        dtype: of the log-probabilities.

    Returns:
        Rows that the format cannot say, which were left out: with labels that are followed by none
        (distillkit).
    """
    if form == "vllm":
        JsonLines(folder / "rows.jsonl").write(_dumped(row) for row in rows)
        return 0
    if form == "axolotl":
        _write_parquet(folder / "rows.parquet", _AXOLOTL, (_targets(row, k) for row in rows))
        return 0
    config = Compressor(vocab, k, k, str(dtype).removeprefix("torch."), delta_encoding=False)
    skipped: list[int] = []

    def compressed() -> Iterable[dict[str, Any]]:
        for row in rows:
            if len(row.places) and (np.diff(row.places) == 1).all() and row.places[-1] == len(row.ids) - 2:
                yield _compressed(row, config)
            else:
                skipped.append(1)

    _write_parquet(folder / "data_0.parquet", _DISTILLKIT, compressed())
    about = {**config._asdict(), "polynomial_terms": [], "residual_bins": []}
    write_atomically(folder / CONFIG, yaml.safe_dump(about, sort_keys=False))
    return len(skipped)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind)


_DISTILLKIT = pa.schema(
    [
        ("input_ids", _list(pa.uint64())),
        ("labels", _list(pa.int64())),
        ("compressed_logprobs", _list(_list(pa.uint8()))),
        ("bytepacked_indices", _list(_list(pa.uint8()))),
    ]
)
_AXOLOTL = pa.schema(
    [
        ("input_ids", _list(pa.int32())),
        ("labels", _list(pa.int32())),
        ("attention_mask", _list(pa.int8())),
        ("target_logprobs", _list(_list(pa.float32()))),
        ("target_token_ids", _list(_list(pa.int32()))),
        ("target_mask", _list(_list(pa.int8()))),
    ]
)


def _write_parquet(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    def write(draft: Path) -> None:
        with pq.ParquetWriter(draft, schema) as writer:
            group: list[dict[str, Any]] = []
            for row in rows:
                group.append(row)
                if len(group) == _ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group = []
            writer.write_table(pa.Table.from_pylist(group, schema))

    write_atomically(path, write)


def _compressed(row: AnsweredRow, config: Compressor) -> dict[str, Any]:
    # Places of the prompt are masked there, and their numbers must be finite.
    nothing = torch.arange(config.k), torch.full((config.k,), -np.log(config.d))
    tokens, logprobs = row.spread(len(row.ids) - 1, *nothing)
    order = logprobs.float().argsort(dim=-1, descending=True, stable=True)
    tokens, logprobs = tokens.gather(1, order), logprobs.gather(1, order).contiguous()
    return {
        "input_ids": row.ids.tolist(),
        "labels": row.label_ids.tolist(),
        "compressed_logprobs": logprobs.view(torch.uint8).tolist(),
        "bytepacked_indices": pack_bits(tokens, config.index_bits).tolist(),
    }


def _targets(row: AnsweredRow, k: int) -> dict[str, Any]:
    """Each list about the next token, where axolotl's trainer reads it."""
    length = len(row.ids)
    nothing = torch.zeros(k, dtype=torch.int64), torch.full((k,), _UNMASKED)
    tokens, logprobs = row._replace(logprobs=row.logprobs.float()).spread(length, *nothing)
    mask = np.zeros((length, k), dtype=np.int8)
    mask[row.places] = 1
    return {
        "input_ids": row.ids.tolist(),
        "labels": row.label_ids.tolist(),
        "attention_mask": [1] * length,
        "target_logprobs": logprobs.tolist(),
        "target_token_ids": tokens.tolist(),
        "target_mask": mask.tolist(),
    }


def _dumped(row: AnsweredRow) -> dict[str, Any]:
    entries: list[dict[str, dict[str, float | None]] | None] = [None] * len(row.ids)
    columns = (row.places.tolist(), row.labels.tolist(), row.tokens.tolist(), row.logprobs.float().tolist())
    for place, label, tokens, logprobs, own in zip(*columns, row.label_logprobs.tolist(), strict=True):
        found = zip(tokens, logprobs, strict=True)
        entry: dict[str, dict[str, float | None]] = {
            str(t): {"logprob": value, "rank": i} for i, (t, value) in enumerate(found, 1)
        }
        # Where it is none of the k its rank is not known, and k + 1 would make it one of k + 1.
        entry.setdefault(str(label), {"logprob": own, "rank": None})
        entries[place + 1] = entry
    return {"prompt_token_ids": row.ids.tolist(), "prompt_logprobs": entries}
