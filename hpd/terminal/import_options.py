"""The options of `hpd import`; nothing here loads torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ImportOptions"]

_FORMATS = ("distillkit", "axolotl", "vllm")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What `hpd import` is told."""

    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
    source: Annotated[
        str, typer.Argument(help="File, folder or Hub id of the teacher data.", show_default=False)
    ]
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[A.B=C]...", help="Values that replace the recipe's, such as train.max_steps=50."
        ),
    ] = None
    format: Annotated[str, typer.Option(help="distillkit, axolotl or vllm.", show_default=False)]
    compressor: Annotated[
        Path | None,
        typer.Option(help="DistillKit's compression_config.yaml, where it is not next to the rows."),
    ] = None
    about: Annotated[
        str | None,
        typer.Option(
            help="axolotl: a token's targets are about this token or the next; default: as the masks tell."
        ),
    ] = None
    temperature: Annotated[
        float,
        typer.Option(help="axolotl: the kd_temperature that the targets were softened by, which is undone."),
    ] = 1.0
    guess_labels: Annotated[
        bool,
        typer.Option(
            "--guess-labels",
            help="Labels that are none of the file's tokens take an even share of the mass outside.",
        ),
    ] = False
    rows: Annotated[
        Path | None, typer.Option(help="Also write the rows that were found, for data.path (JSON Lines).")
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete another cache in cache.path, and --rows, first.")
    ] = False

    def check(self) -> None:
        """Raise ValueError where an option is wrong, or has no effect on the format."""
        if self.format not in _FORMATS:
            raise ValueError(f"--format must be {', '.join(_FORMATS)}, got {self.format!r}.")
        for name, value, form in (
            ("compressor", self.compressor, "distillkit"),
            ("about", self.about, "axolotl"),
            ("temperature", None if self.temperature == 1.0 else self.temperature, "axolotl"),
        ):
            if value is not None and self.format != form:
                raise ValueError(
                    f"--{name} is for --format {form}, and the format is {self.format}: remove it."
                )
        if self.about not in (None, "this", "next"):
            raise ValueError(f"--about must be this or next, got {self.about!r}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be a number above 0, got {self.temperature}.")
        if self.rows is not None and self.rows.exists() and not self.overwrite:
            raise ValueError(f"{self.rows} exists: --overwrite replaces it.")
