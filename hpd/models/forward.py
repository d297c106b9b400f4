"""A causal language model that hands hidden states and head to a function, inside its own forward.

Whatever runs on the head must run inside the (possibly wrapped) model's forward, or the hooks of DDP and FSDP
are bypassed: gradients go unsynchronized and sharded weights are never gathered.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import set_seed

from hpd.losses.heads import Head, Scores, head_of

__all__ = [
    "PLACES",
    "adapt_head",
    "add_head_function",
    "has_own_logits",
    "label_inputs",
    "model_inputs",
    "scores_of",
    "use_own_logits",
]

PLACES = "places"
"""In a batch that context parallelism has cut, what attention is given for a mask (`RowSlices`)."""
_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    # Of models that see, by the names that transformers' processors give them.
    "pixel_values",
    "pixel_attention_mask",
    "pixel_position_ids",
    "pixel_values_videos",
    "image_grid_thw",
    "image_grid_hw",
    "image_grid_hws",
    "image_sizes",
    "image_sizes_videos",
    "image_position_ids",
    "image_attention_mask",
    "image_embeds_position_mask",
    "image_flags",
    "image_num_crops",
    "video_grid_thw",
    "video_position_ids",
    "second_per_grid_ts",
    "spatial_shapes",
    "num_crops",
    "num_patches",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
)


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A collated batch without labels, which would make the model compute a loss itself."""
    found = {name: inputs[name] for name in _MODEL_INPUTS if name in inputs}
    return found if PLACES not in inputs else {**found, "attention_mask": inputs[PLACES]}


def label_inputs(inputs: Mapping[str, Any], index: Int[Tensor, "N"]) -> dict[str, Any]:
    """A collated batch with its label positions, as a call with a head function takes them."""
    return {**model_inputs(inputs), "label_index": index, "label_width": inputs["input_ids"].shape[1]}


def use_own_logits(model: nn.Module) -> None:
    """Let `model`, prepared by `add_head_function`, hand out its own logits, whatever its head does."""
    model._uses_own_logits = True  # type: ignore[assignment]


def has_own_logits(model: nn.Module) -> bool:
    """True after `use_own_logits`."""
    return getattr(model, "_uses_own_logits", False)


def add_head_function(model: nn.Module) -> nn.Module:
    """Teach `model` the call `model(**inputs, label_index=index, head_function=f)`, which returns
    `f(Scores)`.

    The backbone runs without the head, the hidden states at `index` (of the flattened batch) are selected,
    and `f` gets them with the head; after `use_own_logits` it gets the model's logits there. Without
    `head_function` the forward is the original one, so generation is unchanged. In place; call it before the
    model is wrapped, and on the base model of a PEFT model.

    Further arguments of that call: `label_width`, the tokens of each row that `index` counts (an adapter may
    put others before them); `balance`, a function of the balancing loss of a mixture of experts, whose value
    is added to the result.
    """
    if getattr(model, "_has_head_function", False):
        return model
    original = model.forward

    # The original signature: `generate` validates its keyword arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        label_index: Int[Tensor, "N"] | None = None,
        label_width: int | None = None,
        head_function: Callable[[Scores], Any] | None = None,
        balance: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if head_function is None:
            return original(*args, **kwargs)
        # A copied model keeps the forward of what it was copied from, unless its class is asked.
        whole = original if hasattr(self, "_hf_hook") else functools.partial(type(self).forward, self)
        states, aux_loss = _run(self, whole, args, kwargs, balance is not None)
        assert label_index is not None
        states = states.flatten(0, 1).index_select(0, _places(label_index, label_width, states.shape[1]))
        # Looked up at every call: FSDP and PEFT replace the head after this patch.
        with _gathered_by_zero(self):
            head = Head(None) if has_own_logits(self) else head_of(self)
            if head.weight is not None:
                states = states.to(head.weight.device)
            result = head_function(Scores(states, head))
        return result if balance is None or aux_loss is None else result + balance(aux_loss)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    model._has_head_function = True  # type: ignore[assignment]
    return model


def scores_of(model: nn.Module, inputs: dict[str, Any], index: Int[Tensor, "N"]) -> Scores:
    """Hidden states at `index` and the head, without gradient and with dropout off."""
    training = model.training
    model.eval()
    # What leaves the forward through a closure is not cast to the engine's output dtype.
    kept: list[Scores] = []
    try:
        with torch.no_grad():
            model(
                **label_inputs(inputs, index),
                head_function=lambda scores: kept.append(_outliving(model, scores)),
            )
    finally:
        model.train(training)
        _free_gathered(model)
    return kept[0]


def adapt_head(
    model: Any, peft_config: PeftConfig | None, seed: int
) -> tuple[Any, PeftConfig | None, contextlib.AbstractContextManager[None]]:
    """Let SFTTrainer accept an adapter on the output head.

    It refuses one because its own fused head ignores adapters; ours does not. So such an adapter is put on
    here, and hidden from that one check. A model that comes with its adapter is hidden in the same way.
    """
    if isinstance(model, PeftModel):
        return model, peft_config, _hidden_head(model.get_base_model())
    targets = getattr(peft_config, "target_modules", None) or ()
    if isinstance(model, str) or peft_config is None or "lm_head" not in targets:
        return model, peft_config, contextlib.nullcontext()
    set_seed(seed)  # the adapter's random start, as SFTTrainer does
    adapted = get_peft_model(model, peft_config)
    return adapted, None, _hidden_head(adapted.get_base_model())


def _run(
    model: Any, whole: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], balanced: bool
) -> tuple[Tensor, Tensor | None]:
    """Last hidden states (or logits) of all positions, and the balancing loss where it is asked for."""
    kwargs = {**kwargs, "use_cache": False}
    if balanced:
        kwargs["output_router_logits"] = True
    if has_own_logits(model):
        outputs = whole(*args, **kwargs)
        return outputs.logits, outputs.aux_loss if balanced else None
    if not balanced:
        return model.base_model(*args, **kwargs).last_hidden_state, None
    # Each family computes that loss in its own forward, which needs no logits for it: one position's are the
    # fewest.
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        kwargs["logits_to_keep"] = 1
    kept: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        aux_loss = whole(*args, **kwargs).aux_loss
    finally:
        hook.remove()
    return kept[0].last_hidden_state, aux_loss


def _places(index: Int[Tensor, "N"], width: int | None, found: int) -> Int[Tensor, "N"]:
    """Positions in rows of `found` tokens, the last `width` of which `index` counts: prompt tuning puts its
    own before them."""
    if width is None or width == found:
        return index
    return index + (index // width + 1) * (found - width)


def _free_gathered(model: nn.Module) -> None:
    """Free the units that FSDP2 keeps gathered for a backward pass, which does not come here."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _outliving(model: nn.Module, scores: Scores) -> Scores:
    """Copy the head where an engine frees after the forward what it gathered."""
    head = scores.head
    gathered = isinstance(model, FSDPModule) or hasattr(head.weight, "ds_id")
    if not gathered or head.weight is None:
        return scores
    bias = None if head.bias is None else head.bias.clone()
    return scores._replace(head=head._replace(weight=head.weight.clone(), bias=bias))


def _gathered_by_zero(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The head's parameters: ZeRO-3 empties them outside the head's forward, which is not called here."""
    parameters = (
        list(model.get_output_embeddings().parameters()) if hasattr(model, "get_output_embeddings") else []
    )
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


@contextlib.contextmanager
def _hidden_head(base: Any) -> Iterator[None]:
    head = base.get_output_embeddings()
    base.get_output_embeddings = lambda: getattr(head, "base_layer", head)
    try:
        yield
    finally:
        del base.get_output_embeddings
