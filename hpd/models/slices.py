r"""Context parallelism: each process of a group holds two chunks of every row, and attention sees the whole.

A row of T tokens, filled up to a multiple of 2P, is cut into 2P chunks of equal length; process r of P reads
the chunks r and 2P - 1 - r, so that all have the same share of the causal triangle. Everything but attention
works on a token alone. Attention gathers keys and values of the whole row, layer by layer; backward sends
each process the sum of their gradients, so that gradients of the weights, added up over the group, are those
of whole rows.

A token sees those before it and itself: padding stands behind a row, where none of its tokens looks.

Axes: B rows, T tokens of a whole row, L = 2 ceil(T / 2P) tokens held here, H heads, N label positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hpd.batch import TokenBatch
from hpd.models.forward import PLACES, scores_of
from hpd.models.probe import rounding_of

__all__ = ["RowSlices", "check_model"]

ATTENTION = "hpd_sliced"
"""The attention of models that read slices; of whole rows it is transformers' sdpa."""
# `asked`: what a teacher that remembers is asked about `kept` positions, by their keys.
_READ = {"input_ids", "labels", "attention_mask", "asked"}
# Tokens a process in the row of the probe: two chunks of three.
_PROBED = 6
# How far hidden states may be off, as a share of what reading the slice as a row of its own moves them.
_LEAK = 0.2
# What some families add to attention, and the function here does not know.
_UNKNOWN = ("sliding_window", "softcap", "position_bias", "s_aux")


class RowSlices:
    """This process's part of every row of a batch, and attention over the parts of the group.

    Args:
        group: the processes that share rows, in the order of their slices.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group, self.size = group, dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._chunks = (self._rank, 2 * self.size - 1 - self._rank)
        self._probed: set[str] = set()
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)

    def attach(self, model: PreTrainedModel, role: str) -> None:
        """Let a model's attention work on slices where it is given one; on whole rows it stays as it is.

        Args:
            model: with or without its weights at hand; in place.
            role: student or teacher, for the text.

        Raises:
            ValueError: as `check_model`; another attention than sdpa was asked for, or it cannot be replaced.
        """
        check_model(model.config, role)
        asked = model.config._attn_implementation
        if asked not in ("sdpa", ATTENTION):
            _refuse(role, model.config, f"runs {asked} attention (set attn_implementation: sdpa)")
        if not model._can_set_attn_implementation():
            _refuse(role, model.config, "has an attention of its own, which cannot be replaced")
        model.set_attn_implementation(ATTENTION)

    def cut(self, inputs: dict[str, Any], batch: TokenBatch) -> tuple[dict[str, Any], TokenBatch]:
        """This process's slice of a collated batch, and the label positions whose hidden states lie in it.

        Draws, counts and keys are those of whole rows. Labels that the common vocabulary lacks are counted by
        the first process alone.

        Args:
            inputs: the same on all processes of the group.
            batch: its label positions, in rows that are all the dataset's.

        Raises:
            ValueError: rows with more than their tokens, or padded on the left; or other rows elsewhere.
        """
        if more := sorted(set(inputs) - _READ):
            raise ValueError(
                f"Context parallelism cuts rows of text, padded on the right, and the batch also holds "
                f"{', '.join(more)}: launch without cp_size, or leave that out."
            )
        self._check_same(inputs["input_ids"], batch)
        height, width = inputs["input_ids"].shape
        places = self._places(width).to(batch.index.device)
        local = torch.full((self.size * len(places),), -1, device=places.device)
        local[places] = torch.arange(len(places), device=places.device)
        part = batch.at(self.kept(inputs, batch))
        part = part._replace(index=part.index // width * len(places) + local[part.index % width])
        if self._rank:
            part = part._replace(dropped=torch.zeros_like(batch.dropped))
        fill = (0, len(local) - width)
        out = {
            name: nn.functional.pad(inputs[name], fill)[:, places]
            for name in ("input_ids", "attention_mask")
            if name in inputs
        }
        if "asked" in inputs:
            out["asked"] = inputs["asked"]
        return {
            **out,
            "position_ids": places.expand(height, -1),
            PLACES: places[None, None, None],
        }, part

    def kept(self, inputs: Mapping[str, Any], batch: TokenBatch) -> Int[Tensor, "n"]:
        """Those of a batch's label positions whose hidden states lie in this process's slice."""
        width = inputs["input_ids"].shape[1]
        chunks = batch.index % width // self._chunk_length(width)
        return torch.isin(chunks, torch.tensor(self._chunks, device=chunks.device)).nonzero().flatten()

    def probe(self, model: nn.Module, role: str) -> None:
        """Compare a few tokens read in slices with the same read whole; once, and by all processes.

        Args:
            model: as training runs it, prepared by `attach`, `add_head_function` and its engine.
            role: student or teacher, for the text.

        Raises:
            ValueError: they differ.
        """
        if role in self._probed:
            return
        self._probed.add(role)
        device = next(model.parameters()).device
        index = torch.arange(_PROBED * self.size, device=device)
        vocab = cast(Any, model).config.get_text_config().vocab_size
        rows = {"input_ids": (index[None] + 1) * 7919 % (vocab - 1)}
        sliced, part = self.cut(dict(rows), TokenBatch(index, index, index, index[0]))
        whole = scores_of(model, rows, index).hidden[sliced["position_ids"][0]]
        found = scores_of(model, sliced, part.index).hidden
        alone = scores_of(model, {n: sliced[n] for n in ("input_ids", "position_ids")}, part.index).hidden
        rounding = rounding_of(whole)
        whole, found, alone = (states.float() for states in (whole, found, alone))
        distances = torch.stack([(found - whole).norm(), (alone - whole).norm()]) / whole.norm()
        dist.all_reduce(distances, dist.ReduceOp.MAX, group=self._group)
        leak, most = distances.tolist()
        if not leak <= max(_LEAK * most, rounding):
            problem = f"reads slices of a row unlike the row (hidden states {leak:.1%} off)"
            _refuse(role, cast(Any, model).config, problem)

    def _check_same(self, input_ids: Int[Tensor, "B T"], batch: TokenBatch) -> None:
        """Raise, on all processes of the group, where one was given other rows: no loss would show it."""
        digest = input_ids.sum() * 31 + batch.keys.sum() + input_ids.shape[1]
        ends = torch.stack([digest, ~digest])  # the largest, and the smallest as the largest complement
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        if int(ends[0]) != ~int(ends[1]):
            raise ValueError(
                "Context parallelism: the processes that share rows were given different ones. The order of "
                "rows must not depend on the process: set train.train_sampling_strategy: random."
            )

    def _places(self, width: int) -> Int[Tensor, "L"]:
        """Where the tokens held here stand in a row of `width`."""
        length = self._chunk_length(width)
        return torch.cat([torch.arange(length) + chunk * length for chunk in self._chunks])

    def _chunk_length(self, width: int) -> int:
        return -(-width // (2 * self.size))

    def _attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "B H L D"],
        key: Float[Tensor, "B K L D"],
        value: Float[Tensor, "B K L E"],
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B L H E"], None]:
        """Causal attention of the queries held here to keys and values of whole rows.

        Args:
            attention_mask: integers, as `cut` makes them: the places of the queries. Anything else is a mask
                of whole rows, such as those of generation.

        Raises:
            ValueError: attention that is more than softmax(q k) v over all tokens before.
        """
        if attention_mask is None or attention_mask.dtype != torch.int64:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if added := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
            _refuse("model", cast(Any, module).config, f"has attention with {', '.join(added)}")
        # Together: one collective operation a layer.
        both = self._in_order(_Gathered.apply(torch.cat([key, value], -1), self._group))
        keys, values = both.split([key.shape[-1], value.shape[-1]], -1)
        parts = []
        for chunk, part in zip(self._chunks, query.chunk(2, 2), strict=True):
            length = part.shape[2]
            seen = (chunk + 1) * length
            # The last query sees all of these keys, the first all but the others' own.
            found = scaled_dot_product_attention(
                part,
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=_causal(length, seen, part.device),
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            parts.append(found)
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    def _in_order(self, slices: Float[Tensor, "P B K L D"]) -> Float[Tensor, "B K T D"]:
        """The chunks of all processes as they stand in the row."""
        first, second = slices.chunk(2, 3)
        return torch.cat([first, second.flip(0)]).permute(1, 2, 0, 3, 4).flatten(2, 3)


def check_model(config: Any, role: str) -> None:
    """Refuse a model that cannot read slices of rows, as far as its configuration tells.

    Every layer must be attention to all tokens before: a window, a recurrent state or an image would need
    what other processes hold, and so would the balance of a mixture of experts.

    Args:
        config: of the model.
        role: student or teacher, for the text.

    Raises:
        ValueError: what it has instead.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if text is not config:
        _refuse(role, config, "reads more than text")
    if kinds:
        _refuse(role, config, f"has layers of type {', '.join(sorted(kinds))}")
    if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None):
        _refuse(role, config, "has attention within a sliding window")
    if getattr(text, "router_aux_loss_coef", None) is not None:
        _refuse(role, config, "is a mixture of experts, whose balancing loss is one of whole rows")


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask of the last `queries` tokens of `keys`."""
    if device.type == "cuda":
        return causal_lower_right(queries, keys)  # a fused kernel, without a mask in memory
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class _Gathered(torch.autograd.Function):
    """A tensor of every process, stacked; backward adds up what all processes say of one's own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty((dist.get_world_size(group), *part.shape))
        dist.all_gather([*whole], part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        own = torch.empty_like(gradient[0])
        dist.reduce_scatter(own, [*gradient.contiguous()], group=ctx.group)
        return own, None


def _refuse(role: str, config: Any, problem: str) -> NoReturn:
    raise ValueError(
        f"Context parallelism (cp_size) needs attention to all tokens before in every layer, and the {role} "
        f"({config.model_type}) {problem}: launch without cp_size, or take a model such as llama, qwen2 or "
        "qwen3."
    )
