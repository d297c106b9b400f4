"""`hpd export` in a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hpd.config.models import ModelConfig
from hpd.models.export import write_merged
from hpd.progress import quiet_libraries
from hpd.terminal.console import console, show_next

__all__ = ["run_export"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def run_export(model: str, merges: bool, output: Path, dtype: Any) -> None:
    """Write a whole model from the adapter of a run folder, and say where."""
    if not merges:
        raise ValueError(
            "hpd export writes one form: an adapter merged into its base. Give --merge; a run without lora "
            "is a whole model already."
        )
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {', '.join(_DTYPES)}, got {dtype!r}.")
    quiet_libraries()
    written = write_merged(ModelConfig(model=model), output, dtype)
    console.print(f"{model} merged into its base: {output} ({written})", highlight=False, markup=False)
    folder = shlex.quote(str(output))
    show_next(f"hpd chat {folder}", f"hpd eval {folder} --data test.jsonl")
