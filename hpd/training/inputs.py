"""Fingerprints of what a run reads: rows, tokenizer, and the models whose weights stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset

from hpd.config.models import ModelConfig, TeacherConfig
from hpd.files import checksum_json, checksum_samples
from hpd.models.adapters import find_adapter
from hpd.teachers.cache import read_about
from hpd.teachers.fingerprints import tokenizer_fingerprint
from hpd.teachers.sources import described_by
from hpd.training.plan import Plan

__all__ = ["changed_inputs", "input_fingerprints"]

_ROWS_AT_ONCE = 1000
_WEIGHTS = ("*.safetensors", "*.bin")


def input_fingerprints(planned: Plan) -> dict[str, str]:
    """A digest of each input of a run, by the name that messages give it; no weights are loaded.

    Files of weights are sampled: their sizes, headers and blocks all over them, which any training moves.
    Left out are streams, served teachers (`RunFolder.keep_teacher`), and a student all of whose weights come
    from the checkpoint.
    """
    recipe, found = planned.recipe, {}
    for name, rows in (("training rows", planned.rows.train), ("validation rows", planned.rows.validation)):
        if isinstance(rows, Dataset):
            found[name] = _rows_digest(rows)
    tokens = tokenizer_fingerprint(planned.tokenizer, planned.args)
    found |= {name: tokens[name] for name in ("tokenizer", "chat template")}
    if recipe.teacher.type != "server":
        for role, source in described_by(recipe).items():
            is_self = source is recipe.student
            found["student" if is_self else role] = _model_digest(source, planned.teacher_configs[role])
    if recipe.lora is not None:
        found["student"] = _model_digest(recipe.student, planned.student_config)
    return found


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Names of the inputs that are not what they were; those that only one side has are not compared."""
    return [name for name, digest in now.items() if before.get(name, digest) != digest]


def _rows_digest(rows: Dataset) -> str:
    state = xxhash.xxh3_128()
    for columns in rows.iter(batch_size=_ROWS_AT_ONCE):
        # What JSON lacks counts by its type: an object's text may hold its address.
        text = json.dumps(columns, sort_keys=True, default=lambda value: type(value).__name__)
        state.update(text.encode())
    return state.hexdigest()


def _model_digest(source: ModelConfig | TeacherConfig, config: Any) -> str:
    if isinstance(source, TeacherConfig) and source.type == "cached":
        return checksum_json(read_about(str(source.path)))
    if (adapter := find_adapter(source, "model")) is not None:
        files = [adapter.folder / "adapter_config.json", *_weights(adapter.folder)]
        return checksum_json([_model_digest(adapter.base, config), *map(checksum_samples, files)])
    folder = Path(str(source.model))
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    return checksum_json([checksum_samples(file) for file in [folder / "config.json", *_weights(folder)]])


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
