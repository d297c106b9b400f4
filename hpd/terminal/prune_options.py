"""Options of `hpd prune`, as typer reads them.

Without `from __future__ import annotations`: typer needs the annotations themselves.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["PruneOptions"]

_FORMS = ("auto", "chat", "plain")


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The model, what stays of it, and the rows that decide."""

    model: Annotated[str, typer.Argument(help="Folder or Hub id of the whole model.", show_default=False)]
    data: Annotated[str, typer.Option(help="File, folder or Hub id of the rows.", show_default=False)]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for the cut model.", show_default=False)
    ]
    layers: Annotated[int | None, typer.Option(help="Layers that stay.", min=1)] = None
    intermediate: Annotated[
        float | None, typer.Option(help="Share of the columns of each MLP that stays, in (0, 1].")
    ] = None
    limit: Annotated[int, typer.Option(help="First n rows only.", min=1)] = 128
    max_length: Annotated[int, typer.Option(help="Tokens of a row that are read.", min=1)] = 512
    form: Annotated[
        str, typer.Option("--format", help="Of the rows, as data.format: auto, chat or plain.")
    ] = "auto"
    prompt_column: Annotated[str | None, typer.Option(help="Column of the prompts, if not recognized.")] = (
        None
    )
    completion_column: Annotated[str | None, typer.Option(help="Column of the completions.")] = None

    @property
    def columns(self) -> dict[str, str]:
        """As `data.columns`."""
        named = {"prompt": self.prompt_column, "completion": self.completion_column}
        return {role: name for role, name in named.items() if name is not None}

    def check(self) -> None:
        """Raise ValueError where the options ask for nothing, or for what there is not."""
        if self.layers is None and self.intermediate is None:
            raise ValueError(
                "Nothing is to be cut: give --layers, the number that stays, or --intermediate, a share."
            )
        if self.form not in _FORMS:
            raise ValueError(f"--format must be {', '.join(_FORMS)}, got {self.form!r}.")
