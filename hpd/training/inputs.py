"""Fingerprints of what a run reads: rows, tokenizer, and the models whose weights stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset

from hpd.config.data import DataConfig
from hpd.config.models import ModelConfig, TeacherConfig
from hpd.config.schema import Recipe
from hpd.data.rows import Rows, validation_sets
from hpd.files import checksum_file, checksum_json, checksum_samples
from hpd.models.adapters import find_adapter
from hpd.teachers.cache import read_about
from hpd.teachers.fingerprints import tokenizer_fingerprint
from hpd.teachers.sources import described_by
from hpd.training.plan import Plan

__all__ = ["changed_inputs", "input_fingerprints", "row_fingerprints", "rows_digest", "stage_fingerprints"]

_ROWS_AT_ONCE = 1000
_WEIGHTS = ("*.safetensors", "*.bin")


def input_fingerprints(planned: Plan) -> dict[str, str]:
    """A digest of each input of a run, by the name that messages give it; no weights are loaded.

    Files of weights, and those of a stream, are sampled: their sizes, headers and blocks all over them, which
    any training moves. Left out are streams of the Hub, served teachers (`RunFolder.keep_teacher`), objects
    of your own, and the weights of a student that come from the checkpoint.
    """
    recipe = planned.recipe
    found = row_fingerprints(planned.rows, recipe.data)
    for entry in planned.evals:
        problems = [(example.prompt, example.answer) for example in entry.task.examples()]
        found[f"problems of {entry.label}"] = checksum_json(problems)
    tokens = tokenizer_fingerprint(planned.tokenizer, planned.args)
    found |= {name: tokens[name] for name in ("tokenizer", "chat template")}
    found["student's configuration"] = _configuration_digest(recipe.student, planned.student_config)
    if recipe.teacher.type not in ("server", "object"):
        for role, source in described_by(recipe).items():
            is_self = source is recipe.student
            found["student" if is_self else role] = _model_digest(source, planned.teacher_configs[role])
    if recipe.lora is not None:
        found["student"] = _model_digest(recipe.student, planned.student_config)
    return found


def row_fingerprints(rows: Rows, data: DataConfig) -> dict[str, str]:
    """The part of `input_fingerprints` that is about rows."""
    parts = [("training rows", data.path, rows.train)]
    for name, part in validation_sets(rows.validation).items():
        source: Any = data.validation[name] if isinstance(data.validation, Mapping) else data.validation
        parts.append((f"validation rows {name}".rstrip(), source, part))
    found = {}
    for name, source, part in parts:
        if isinstance(part, Dataset):
            found[name] = rows_digest(part)
        elif isinstance(source, str) and Path(source).exists():
            files = [path for path in (Path(source), *sorted(Path(source).rglob("*"))) if path.is_file()]
            found[name] = checksum_json([*map(checksum_samples, files)])
    return found


def stage_fingerprints(planned: Plan, stage: Recipe) -> dict[str, str]:
    """The part of `input_fingerprints` that a stage has before those in front of it have run.

    Args:
        planned: the stage, or what stands for it as long as its models are not there.
        stage: its recipe.
    """
    run = Path(stage.output_dir).parent
    made = {role for role, source in described_by(stage).items() if run in Path(str(source.model)).parents}
    return {
        name: digest
        for name, digest in input_fingerprints(planned).items()
        if "rows" in name or "problems" in name or (name.startswith("teacher") and name not in made)
    }


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Names of the inputs that are not what they were; those that only one side has are not compared."""
    return [name for name, digest in now.items() if before.get(name, digest) != digest]


def rows_digest(rows: Dataset) -> str:
    """A digest of rows: their columns and content, in their order."""
    state = xxhash.xxh3_128()
    for columns in rows.iter(batch_size=_ROWS_AT_ONCE):
        # What JSON lacks counts by its type: an object's text may hold its address.
        text = json.dumps(columns, sort_keys=True, default=lambda value: type(value).__name__)
        state.update(text.encode())
    return state.hexdigest()


def _configuration_digest(source: ModelConfig, config: Any) -> str:
    """Of a student whose weights come from the checkpoint: what the model is, and where it ends."""
    folder = Path(source.model)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    files = [folder / name for name in ("config.json", "adapter_config.json", "generation_config.json")]
    return checksum_json([checksum_file(file) if file.is_file() else None for file in files])


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
