"""`hpd export` in a terminal: of a model, or of a cache."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpd.config.models import ModelConfig
from hpd.models.export import write_merged
from hpd.progress import quiet_libraries
from hpd.terminal.console import console, show_next
from hpd.terminal.teacher_data import run_export_cache

__all__ = ["run_export"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def run_export(
    model: str, merges: bool, output: Path, dtype: Any, form: str | None = None, overrides: Sequence[str] = ()
) -> None:
    """Write a whole model from the adapter of a run folder, or a recipe's cached rows as `form`, and say
    where."""
    if form is not None:
        if merges or dtype != "auto":
            raise ValueError("--merge and --dtype are for models, and --format is for caches: remove one.")
        run_export_cache(Path(model), overrides, form, output)
        return
    if overrides:
        raise ValueError(
            f"{overrides[0]!r} is a recipe's value, and a run folder has its recipe: give --format and a "
            "recipe to export a cache, or remove it."
        )
    if not merges:
        raise ValueError(
            "hpd export writes an adapter merged into its base (--merge; a run without lora is a whole model "
            "already), or a recipe's cached teacher (--format)."
        )
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {', '.join(_DTYPES)}, got {dtype!r}.")
    quiet_libraries()
    written = write_merged(ModelConfig(model=model), output, dtype)
    console.print(f"{model} merged into its base: {output} ({written})", highlight=False, markup=False)
    folder = shlex.quote(str(output))
    show_next(f"hpd chat {folder}", f"hpd eval {folder} --data test.jsonl")
