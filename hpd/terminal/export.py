"""`hpd export` in a terminal: of a model, or of a cache."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpd.config.models import ModelConfig
from hpd.files import write_atomically
from hpd.models.export import write_merged
from hpd.progress import quiet_libraries
from hpd.terminal.console import paragraph, show_next
from hpd.terminal.teacher_data import run_export_cache
from hpd.training.hub import Push, model_files, opened, push_run, run_card

__all__ = ["run_cache_export", "run_export"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def run_export(
    model: str, merges: bool, output: Path | None, dtype: Any, push_to_hub: str | None, private: bool
) -> None:
    """Write a whole model from the adapter of a run folder, or push a run's student, or both."""
    _check(merges, output, dtype, push_to_hub, private)
    quiet_libraries()
    run, pushed = Path(model), None
    if push_to_hub is not None:
        asked = Push(push_to_hub, private or None)
        run_card(run, push_to_hub)  # what cannot be pushed is found before the Hub is asked
        if not merges:
            model_files(run, asked)
        pushed = opened(asked, "--push-to-hub")
    if merges:
        assert output is not None
        written = write_merged(ModelConfig(model=model), output, dtype)
        if (run / "summary.json").is_file():
            write_atomically(output / "README.md", run_card(run, output.name, merged=True))
        paragraph(f"{model} merged into its base: {output} ({written})")
    folder = run if output is None else output
    if pushed is not None:
        paragraph(f"pushing {folder} to the Hub as {pushed.repo}")
        address = push_run(folder, pushed, run_card(run, pushed.repo, merged=merges))
        paragraph(f"pushed to {address}")
    name = shlex.quote(str(folder) if pushed is None else pushed.repo)
    show_next(f"hpd chat {name}", f"hpd eval {name} --data test.jsonl")


def run_cache_export(
    recipe: str, output: Path | None, form: str | None, overrides: Sequence[str], of_models: Sequence[str]
) -> None:
    """Write a recipe's rows and their cached teacher as `form`.

    Args:
        of_models: options that were given and are for models.
    """
    if form is None:
        raise ValueError(
            f"{overrides[0]!r} is a recipe's value, and a run folder has its recipe: give --format and a "
            "recipe to export a cache, or remove it."
        )
    if of_models:
        raise ValueError(f"{of_models[0]} is for models, and --format is for caches: remove one.")
    if output is None:
        raise ValueError("--format needs --output, the folder that is written.")
    run_export_cache(Path(recipe), overrides, form, output)


def _check(merges: bool, output: Path | None, dtype: Any, push_to_hub: str | None, private: bool) -> None:
    """Refuse options that ask for nothing, or have no effect."""
    if not merges and push_to_hub is None:
        raise ValueError(
            "hpd export writes an adapter merged into its base (--merge --output DIR), pushes a run's "
            "student (--push-to-hub OWNER/NAME), or both: give one of them. A run without lora is a whole "
            "model already."
        )
    if merges != (output is not None):
        raise ValueError("--merge and --output go together: --merge --output DIR writes the merged model.")
    if not merges and dtype != "auto":
        raise ValueError("--dtype has an effect with --merge only: what is pushed is the run's own files.")
    if private and push_to_hub is None:
        raise ValueError("--private has an effect with --push-to-hub only.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be {', '.join(_DTYPES)}, got {dtype!r}.")
