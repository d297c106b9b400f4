"""Identities of models, tokenizers and files: everything that says whether two of them are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import xxhash
from torch import nn
from transformers import PreTrainedTokenizerBase

from hpd.config.models import ModelConfig, TeacherConfig
from hpd.files import checksum_file, checksum_json, digest_json
from hpd.models.adapters import find_adapter
from hpd.models.load import load_config
from hpd.teachers.cache import read_about

__all__ = [
    "behind_cache",
    "differences",
    "model_fingerprint",
    "own_prompt",
    "quick_fingerprint",
    "teacher_fingerprint",
    "tokenizer_fingerprint",
    "tokenizer_hash",
]

_WEIGHTS = ("*.safetensors", "*.bin")
_ADAPTER = "adapter_config.json"
_READ_BY_MODELS = (*_WEIGHTS, "*.json", "*.jinja", "*.model")
_VALUES_PER_TENSOR = 4096


def teacher_fingerprint(source: ModelConfig | TeacherConfig) -> dict[str, Any]:
    """Digests of a model's files (configuration and weights), and how they are loaded.

    A Hub model is fetched first if it is not here; it is needed anyway.
    """
    if isinstance(source, TeacherConfig) and source.teachers:
        parts = {name: teacher_fingerprint(part) for name, part in source.teachers.items()}
        return {"type": source.type, "weights": dict(source.weights), "teachers": parts}
    if isinstance(source, TeacherConfig) and source.type == "cached":
        return {"cache": checksum_json(read_about(str(source.path)))}
    model = str(source.model)
    if (adapter := find_adapter(source, "model")) is not None:
        files = [path for pattern in (_ADAPTER, *_WEIGHTS) for path in sorted(adapter.folder.glob(pattern))]
        return {**teacher_fingerprint(adapter.base), "adapter": _checksum(files)}
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(
            huggingface_hub.snapshot_download(
                model, revision=source.revision, allow_patterns=[*_WEIGHTS, "config.json"]
            )
        )
    files = [folder / "config.json", *sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))]
    return {
        "weights": _checksum(files),
        "dtype": source.dtype,
        "quantization": getattr(source, "quantization", None),
    }


def behind_cache(teacher: TeacherConfig) -> dict[str, Any]:
    """What a cache that is written from another one takes over from it; empty for other teachers.

    Returns:
        `fingerprint`: name and fingerprint of the teacher that the first was written with, whose answers both
        hold, and the digest of the cache that was read. `labels_outside` of an imported one.
    """
    if teacher.type != "cached":
        return {}
    about = read_about(str(teacher.path))
    first = {name: about["fingerprint"][name] for name in ("name", "teacher")}
    outside = {name: about[name] for name in ("labels_outside",) if name in about}
    return {"fingerprint": {**first, **teacher_fingerprint(teacher)}, **outside}


def _checksum(files: Sequence[Path]) -> str:
    state = xxhash.xxh3_128()
    for file in files:
        state.update(f"{file.name}:{checksum_file(file)};".encode())
    return state.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, args: Any) -> dict[str, Any]:
    """Digests of all that turns text into tokens: the tokenizer, the chat template and the cut.

    Args:
        tokenizer: the one that tokenizes the rows (the student's).
        args: `DistillConfig`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation are settings of the last call, not of the tokenizer.
    tokens = (
        {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
        if backend
        else None
    )
    specials = [tokenizer.bos_token, args.eos_token or tokenizer.eos_token]
    template = [tokenizer.chat_template, args.chat_template_path and _content(args.chat_template_path)]
    return {
        "tokenizer": checksum_json(
            [tokens or sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), specials]
        ),
        "chat template": checksum_json(template),
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
    }


def own_prompt(teacher: TeacherConfig) -> dict[str, Any]:
    """The prompt and the system text that a teacher reads instead of the student's; empty without them."""
    if not teacher.reads_own_rows:
        return {}
    return {"teacher's prompt": [teacher.prompt, teacher.system_prompt]}


def _content(path: str) -> str:
    file = Path(path)
    file = file / "chat_template.jinja" if file.is_dir() else file
    return file.read_text(encoding="utf-8") if file.is_file() else path


def differences(cached: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One phrase for each entry of `here` that the cache was not written with."""
    found = []
    for name, value in here.items():
        if cached.get(name) != value:
            short = isinstance(value, (int, type(None))) or name == "truncation_mode"
            found.append(f"{name} ({cached.get(name)} in the cache, {value} here)" if short else name)
    return found


def model_fingerprint(model: nn.Module) -> str:
    """32 hex digits from the configuration and the parameters: names, shapes, dtypes and 4,096 evenly spaced
    values of each.

    Values are sampled, because hashing all of a large model takes as long as loading it; training moves all
    of them.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        # Where the weights came from and who loaded them does not change what the model computes.
        facts = {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("_name_or_path", "transformers_version", "use_cache")
        }
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        step = max(1, len(flat) // _VALUES_PER_TENSOR)
        digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """32 hex digits from the token map, the end token and the chat template."""
    facts = {"vocab": tokenizer.get_vocab(), "eos": tokenizer.eos_token, "template": tokenizer.chat_template}
    return digest_json(facts, ensure_ascii=False)[:32]


def quick_fingerprint(model: str, dtype: str) -> str:
    """16 hex digits that change with a model's weights, without reading them: sizes and times of a folder's
    files, the commit of a Hub model."""
    folder = Path(model)
    adapter = find_adapter(ModelConfig(model=model), "model")
    if adapter is not None:
        folder = adapter.folder
    if folder.is_dir():
        files = sorted(path for pattern in _READ_BY_MODELS for path in folder.glob(pattern))
        # evals.json is written by the evaluation itself.
        facts: Any = [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
            if path.name != "evals.json"
        ]
    else:
        facts = getattr(load_config(ModelConfig(model=model), "model"), "_commit_hash", None)
    if adapter is not None:
        facts.append(quick_fingerprint(str(adapter.base.model), dtype))
    return digest_json([facts, dtype])[:16]
