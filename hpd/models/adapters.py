"""Adapters that peft saved, as models: finding the base, merging, going on with the training of one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hpd.config.models import ModelConfig, TeacherConfig
from hpd.models.buildable import without_weights

__all__ = [
    "Adapter",
    "attach",
    "base_with_tokenizer",
    "find_adapter",
    "has_shape_of",
    "merge",
    "refuse_rounding",
    "require_whole",
]

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_OF_HUB = ("adapter_config.json", "adapter_model.*", "*token*", "*.jinja", "vocab*", "merges.txt", "*.model")


class Adapter(NamedTuple):
    """A folder with an adapter and no model, as a LoRA run leaves it."""

    path: str
    """As the recipe or the command line names it."""
    folder: Path
    config: Mapping[str, Any]
    """Its adapter_config.json."""
    base: ModelConfig | TeacherConfig
    """The model that it was trained on, loaded like the source that names the adapter."""

    def explain(self, role: str, problem: str) -> str:
        """The sentence of an error about the base."""
        return (
            f"The {role} {self.path!r} is an adapter on {self.base.model!r}, the base_model_name_or_path of "
            f"its {_CONFIG} (a relative path counts from the folder that hpd runs in). {problem}"
        )


def find_adapter(source: ModelConfig | TeacherConfig, role: str) -> Adapter | None:
    """The adapter that a source names; None for a whole model.

    Raises:
        ValueError: an adapter that cannot be a model here: of another kind, without weights or a base, or
            where the source asks for what needs a whole model.
    """
    path = str(source.model)
    folder = _folder(path, source.revision)
    if folder is None:
        return None
    config = _read(folder, path, role)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise ValueError(
            f"The {role} {path!r} is an adapter whose {_CONFIG} names no base_model_name_or_path: write the "
            "folder or Hub id of the model that it was trained on there."
        )
    if (folder / base).resolve() == folder.resolve() or Path(base).resolve() == folder.resolve():
        raise ValueError(f"The {role} {path!r} is an adapter whose {_CONFIG} names itself as its base.")
    _check_kind(config, path, role)
    _check_source(source, path, role)
    _check_weights(folder, path, role, source.allow_pickle)
    return Adapter(path, folder, config, replace(source, model=base, revision=config.get("revision")))


def refuse_rounding(adapter: Adapter, config: Any, role: str) -> None:
    """Refuse to merge an adapter into weights of 4 or 8 bits, where most of it would be lost.

    Args:
        config: the base's configuration.

    Raises:
        ValueError: the source asks for such weights, or the base is stored in them.
    """
    bits = adapter.base.quantization
    if bits is not None:
        raise ValueError(
            f"The {role} {adapter.path!r} is an adapter, and merging into weights of {bits} would round it "
            f"away: write a whole model with hpd export {adapter.path} --merge --output DIR, and name that "
            "with quantization."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            adapter.explain(
                role,
                "That model is stored quantized, and merging would round the adapter away: name the whole "
                "model that it was quantized from there.",
            )
        )


def base_with_tokenizer(path: str, revision: str | None) -> tuple[str, str | None] | None:
    """The base and its revision, where a path is an adapter without a tokenizer of its own."""
    folder = _folder(path, revision)
    if folder is None or (folder / "tokenizer_config.json").is_file():
        return None
    config = _read(folder, path, "tokenizer")
    base = config.get("base_model_name_or_path")
    return (base, config.get("revision")) if isinstance(base, str) and base != path else None


def require_whole(path: str, reader: str) -> None:
    """Raise ValueError where something outside hpd would have to read an adapter.

    Args:
        path: folder or Hub id.
        reader: the name of what reads it.
    """
    if _folder(path, None) is not None:
        raise ValueError(
            f"{path!r} is an adapter, and {reader} reads whole models: write one with hpd export {path} "
            "--merge --output DIR, and give that."
        )


def attach(adapter: Adapter, base: nn.Module, role: str, trainable: Any = None) -> PeftModel:
    """The base with its adapter, which is switched on.

    Args:
        adapter: what `find_adapter` found.
        base: the model of `adapter.base`, changed in place.
        role: its name in messages.
        trainable: a peft configuration of the same shape to go on training under; None: frozen.

    Raises:
        ValueError: weights that are not those of this base.
    """
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[adapter.config["peft_type"]]
        config: PeftConfig = kind.from_pretrained(str(adapter.folder))
        if trainable is not None:
            config.lora_dropout = trainable.lora_dropout  # type: ignore[attr-defined]
        adapted = PeftModel.from_pretrained(
            base,  # type: ignore[arg-type]
            str(adapter.folder),
            config=config,
            is_trainable=trainable is not None,
            torch_device="cpu",
        )
    except Exception as error:  # files are anybody's, and so is what they make a library raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise ValueError(adapter.explain(role, f"It cannot be put on that model: {reason}")) from None
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if lacking := sorted(wanted.keys() - _shapes(adapter.folder, wanted).keys()):
        raise ValueError(
            adapter.explain(role, f"It lacks {len(lacking)} tensors that this model needs: {lacking[0]}.")
        )
    return adapted


def merge(adapter: Adapter, adapted: PeftModel) -> PreTrainedModel:
    """The base with the adapter's product added to its weights: the same function as one model.

    Tied embeddings part where the adapter changes one side only. An adapter that is put on the result names
    the folder of this one as its base.
    """
    base: Any = adapted.get_base_model()
    _untie(base)
    model: Any = adapted.merge_and_unload()
    model.requires_grad_(True)
    model.config._name_or_path = model.name_or_path = adapter.path
    return model.eval()


def has_shape_of(adapter: Adapter, config: Any, wanted: Any) -> bool:
    """True if a peft configuration puts the adapter's parameters on its base, scaled alike.

    Args:
        config: the base's configuration.
        wanted: a `peft.LoraConfig`; its dropout may differ.
    """
    saved: Any = PEFT_TYPE_TO_CONFIG_MAPPING[adapter.config["peft_type"]].from_pretrained(str(adapter.folder))
    if type(saved) is not type(wanted):
        return False
    alike = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")
    if any(getattr(saved, name) != getattr(wanted, name) for name in alike):
        return False
    with torch.device("meta"):
        fresh = get_peft_model(without_weights(config), wanted)
    tensors = get_peft_model_state_dict(fresh, save_embedding_layers=False)
    return _shapes(adapter.folder, tensors) == {name: tuple(t.shape) for name, t in tensors.items()}


def _folder(path: str, revision: str | None) -> Path | None:
    """Where the adapter's files are; None for a whole model, or nothing at all."""
    folder = Path(path)
    if folder.is_dir():
        only_adapter = (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()
        return folder if only_adapter else None
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        return None
    return _from_hub(path, revision)


@functools.cache
def _from_hub(name: str, revision: str | None) -> Path | None:
    quiet: dict[str, Any] = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        if cached_file(name, "config.json", revision=revision, **quiet) is not None:
            return None
        if cached_file(name, _CONFIG, revision=revision, **quiet) is None:
            return None
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_OF_HUB))
    except (OSError, ValueError):  # no such repository: whoever loads it as a model says so
        return None
    return Path(found)


def _read(folder: Path, path: str, role: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The {role} {path!r} has a damaged {_CONFIG} ({error}): copy it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"The {role} {path!r} has a damaged {_CONFIG} (not an object): copy it again.")
    return found


def _check_kind(config: Mapping[str, Any], path: str, role: str) -> None:
    kind, task = config.get("peft_type"), config.get("task_type")
    tuners = {str(name.value): tuner for name, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    tuner = tuners.get(kind) if isinstance(kind, str) else None
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        raise ValueError(
            f"The {role} {path!r} is an adapter of type {kind!r}, which cannot be merged into its base: "
            "types that change weights, such as LORA, are taken."
        )
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"The {role} {path!r} is an adapter for {task!r}, not for a causal language model (CAUSAL_LM)."
        )
    if config.get("megatron_config") is not None:
        raise ValueError(
            f"The {role} {path!r} has a megatron_config, which names code to import and is refused: remove "
            f"it from its {_CONFIG}."
        )


def _check_source(source: ModelConfig | TeacherConfig, path: str, role: str) -> None:
    if isinstance(source, ModelConfig) and source.init == "random":
        raise ValueError(
            f"The {role} {path!r} is an adapter, and init: random reads a configuration only: name the base "
            "model instead, or set init: pretrained."
        )


def _check_weights(folder: Path, path: str, role: str, allow_pickle: bool) -> None:
    file = folder / _WEIGHTS
    if not file.is_file():
        if (folder / _PICKLE).is_file():
            if allow_pickle:
                return
            raise ValueError(
                f"The {role} {path!r} has its adapter in {_PICKLE}, a pickle, which can hold a program and "
                "is refused: use a copy with safetensors; in recipes, allow_pickle: true takes it."
            )
        raise ValueError(f"The {role} {path!r} is an adapter without weights ({_WEIGHTS}): copy it again.")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The {role}'s {file} is cut short or damaged ({reason}): copy or download it again."
        ) from None


def _shapes(folder: Path, otherwise: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the saved tensors; those of `otherwise` where they are in a pickle, which is not read
    twice."""
    file = folder / _WEIGHTS
    if not file.is_file():
        return {name: tuple(tensor.shape) for name, tensor in otherwise.items()}
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def _untie(base: Any) -> None:
    """Give an adapted head weights of its own where it shares them with the embedding, or the reverse:
    merging into shared weights would change both sides."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    layers = [getattr(module, "base_layer", module) for module in (head, embedding)]
    adapted = any(layer is not module for layer, module in zip(layers, (head, embedding), strict=True))
    shared = getattr(layers[0], "weight", None)
    if not adapted or shared is None or shared is not getattr(layers[1], "weight", None):
        return
    layers[0].weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
