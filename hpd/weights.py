"""Is what lies in a model's folder really its weights? What can be known before they are loaded, and after."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["check_files", "check_loaded"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
_NAMED = 3  # tensors that an error names


def check_files(path: str, config: Any, role: str, allow_pickle: bool) -> None:
    """Look at the weight files of a local folder: the headers of safetensors, whose sizes must add up to the file's.

    Raises:
        ValueError: none, cut short or damaged ones, a missing shard, or pickles that nobody allowed.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    named = getattr(config, "transformers_weights", None)
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")) and not allow_pickle:
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
        raise ValueError(f"The {role} {path!r} has no weights ({_SINGLE}; found: {listed}): copy or download it again.")
    for name in files:
        _check_header(folder / name, role)


def _pickle_refused(path: str, role: str, name: str) -> str:
    """Loading a pickle runs what its author put in, unless the loader refuses well enough."""
    switch = f" If you trust whoever wrote it, set {role}.allow_pickle: true." if role in ("student", "teacher") else ""
    return (
        f"The {role} {path!r} has its weights in {name}, a pickle, which can hold a program and is refused: use a revision "
        f"with safetensors, or a copy that save_pretrained wrote; in recipes, allow_pickle: true takes it.{switch}"
    )


def _shards(folder: Path, role: str) -> list[str]:
    index = folder / _INDEX
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The {role}'s {index} is damaged ({type(error).__name__}: {error}): it needs a weight_map from tensors to files. "
            "Copy or download the model again."
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"The {role}'s {index} names {name!r}, a file outside its folder: do not use this model.")
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
        with file.open("rb") as start:
            pointer = start.read(len(_POINTER)) == _POINTER
        what = (
            "is a Git LFS pointer instead of weights: run git lfs pull there"
            if pointer
            else f"is cut short or damaged ({' '.join(str(error).split())}): copy or download the model again"
        )
        raise ValueError(f"The {role}'s {file} {what}.") from None


def check_loaded(model: torch.nn.Module, path: str, role: str, info: Mapping[str, Any]) -> None:
    """Do weights and configuration describe one model, and is every weight a number?

    Args:
        info: what `from_pretrained(output_loading_info=True)` found.

    Raises:
        ValueError: tensors that are missing (transformers would draw them at random), have other shapes, belong to layers
            that the configuration leaves out, or hold nan or infinity.
    """
    end = "Its config.json and its weights do not belong together: copy or download the model again."
    if wrong := sorted(info["mismatched_keys"], key=str):
        name, saved, wanted = wrong[0]
        raise ValueError(
            f"The {role} {path!r} has {len(wrong)} tensors of another shape than its configuration says: {name} is "
            f"{list(saved)} and should be {list(wanted)}. {end}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"The {role} {path!r} lacks {len(missing)} tensors: {_some(missing)}. {end}")
    patterns = {_pattern(name) for name in model.state_dict()}
    if left_out := sorted(name for name in info["unexpected_keys"] if _pattern(name) in patterns):
        raise ValueError(f"The {role} {path!r} has weights of layers that its config leaves out: {_some(left_out)}. {end}")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not tensor.is_meta:
            least, most = torch.aminmax(tensor.detach())  # no temporary, and nan comes through
            if not (torch.isfinite(least) and torch.isfinite(most)):
                raise ValueError(f"The {role} {path!r} is broken: {name} holds nan or infinite values. Use another checkpoint.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _pattern(name: str) -> str:
    """A tensor's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)
