"""`hpd methods` in a terminal."""

from __future__ import annotations

from rich.table import Table

from hpd.methods.table import METHODS, name_terms
from hpd.terminal.console import console

__all__ = ["show_methods"]


def show_methods() -> None:
    """The table of METHODS."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("support", no_wrap=True)
    table.add_column("what it learns", overflow="fold")
    for name, method in METHODS.items():
        table.add_row(name, ", ".join(str(term.support) for term in name_terms(method.terms)), method.summary)
    console.print(table)
    console.print(
        "\nmethod: NAME in a recipe, or method=NAME on the command line; weights and sources: "
        "docs/methods.md",
        highlight=False,
    )
