"""Output heads as values: what turns hidden states into logits, for any architecture.

Axes: N label positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["POLICIES", "Head", "Scores", "TeacherScores", "TopKScores", "head_of"]

POLICIES = ("error", "shared_prefix")
"""Choices where the vocabularies of student and teacher differ."""


class Head(NamedTuple):
    r"""An output projection with the extras that real models have.

    .. math:: z = \mathrm{cap}(s\,(h W^\top + b)), \qquad \mathrm{cap}(x) = c \tanh(x / c)
    """

    weight: Float[Tensor, "V D"] | None
    """None: the hidden states are logits already (D = V)."""
    bias: Float[Tensor, "V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def truncated(self, vocab: int | None) -> Head:
        """The head of the first `vocab` tokens only; a view, no copy."""
        weight, bias = (None if tensor is None else tensor[:vocab] for tensor in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)


class Scores(NamedTuple):
    """A model's view of N label positions: hidden states and the head that reads them."""

    hidden: Float[Tensor, "N D"]
    head: Head
    log_z: Float[Tensor, "N"] | None = None
    """Logarithm of the sum of exp(logit) over the whole vocabulary, where it is known (a cache stores it).
    Then the label's and drawn tokens' log-probabilities need a row of the head each, not a product with all
    of it."""

    @property
    def vocab(self) -> int:
        return self.hidden.shape[-1] if self.head.weight is None else len(self.head.weight)

    def at(self, positions: Tensor | slice | None) -> Scores:
        """The scores at some of the positions; None: at all of them."""
        if positions is None:
            return self
        return self._replace(
            hidden=self.hidden[positions], log_z=None if self.log_z is None else self.log_z[positions]
        )


class TopKScores(NamedTuple):
    r"""A teacher known at its k likeliest tokens and at the label.

    The rest of its mass is shared evenly among all other tokens (rule `uniform_tail`), none of them above the
    k-th:

    .. math:: \log p_v = \min\Big(\log \frac{1 - \sum_{u \in S} p_u}{V - |S|},\; \min_{u \le k} \log p_u\Big),
        \quad v \notin S

    with S the k tokens and the label. Label supports are exact; everything else is as good as the tail is
    thin.
    """

    tokens: Int[Tensor, "N k"]
    logprobs: Float[Tensor, "N k"]
    """Nats, normalized over the whole vocabulary."""
    label_logprobs: Float[Tensor, "N"]
    vocab: int
    """Tokens of the teacher's vocabulary."""
    drawn: bool = False
    """True if `tokens` were drawn and `logprobs` are the logarithms of their weights: an estimate of the
    teacher's distribution p whose expectation is p. It has no tail, serves what is linear in p, and the
    label's log-probability, which is exact, is apart from it."""

    def at(self, positions: Tensor | slice | None) -> TopKScores:
        """The scores at some of the positions; None: at all of them."""
        if positions is None:
            return self
        tokens, logprobs, label = (t[positions] for t in (self.tokens, self.logprobs, self.label_logprobs))
        return self._replace(tokens=tokens, logprobs=logprobs, label_logprobs=label)


TeacherScores: TypeAlias = Scores | TopKScores
"""A teacher's answer for N label positions."""


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model, adapters merged and sharded weights gathered.

    Args:
        model: a transformers `PreTrainedModel` with output embeddings (not its PEFT wrapper).
    """
    module = model.get_output_embeddings()  # type: ignore[operator]
    if module is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: distillation needs a causal language model."
        )
    weight, bias = _effective_weight(module)
    config = model.config.get_text_config()  # type: ignore[union-attr]
    return Head(
        _gathered(weight),
        None if bias is None else _gathered(bias),
        logit_scale(config),
        getattr(config, "final_logit_softcapping", None),
    )


def logit_scale(config: object) -> float:
    """The factor of a family's logits; the families disagree on its name and its direction."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by it; Granite and MiniCPM3 divide.
    return float(scaling) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(scaling)


def _effective_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as seen by the hidden states, differentiable in an adapter's parameters."""
    # Duck typing on PEFT's layers keeps peft out of the import path of people who do not use it.
    if hasattr(module, "modules_to_save") and not getattr(module, "disable_adapters", False):
        active = module.active_adapter
        active = active if isinstance(active, str) else active[0]  # type: ignore[index]
        return _effective_weight(module.modules_to_save[active])  # type: ignore[index]
    if hasattr(module, "token_adapter"):  # trainable_token_indices
        return _effective_weight(module.token_adapter)  # type: ignore[arg-type]
    if hasattr(module, "original_module"):
        return _effective_weight(module.original_module)  # type: ignore[arg-type]
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
    weight, bias = base.weight, getattr(base, "bias", None)  # type: ignore[union-attr]
    if base is module or getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight, bias  # type: ignore[return-value]
    if hasattr(module, "get_merged_weights"):  # the layer of trainable tokens
        return module.get_merged_weights(module.active_adapters), bias  # type: ignore[operator,return-value]
    _check_lora(module)
    for name in module.active_adapters:  # type: ignore[union-attr]
        if name in module.lora_A:  # type: ignore[operator]
            weight = weight + module.get_delta_weight(name).to(weight.dtype)  # type: ignore[operator]
    return weight, bias  # type: ignore[return-value]


def _check_lora(module: nn.Module) -> None:
    """Raise ValueError where an adapter does more to the head than to add a product to its weight."""
    kind = None if hasattr(module, "lora_A") else "An adapter other than LoRA"
    active: list[str] = module.active_adapters  # type: ignore[assignment]
    for switch in ("use_dora", "lora_bias"):
        if any(getattr(module, switch, {}).get(name) for name in active):
            kind = f"LoRA with {switch}"
    dropout = getattr(module, "lora_dropout", {})
    if any(getattr(dropout[name], "p", 0.0) for name in active if name in dropout):
        kind = "LoRA with lora_dropout"
    if kind:
        raise ValueError(
            f"{kind} on the output head is not supported: use plain LoRA there, or modules_to_save."
        )


def _gathered(tensor: Tensor) -> Tensor:
    """FSDP2 shows sharded parameters as DTensors: gather once per step, before the chunks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
