"""A student cut from its teacher: whole blocks, and columns of the MLPs, those that do least on some text.

Axes: L blocks, T positions, H hidden size, I columns of an MLP.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpd.models.buildable import without_weights

__all__ = [
    "Importance",
    "KeptParts",
    "check_prunable",
    "choose_cut",
    "cut_model",
    "measure_importance",
    "with_cut",
]

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NO_TEXT = "A model is cut by what its layers do on text"


class KeptParts(NamedTuple):
    """What stays of a model."""

    layers: tuple[int, ...]
    """Places of the blocks, rising."""
    columns: tuple[Tensor, ...] | None
    """Of the MLP in each of those blocks, rising; None: all of them."""

    @property
    def width(self) -> int | None:
        """Columns of each MLP; None: as before."""
        return None if self.columns is None else len(self.columns[0])


class Importance(NamedTuple):
    """What blocks and columns do on some text."""

    blocks: Float[Tensor, "L"]
    """Block influence, 1 - mean cosine of what goes into a block and what comes out."""
    columns: tuple[Float[Tensor, "I"], ...] | None
    """Mean length of what a column adds to the MLP's output, by block."""
    positions: int
    """How many were read."""


class _Mlp(NamedTuple):
    """An MLP of the form down(act(gate) * up), or without a gate."""

    into: tuple[nn.Linear, ...]
    down: nn.Linear


def check_prunable(config: Any, name: str, layers: int | None, intermediate: float | None) -> None:
    """Refuse a model that cannot be cut so, or numbers that it does not have, before weights are loaded.

    Args:
        config: the model's.
        name: for messages.
        layers: blocks to keep; None: all.
        intermediate: share of the MLPs' columns to keep; None: all.

    Raises:
        ValueError: one of these.
    """
    _check_kind(config, name)
    count = config.num_hidden_layers
    if layers is not None and not 1 <= layers <= count:
        raise ValueError(
            f"{name} has {count} layers, and {layers} are to stay: give a number from 1 to {count}."
        )
    if intermediate is not None and not 0.0 < intermediate <= 1.0:
        raise ValueError(
            f"intermediate is the share of the MLPs' columns that stay, in (0, 1], got {intermediate}."
        )
    model = without_weights(copy.deepcopy(config))
    _, blocks = _blocks_of(model, name)
    columns = None
    if intermediate is not None:
        widths = {mlp.down.in_features for mlp in _mlps_of(blocks, config, name)}
        columns = (torch.arange(_width(widths.pop(), intermediate)),) * (layers or count)
    cut_model(model, KeptParts(tuple(range(layers or count)), columns))
    try:
        expected = _shapes(without_weights(copy.deepcopy(model.config)))
    except Exception as error:  # each architecture raises its own
        said = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise ValueError(_refused(name, config, f"no model of that size can be built ({said})")) from None
    if other := sorted(expected.items() ^ _shapes(model).items()):
        raise ValueError(
            _refused(name, config, f"{other[0][0]} does not follow from the number of layers and columns")
        )


def _check_kind(config: Any, name: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name} is stored quantized, and parts of such weights cannot be taken out: name the whole "
            "model that it was quantized from."
        )
    if config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False):
        kind = "an encoder too" if getattr(config, "is_encoder_decoder", False) else "more than a text model"
        raise ValueError(f"{name} ({config.model_type}) has {kind}. {_NO_TEXT} alone: give a decoder.")


def _refused(name: str, config: Any, why: str) -> str:
    return f"{name} ({config.model_type}) cannot be cut so: {why}. Models of the form of Llama can be."


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _width(before: int, share: float) -> int:
    return max(1, round(before * share))


def _blocks_of(model: nn.Module, name: str = "The model") -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and its place in the model."""
    config: Any = model.config
    count = config.num_hidden_layers
    found: list[tuple[str, nn.ModuleList]] = []
    for place, module in model.named_modules():
        inside = any(place.startswith(f"{other}.") for other, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found.append((place, module))
    if len(found) != 1:
        raise ValueError(_refused(name, config, f"it has {len(found)} lists of {count} layers"))
    return found[0]


def _mlps_of(blocks: nn.ModuleList, config: Any, name: str = "The model") -> list[_Mlp]:
    """The MLP of each block; all are as wide as the configuration says."""
    if experts := next((field for field in _EXPERTS if getattr(config, field, None)), None):
        why = f"its MLPs are mixtures of experts ({experts}), whose columns are not cut; layers can be"
        raise ValueError(_refused(name, config, why))
    width = getattr(config, "intermediate_size", None)
    found = [_mlp_of(block) for block in blocks]
    if not isinstance(width, int) or any(mlp is None or mlp.down.in_features != width for mlp in found):
        why = (
            "its layers have no MLPs of one intermediate_size with up_proj and down_proj (and gate_proj), "
            "each a matrix of its own; layers can be"
        )
        raise ValueError(_refused(name, config, why))
    return [mlp for mlp in found if mlp is not None]


def _mlp_of(block: nn.Module) -> _Mlp | None:
    for child in block.children():
        named = {name: getattr(child, name, None) for name in ("up_proj", "gate_proj", "down_proj")}
        if all(type(named[name]) is nn.Linear for name in ("up_proj", "down_proj")):
            into = tuple(part for name, part in named.items() if name != "down_proj" and part is not None)
            whole = all(type(part) is nn.Linear for part in into)
            return _Mlp(into, named["down_proj"]) if whole else None  # type: ignore[arg-type]
    return None


@torch.no_grad()
def measure_importance(model: nn.Module, rows: Iterable[Sequence[int]], *, columns: bool) -> Importance:
    r"""What each block, and each column of each MLP, does on some text, from one forward a row.

    .. math:: \mathrm{BI}_l = 1 - \frac{1}{T} \sum_t \frac{x_{l,t} \cdot x_{l+1,t}}
              {\lVert x_{l,t} \rVert \lVert x_{l+1,t} \rVert}, \qquad
              s_{l,i} = \frac{1}{T} \sum_t |a_{l,t,i}| \, \lVert W^{\mathrm{down}}_{l,:,i} \rVert

    x are hidden states before and behind a block, a what the MLP's last matrix reads. s is the mean length of
    what the column adds to that matrix's output. Sums are taken in float64.

    Args:
        model: of which `check_prunable` took the configuration.
        rows: token ids, one row a forward.
        columns: True if the MLPs' columns are measured too.

    Raises:
        ValueError: no row, or values that are not finite.

    Reference:
        Men et al., ShortGPT, 2024 (block influence); Muralidharan et al., Compact Language Models via Pruning
        and Knowledge Distillation, 2024 (importance from activations).
    """
    _, blocks = _blocks_of(model)
    mlps = _mlps_of(blocks, model.config) if columns else []
    alike = torch.zeros(len(blocks), dtype=torch.float64)
    sizes = [torch.zeros(mlp.down.in_features, dtype=torch.float64) for mlp in mlps]
    positions = 0

    def see_block(place: int, before: Tensor, after: Any) -> Any:
        # A block that changes nothing has cosine 1 whatever it was given.
        x, y = before.double(), _hidden(after).double()
        same = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(torch.finfo(torch.float64).tiny)
        alike[place] += torch.where((x == y).all(-1), 1.0, same).sum().cpu()

    def see_columns(place: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[place] += args[0].double().abs().flatten(0, -2).sum(0).cpu()

    with contextlib.ExitStack() as hooks:
        for place, block in enumerate(blocks):
            hooks.enter_context(_behind(block, place, see_block))
        for place, mlp in enumerate(mlps):
            hook = mlp.down.register_forward_pre_hook(functools.partial(see_columns, place))
            hooks.callback(hook.remove)
        for row in rows:
            _forward(model, row)
            positions += len(row)
    if not positions:
        raise ValueError(f"{_NO_TEXT}, and there are no rows: give data with text.")
    of_columns = tuple(
        total / positions * mlp.down.weight.double().norm(dim=0).cpu()
        for total, mlp in zip(sizes, mlps, strict=True)
    )
    found = Importance(1.0 - alike / positions, of_columns if columns else None, positions)
    if not all(torch.isfinite(part).all() for part in (found.blocks, *of_columns)):
        raise ValueError(
            "The model's hidden states are not finite on these rows, so that its layers cannot be compared: "
            "load it in float32 or bfloat16."
        )
    return found


def choose_cut(
    importance: Importance, layers: int | None = None, intermediate: float | None = None
) -> KeptParts:
    """The blocks with the most influence, and of each MLP the columns that add most; of equals the first.

    Args:
        importance: measured on the whole model.
        layers, intermediate: as for `check_prunable`.
    """
    blocks = _first(importance.blocks, len(importance.blocks) if layers is None else layers)
    if intermediate is None or importance.columns is None:
        return KeptParts(tuple(blocks.tolist()), None)
    scores = [importance.columns[place] for place in blocks.tolist()]
    return KeptParts(
        tuple(blocks.tolist()), tuple(_first(one, _width(len(one), intermediate)) for one in scores)
    )


def _first(scores: Tensor, count: int) -> Tensor:
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


@torch.no_grad()
def cut_model(model: nn.Module, cut: KeptParts) -> None:
    """Take out, in place, weights and configuration of all that a cut does not keep.

    The model is to be saved then: its blocks still have the numbers that they had.
    """
    config: Any = model.config
    place, blocks = _blocks_of(model)
    parent, _, leaf = place.rpartition(".")
    count = len(blocks)
    kept = nn.ModuleList(blocks[number] for number in cut.layers)
    if cut.columns is not None:
        for mlp, columns in zip(_mlps_of(kept, config), cut.columns, strict=True):
            _cut_mlp(mlp, columns)
        config.intermediate_size = cut.width
    setattr(model.get_submodule(parent), leaf, kept)
    for name, value in config.to_dict().items():
        # One entry a layer: layer_types, mlp_layer_types, no_rope_layers, layers_block_type, ...
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, [getattr(config, name)[number] for number in cut.layers])
    config.num_hidden_layers = len(kept)


def _cut_mlp(mlp: _Mlp, columns: Tensor) -> None:
    for part in mlp.into:
        at = columns.to(part.weight.device)
        part.weight = nn.Parameter(part.weight[at], part.weight.requires_grad)
        if part.bias is not None:
            part.bias = nn.Parameter(part.bias[at], part.bias.requires_grad)
        part.out_features = len(columns)
    at = columns.to(mlp.down.weight.device)
    mlp.down.weight = nn.Parameter(mlp.down.weight[:, at], mlp.down.weight.requires_grad)
    mlp.down.in_features = len(columns)


@torch.no_grad()
def with_cut(model: nn.Module, cut: KeptParts, row: Sequence[int]) -> Float[Tensor, "T V"]:
    """Logits of the whole model as a cut leaves it: other blocks are passed by, other columns are zeroes.

    What a model that was cut and loaded again must give, found without any change of the model.
    """
    _, blocks = _blocks_of(model)
    with contextlib.ExitStack() as hooks:
        for place, block in enumerate(blocks):
            if place not in cut.layers:
                hooks.enter_context(_behind(block, place, lambda _, before, after: _replaced(after, before)))
        if cut.columns is not None:
            mlps = _mlps_of(blocks, model.config)
            for place, columns in zip(cut.layers, cut.columns, strict=True):
                mask = torch.zeros(mlps[place].down.in_features, dtype=torch.bool)
                mask[columns] = True
                hook = mlps[place].down.register_forward_pre_hook(
                    lambda _, args, m=mask: (args[0].masked_fill(~m.to(args[0].device), 0.0),)
                )
                hooks.callback(hook.remove)
        return _forward(model, row)


@contextlib.contextmanager
def _behind(block: nn.Module, place: int, see: Any) -> Iterator[None]:
    """Call `see(place, before, after)` after a block's forward; what it returns replaces the output."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return see(place, args[0] if args else kwargs["hidden_states"], out)

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _hidden(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _replaced(out: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(out, Tensor) else (hidden, *out[1:])


def _forward(model: Any, row: Sequence[int]) -> Float[Tensor, "T V"]:
    ids = torch.tensor([list(row)], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids, use_cache=False).logits[0]
