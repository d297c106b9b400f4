"""Loading students, teachers and tokenizers, with errors that a user can act on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hpd.config.models import ModelConfig, TeacherConfig
from hpd.models.adapters import (
    Adapter,
    attach,
    base_with_tokenizer,
    find_adapter,
    merge,
    refuse_rounding,
)
from hpd.models.buildable import check_buildable
from hpd.models.quantized import check_quantizable, keep_layout, loading_options

__all__ = [
    "check_files",
    "check_loaded",
    "load_adapted",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
_NOTHING_AMISS: Mapping[str, Any] = {"mismatched_keys": (), "missing_keys": (), "unexpected_keys": ()}
# Tensors that an error names.
_NAMED = 3


def load_config(source: ModelConfig | TeacherConfig, role: str) -> Any:
    """The model's configuration: the cheapest proof that the path is a causal language model; an adapter's is
    that of its base.

    Raises:
        ValueError: not a folder or Hub id, no model there, not a causal language model, or files that cannot
            be its weights.
    """
    path = source.model
    assert path is not None
    if (adapter := find_adapter(source, role)) is not None:
        config = _of_base(adapter, role)
        if isinstance(source, TeacherConfig):
            refuse_rounding(adapter, config, role)
        return config
    _check_folder(path, role)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # the values in a config.json are anybody's, and so is what their checks raise
        raise ValueError(_explain(path, role, error)) from None
    _check_no_foreign_kernels(config, source, role)
    check_quantizable(source, config, role)
    if type(config) not in AutoModelForCausalLM._model_mapping and not source.trust_remote_code:
        raise ValueError(
            f"The {role} {path!r} is a {config.model_type} model, which is not a causal language model that "
            "transformers knows. Give a text-generation model, or set trust_remote_code if its repository "
            "brings the code."
        )
    # A cache keeps no weights of its teacher.
    described = isinstance(source, TeacherConfig) and source.type == "cached"
    check_buildable(config, source, role, is_built=not described)
    if not described and not (isinstance(source, ModelConfig) and source.init == "random"):
        check_files(path, config, role, source.allow_pickle)
    return config


def _of_base(adapter: Adapter, role: str) -> Any:
    try:
        return load_config(adapter.base, role)
    except ValueError as error:
        raise ValueError(adapter.explain(role, str(error))) from None


def _check_no_foreign_kernels(config: Any, source: ModelConfig | TeacherConfig, role: str) -> None:
    """A config.json may name an attention kernel on the Hub, which transformers would fetch and run."""
    for name in ("_attn_implementation", "_experts_implementation"):
        kernel = getattr(config, name, None)
        if isinstance(kernel, str) and "/" in kernel and kernel != source.attn_implementation:
            raise ValueError(
                f"The {role} {source.model!r} asks for the kernel {kernel!r} from the Hub, which is code. "
                f"Remove it from its config.json, or set attn_implementation: {kernel} if you trust it."
            )


def load_tokenizer(source: ModelConfig | TeacherConfig, role: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or the one that the recipe names.

    Raises:
        ValueError: there is none, or it has no end-of-sequence token.
    """
    path = source.tokenizer or source.model
    assert path is not None
    if (base := base_with_tokenizer(path, source.revision)) is not None:
        return load_tokenizer(replace(source, model=base[0], revision=base[1], tokenizer=None), role)
    _check_folder(path, f"{role} tokenizer", needs_config=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # as above: Rust's parser raises a bare Exception
        raise ValueError(_explain(path, f"{role} tokenizer", error)) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The {role} tokenizer {path!r} has no eos_token: a model trained with it would never stop. "
            "Set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def load_generation_config(source: ModelConfig | TeacherConfig) -> GenerationConfig | None:
    """How the model generates, where a file of its own says so; a file that cannot be read is `load_model`'s
    to refuse."""
    try:
        return GenerationConfig.from_pretrained(str(source.model), revision=source.revision or "main")
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def load_model(source: ModelConfig | TeacherConfig, role: str, seed: int = 0) -> PreTrainedModel:
    """The model, in evaluation mode, on the CPU or where its quantization puts it; an adapter is merged
    into its base.

    Raises:
        ValueError: see `load_config`; missing or unreadable weights; an adapter to be merged into quantized
            ones.
    """
    if (adapter := find_adapter(source, role)) is not None:
        refuse_rounding(adapter, load_config(source, role), role)
        model = merge(adapter, attach(adapter, load_model(adapter.base, role, seed), role))
        check_loaded(model, adapter.path, role, _NOTHING_AMISS)
        return model
    config = load_config(source, role)
    dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    if isinstance(source, ModelConfig) and source.init == "random":
        set_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32 if dtype == "auto" else dtype,
                trust_remote_code=source.trust_remote_code,
            ).eval()
        except Exception as error:  # as below
            raise ValueError(_explain(str(source.model), role, error)) from None
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    options["use_safetensors"] = None if source.allow_pickle else True
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    if source.quantization is not None:
        options |= loading_options(source.quantization)
    try:
        # Other shapes are let through here, to be named by check_loaded.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source.model), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model, info = loaded
    except Exception as error:
        # Weights and configuration are anybody's, and so is what they make a library raise.
        raise ValueError(_explain(str(source.model), role, error)) from None
    check_loaded(model, str(source.model), role, info)
    keep_layout(model)
    return model.eval()


def load_adapted(source: ModelConfig, role: str, trainable: Any) -> PeftModel:
    """The base of the adapter that a source names, with that adapter, ready to go on training.

    Args:
        trainable: a `peft.LoraConfig` of the adapter's shape; its dropout counts.

    Raises:
        ValueError: as `load_model`.
    """
    adapter = find_adapter(source, role)
    assert adapter is not None
    load_config(source, role)
    model = attach(adapter, load_model(adapter.base, role), role, trainable)
    check_loaded(model, adapter.path, role, _NOTHING_AMISS)
    return model


def _check_folder(path: str, role: str, needs_config: bool = True) -> None:
    folder = Path(path)
    looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if not looks_local:
        return
    if not folder.is_dir():
        given = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"The {role} {path!r} {given}: give a folder that save_pretrained wrote, or a Hub id such as "
            "org/name."
        )
    if needs_config and not (folder / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"The {role} folder {path!r} has no config.json (found: {found}): it is not a model that "
            "save_pretrained wrote."
        )


def _explain(path: str, role: str, error: Exception) -> str:
    reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
    if "trust_remote_code" in str(error):
        return (
            f"The {role} {path!r} brings code of its own, which is not run: use a model that transformers "
            "knows, or, if you have read that code, set trust_remote_code: true."
        )
    if not Path(path).exists():
        return (
            f"The {role} {path!r} is not a folder here, and not available from the Hub either. Check the "
            "name (make models makes the folders that recipes/gsm8k_smollm2.yaml names). The Hub client "
            f"says: {reason}"
        )
    return f"The {role} {path!r} cannot be loaded: {reason}"


def check_files(path: str, config: Any, role: str, allow_pickle: bool) -> None:
    """Look at the weight files of a local folder: the sizes in their headers must add up to the file's.

    Raises:
        ValueError: none, cut short or damaged ones, a missing shard, or pickles that nobody allowed.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    named = getattr(config, "transformers_weights", None)
    if (
        named is not None
        and not str(named).endswith((".safetensors", ".safetensors.index.json"))
        and not allow_pickle
    ):
        raise ValueError(_pickle_refused(path, role, str(named)))
    if named is not None:
        return
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    elif (folder / _INDEX).is_file():
        files = _shards(folder, role)
    elif found := [name for name in _PICKLES if (folder / name).is_file()]:
        if not allow_pickle:
            raise ValueError(_pickle_refused(path, role, found[0]))
        return
    else:
        listed = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise ValueError(
            f"The {role} {path!r} has no weights ({_SINGLE}; found: {listed}): copy or download it again."
        )
    for name in files:
        _check_header(folder / name, role)


def _pickle_refused(path: str, role: str, name: str) -> str:
    """The error for a pickle: loading one runs what its author put in, unless the loader refuses well."""
    switch = (
        f" If you trust whoever wrote it, set {role}.allow_pickle: true."
        if role in ("student", "teacher")
        else ""
    )
    return (
        f"The {role} {path!r} has its weights in {name}, a pickle, which can hold a program and is refused: "
        "use a revision with safetensors, or a copy that save_pretrained wrote; in recipes, allow_pickle: "
        f"true takes it.{switch}"
    )


def _shards(folder: Path, role: str) -> list[str]:
    index = folder / _INDEX
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The {role}'s {index} is damaged ({type(error).__name__}: {error}): it needs a weight_map from "
            "tensors to files. Copy or download the model again."
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"The {role}'s {index} names {name!r}, a file outside its folder: do not use this model."
            )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"The {role} {str(folder)!r} is incomplete: {', '.join(missing[:_NAMED])} of {len(names)} shards "
            f"{'is' if len(missing) == 1 else 'are'} missing. Copy or download the model again."
        )
    return names


def _check_header(file: Path, role: str) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        if "allocate memory" in str(error):
            raise MemoryError(f"for the {role}'s {file}") from None
        with file.open("rb") as start:
            pointer = start.read(len(_POINTER)) == _POINTER
        what = (
            "is a Git LFS pointer instead of weights: run git lfs pull there"
            if pointer
            else f"is cut short or damaged ({' '.join(str(error).split())}): copy or download the model again"
        )
        raise ValueError(f"The {role}'s {file} {what}.") from None


def check_loaded(model: torch.nn.Module, path: str, role: str, info: Mapping[str, Any]) -> None:
    """Refuse weights and a configuration that do not describe one model, and weights that are not numbers.

    Args:
        info: from `from_pretrained(output_loading_info=True)`.

    Raises:
        ValueError: tensors that are missing (transformers would draw them at random), have other shapes,
            belong to layers that the configuration leaves out, or hold nan or infinity.
    """
    end = "Its config.json and its weights do not belong together: copy or download the model again."
    if wrong := sorted(info["mismatched_keys"], key=str):
        name, saved, wanted = wrong[0]
        raise ValueError(
            f"The {role} {path!r} has {len(wrong)} tensors of another shape than its configuration says: "
            f"{name} is {list(saved)} and should be {list(wanted)}. {end}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"The {role} {path!r} lacks {len(missing)} tensors: {_some(missing)}. {end}")
    patterns = {_pattern(name) for name in model.state_dict()}
    if left_out := sorted(name for name in info["unexpected_keys"] if _pattern(name) in patterns):
        raise ValueError(
            f"The {role} {path!r} has weights of layers that its config leaves out: {_some(left_out)}. {end}"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not tensor.is_meta:
            least, most = torch.aminmax(tensor.detach())  # no temporary, and nan comes through
            if not (torch.isfinite(least) and torch.isfinite(most)):
                raise ValueError(
                    f"The {role} {path!r} is broken: {name} holds nan or infinite values. Use another "
                    "checkpoint."
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _pattern(name: str) -> str:
    """A tensor's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)
