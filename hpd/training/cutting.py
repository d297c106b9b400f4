"""Label positions that weigh nothing are not computed: the ends of answers, cut off a collated batch.

Axes: B rows, T tokens, N label positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hpd.batch import TokenBatch, teacher_inputs
from hpd.losses.position_weights import first_positions
from hpd.methods.terms import Term

__all__ = ["common_share", "cut_batch"]

# Of a batch whose rows are text and nothing else; images would have to be cut with their tokens.
_TEXT = {"input_ids", "labels", "attention_mask", "position_ids", "seq_idx"}
_ENDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}

# Fields of a `TokenBatch` with an entry for each label position.
_BY_LABEL = ("index", "labels", "keys", "rows", "behavior_logprobs", "teacher_index", "teacher_keys")
_BY_LABEL = (*_BY_LABEL, "steps", "position_weights")


def common_share(terms: Sequence[Term]) -> float | None:
    """The share of each answer that any term learns from; None: there are terms that learn from all of it."""
    rules = [term.positions for term in terms]
    if not all(rule is not None and rule.rule == "first" for rule in rules):
        return None
    share = max(rule.number("share") for rule in rules if rule is not None)
    return share if share < 1.0 else None


def cut_batch(inputs: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A collated batch without what lies behind the first `share` of each answer.

    The label positions there never reach a head, and where the rows are text and nothing else, neither body
    reads the tokens: all of a row's with rows one behind the other, and the columns that no row needs where
    rows are padded. What remains is computed as before, since a token does not see those behind it; keys stay
    those of whole rows, and so do draws and the answers of a cache. The rows' lengths stay, and the number of
    positions left out is kept, so that sums are still divided by all label tokens.

    Args:
        inputs: as `DistillCollator` makes it, before a teacher is asked.
        share: in (0, 1).
    """
    out = dict(inputs)
    batch = TokenBatch.pop(out)
    assert batch.rows is not None
    assert batch.row_lengths is not None
    batch = _kept(batch, first_positions(batch.rows, batch.row_lengths, share))
    if batch.teacher_index is not None:
        own, index = _shortened(teacher_inputs(out), batch.teacher_index)
        out.update({f"teacher_{name}": value for name, value in own.items()})
        batch = batch._replace(teacher_index=index)
    shared = {name: value for name, value in out.items() if not name.startswith("teacher_")}
    shared, index = _shortened(shared, batch.index)
    out.update(shared)
    fields = batch._replace(index=index)._asdict()
    return {**out, **{f"label_{field}": value for field, value in fields.items() if value is not None}}


def _kept(batch: TokenBatch, keep: Bool[Tensor, "N"]) -> TokenBatch:
    """The batch at the positions that weigh something; rows keep their lengths, the others are counted."""
    at, new = keep.nonzero().flatten(), keep.long().cumsum(0) - 1
    fields = batch._asdict()
    by_label = {name: None if fields[name] is None else fields[name][at] for name in _BY_LABEL}
    by_writer = {
        name: None if fields[name] is None else new[fields[name][keep[fields[name]]]]
        for name in ("by_dataset", "by_student")
    }
    return batch._replace(**by_label, **by_writer, cut=(~keep).sum())


def _shortened(inputs: Mapping[str, Any], index: Int[Tensor, "N"]) -> tuple[dict[str, Any], Int[Tensor, "N"]]:
    """One model's rows without the tokens behind the last position that is needed, and `index` there."""
    tensors = dict(inputs)
    if set(tensors) - _TEXT - _ENDS or not len(index):
        return tensors, index
    width = tensors["input_ids"].shape[1]
    if "attention_mask" in tensors or "position_ids" not in tensors:
        needed = int((index % width).max()) + 1
        cut = {name: value[:, :needed] for name, value in tensors.items()}
        return cut, index // width * needed + index % width
    keep = _needed(tensors["position_ids"].flatten(), index)
    cut = {name: tensors[name].flatten()[keep][None] for name in tensors if name in _TEXT}
    if set(tensors) & _ENDS:
        starts = (cut["position_ids"][0] == 0).nonzero().flatten()
        ends = torch.cat([starts, starts.new_tensor([cut["position_ids"].shape[1]])]).to(torch.int32)
        longest: Any = int(ends.diff().max())
        cut |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
        cut |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
    return cut, keep.long().cumsum(0)[index] - 1


def _needed(places: Int[Tensor, "T"], index: Int[Tensor, "N"]) -> Bool[Tensor, "T"]:
    """True at the tokens of rows one behind the other, up to the last position of each that is needed.

    Args:
        places: of each token in its row.
        index: the positions that are needed.
    """
    row = (places == 0).long().cumsum(0) - 1
    last = torch.full_like(row, -1).scatter_reduce_(0, row[index], places[index], "amax")
    # A row keeps its first token: a row without any would be none to the model.
    return places <= last[row].clamp_min(0)
