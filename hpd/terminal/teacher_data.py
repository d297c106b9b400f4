"""`hpd import` and the export of caches in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hpd.config.load import load_recipe
from hpd.progress import quiet_libraries
from hpd.teachers.foreign import (
    AxolotlFile,
    Compressor,
    DistillKitFile,
    TeacherFile,
    VllmFile,
)
from hpd.terminal.console import TerminalProgress, paragraph, show_next
from hpd.terminal.import_options import ImportOptions
from hpd.training.exporting import export_cache
from hpd.training.importing import import_cache

__all__ = ["run_export_cache", "run_import"]


def run_import(options: ImportOptions) -> None:
    """Write a cache for a recipe's rows from a file of others, and say what was found."""
    quiet_libraries()
    recipe = load_recipe(options.recipe, options.overrides or ())
    file = _open(options)
    summary = import_cache(
        recipe,
        file,
        guesses_labels=options.guess_labels,
        rows_path=options.rows,
        overwrite=options.overwrite,
        progress=TerminalProgress(),
    )
    paragraph(
        f"{summary.path}: {summary.matched:,} of {summary.rows:,} rows found, {summary.positions:,} label "
        "positions"
    )
    if summary.unmatched:
        paragraph(f"not found: {summary.rows - summary.matched:,} rows. {summary.unmatched}")
    paragraph(
        "mass outside the k tokens: not told, the file divides the k by their sum"
        if file.scaled
        else f"mass outside the k tokens: {summary.mass_outside:.2%} on average, spread evenly there"
    )
    if summary.places_short:
        paragraph(
            f"positions with fewer tokens than others in the file: {summary.places_short:,}; those that are "
            "missing take an even share of the mass outside"
        )
    if summary.labels_outside:
        share = summary.labels_outside / summary.positions
        rule = (
            "take an even share of the mass outside"
            if options.guess_labels
            else "cannot be read by methods that read the label, which hpd train refuses (with "
            "--guess-labels they take an even share of the mass outside)"
        )
        paragraph(
            f"labels that are none of the k tokens: {summary.labels_outside:,} ({share:.2%}); they {rule}"
        )
    given = [word for word in options.overrides or () if not word.startswith("cache")]
    words = [*map(shlex.quote, given), "teacher.type=cached"]
    words.append(f"teacher.path={shlex.quote(str(summary.path))}")
    if summary.unmatched and options.rows is None:
        paragraph(
            "hpd train needs every row: write those that were found with --rows FILE, and train on them"
        )
    elif summary.unmatched:
        words.append(f"data.path={shlex.quote(str(options.rows))}")
    show_next(f"hpd train {shlex.quote(str(options.recipe))} {' '.join(words)}")


def _open(options: ImportOptions) -> TeacherFile:
    if options.format == "distillkit":
        config = None if options.compressor is None else Compressor.read(options.compressor)
        return DistillKitFile(options.source, config)
    if options.format == "axolotl":
        return AxolotlFile(options.source, cast(Any, options.about), options.temperature)
    return VllmFile(options.source)


def run_export_cache(path: Path, overrides: Sequence[str], form: str, output: Path) -> None:
    """Write a recipe's cached rows as others read them."""
    quiet_libraries()
    summary = export_cache(load_recipe(path, overrides), form, output, TerminalProgress())
    paragraph(f"{summary.path}: {summary.rows:,} rows, {summary.positions:,} label positions, as {form}")
    if summary.left_out:
        paragraph(
            f"left out: {summary.left_out:,} rows whose labels are not one run to the row's end, which this "
            "format cannot say"
        )
    if summary.labels_lost:
        paragraph(
            f"{summary.labels_lost:,} labels are none of the k tokens: their log-probabilities have no place "
            "in this format"
        )
