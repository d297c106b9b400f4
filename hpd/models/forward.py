"""A causal language model that hands hidden states and head to a function, inside its own forward.

Whatever runs on the head must run inside the (possibly wrapped) model's forward, or the hooks of DDP and FSDP
are bypassed: gradients go unsynchronised and sharded weights are never gathered.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import set_seed

from hpd.losses.heads import Scores, head_of

__all__ = ["adapt_head", "add_head_function", "model_inputs", "scores_of"]

_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
)


def model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """A collated batch without labels, which would make the model compute a loss itself."""
    return {name: inputs[name] for name in _MODEL_INPUTS if name in inputs}


def add_head_function(model: nn.Module) -> nn.Module:
    """Teach `model` the call `model(**inputs, label_index=index, head_function=f)`, which returns
    `f(Scores)`.

    The backbone runs without the head, the hidden states at `index` (of the flattened batch) are selected,
    and `f` gets them with the head. Without `head_function` the forward is the original one, so generation is
    unchanged. In place; call it before the model is wrapped, and on the base model of a PEFT model.
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
        head_function: Callable[[Scores], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if head_function is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)
        # Looked up at every call: FSDP and PEFT replace the head after this patch.
        with _gathered_by_zero(self):
            head = head_of(self)
            assert label_index is not None
            assert head.weight is not None
            return head_function(Scores(hidden.index_select(0, label_index).to(head.weight.device), head))

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
                **model_inputs(inputs),
                label_index=index,
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
