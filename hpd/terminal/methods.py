"""`hpd methods` in a terminal.

What is shown comes from a file that `scripts/make_docs.py` writes from the table itself: building the table
takes torch, whose import takes seconds.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hpd.terminal.console import console

__all__ = ["FACTS", "show_method", "show_methods"]

FACTS = Path(__file__).with_name("methods.json")
"""By method: summary, weight, use, defaults, reference, context and terms."""


def show_methods() -> None:
    """The table of methods."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("support", no_wrap=True)
    table.add_column("what it learns", overflow="fold")
    for name, method in _facts().items():
        table.add_row(name, ", ".join(term["support"] for term in method["terms"]), escape(method["summary"]))
    console.print(table)
    console.print(
        "\nnext: [bold]hpd methods NAME[/] for parameters, weights and sources; method: NAME in a recipe, or "
        "method=NAME on the command line",
        highlight=False,
    )


def show_method(name: str) -> None:
    """One method: what it learns and when to choose it, its weight, parameters and source.

    Raises:
        ValueError: no such method.
    """
    methods = _facts()
    if name not in methods:
        from hpd.methods.fields import nearest  # both load torch
        from hpd.methods.names import new_name

        name = new_name(name)
    if name not in methods:
        raise ValueError(f"There is no method {name!r}. {nearest(name, list(methods))}")
    method = methods[name]
    console.print(f"[bold]{name}[/]: {escape(method['summary'])}\n", highlight=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for label, key in (
        ("choose it for", "use"),
        ("text from", "context"),
        ("weight", "weight"),
        ("defaults", "defaults"),
        ("source", "reference"),
    ):
        facts.add_row(label, Text(method[key]))
    console.print(facts)
    for number, term in enumerate(method["terms"], 1):
        _show_term(name, number if len(method["terms"]) > 1 else None, term)


def _show_term(name: str, number: int | None, term: dict[str, Any]) -> None:
    title = f"term {number}: " if number is not None else ""
    console.print(f"\n{title}objective {term['objective']} on support {term['support']}", highlight=False)
    if not term["parameters"]:
        console.print("no parameters", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("parameter", no_wrap=True, style="bold")
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for parameter in term["parameters"]:
        default = "(required)" if parameter["default"] is None else parameter["default"]
        table.add_row(parameter["name"], Text(default), Text(parameter["meaning"]))
    console.print(table)
    if number is None:
        first = term["parameters"][0]
        console.print(
            f"\nexample: hpd train recipe.yaml method={name} "
            f"method_kwargs.{first['name']}={shlex.quote(first['default'])}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _facts() -> dict[str, Any]:
    return json.loads(FACTS.read_text(encoding="utf-8"))
