"""Write docs/reference/recipe.md and recipe.schema.json from a recipe's dataclasses, or --check them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from hpd.config.schema import Recipe
from hpd.training.arguments import DistillConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reference/recipe.md"
SCHEMA = ROOT / "docs/reference/recipe.schema.json"

_HEAD = """# Recipe

Every key of a recipe, its values and its default. `python scripts/make_reference.py` writes this page from
the dataclasses in `hpd/config` and `hpd/methods`.

    hpd init recipe.yaml        # a first recipe, with comments

Every key can be replaced on the command line: `hpd train recipe.yaml data.limit=100 train.max_steps=50`;
a section as a whole (`data=other.jsonl`) replaces the recipe's, with a warning where that takes other keys.
Keys that are not listed are errors. `hpd train recipe.yaml --dry-run > resolved.yaml` writes every key with
its value.

Editors that read YAML schemas complete and check recipes with [recipe.schema.json](recipe.schema.json):

```yaml
# yaml-language-server: $schema=docs/reference/recipe.schema.json
```
"""
_TRAIN = """
## train

Any field of TRL's `SFTConfig`, and with it of transformers' `TrainingArguments`, that has an effect here
([compatibility](../compatibility.md) lists those that are refused). `hpd` adds or changes:

| key | default | meaning |
|---|---|---|
"""


def sections() -> dict[type, str]:
    """Every dataclass of a recipe, by the first place where it stands."""
    found: dict[type, str] = {Recipe: ""}
    waiting: list[type] = [Recipe]
    while waiting:
        section = waiting.pop(0)
        for field, hint in get_type_hints(section).items():
            for inner, mark in _inside(hint, ""):
                if inner not in found:
                    found[inner] = f"{found[section]}.{field}{mark}".lstrip(".")
                    waiting.append(inner)
    return found


def _inside(hint: Any, mark: str) -> Iterator[tuple[type, str]]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint, mark
        return
    origin = get_origin(hint)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        mark = f"{mark}.NAME"
    elif origin in (list, tuple):
        mark = f"{mark}[]"
    for argument in get_args(hint):
        yield from _inside(argument, mark)


def documented(section: type) -> dict[str, str]:
    """The text below each field of a dataclass, in one line; those of its bases too."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                value = getattr(text.value, "value", None)
                if isinstance(field.target, ast.Name) and isinstance(value, str):
                    found[field.target.id] = " ".join(value.split())
    return found


def page() -> str:
    """The whole page."""
    places = sections()
    parts = [_HEAD]
    for section, place in places.items():
        title = place or "The whole"
        texts, hints = documented(section), get_type_hints(section)
        summary = " ".join((inspect.getdoc(section) or "").partition("\n\n")[0].split())
        rows = [
            f"| `{field.name}` | {_cell(_words(hints[field.name], places))} | {_default(field)} "
            f"| {_cell(texts[field.name])} |"
            for field in dataclasses.fields(section)
        ]
        table = "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"\n## {title}\n\n{_cell(summary)}\n\n{table}\n")
        if section is Recipe:
            parts.append(_train())
    return "".join([*parts, "\nNext: [methods](../methods.md)\n"])


def _train() -> str:
    own = [f for f in dataclasses.fields(DistillConfig) if f.init and f.name in DistillConfig.__annotations__]
    rows = [f"| `{f.name}` | {_default(f)} | {_cell(f.metadata['help'])} |" for f in own]
    return _TRAIN + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default
    if value is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        value = field.default_factory()
    plain = TypeAdapter(type(value)).dump_python(value, mode="json")
    if isinstance(plain, dict):
        plain = {k: v for k, v in plain.items() if v is not None}
        return "its own defaults" if len(plain) > 2 else f"`{json.dumps(plain)}`"
    return f"`{json.dumps(plain)}`"


def _words(hint: Any, places: Mapping[type, str]) -> str:
    """A type, in the words of a recipe."""
    names: dict[Any, str] = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        type(None): "null",
        Any: "any value",
    }
    if hint in names:
        return names[hint]
    if hint in places:
        return f"section [{places[hint]}](#{_anchor(places[hint])})"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(a) if a is None else a}`" for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(argument, places) for argument in arguments))
    if origin in (list, tuple):
        return f"list of {_words(arguments[0], places)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of names to {_words(arguments[1], places)}"
    return f"`{typing.get_type_hints(hint) if not isinstance(hint, type) else hint.__name__}`"


def _anchor(place: str) -> str:
    return "".join(c for c in place.lower() if c.isalnum() or c in "-_")


def schema() -> str:
    """The JSON schema, with the fields' texts."""
    tree = TypeAdapter(Recipe).json_schema()
    tree["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section in sections():
        part = tree if section is Recipe else tree["$defs"][section.__name__]
        for name, text in documented(section).items():
            part["properties"][name]["description"] = text
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Exit with 1 where a file differs.")
    check = parser.parse_args(arguments).check
    for path, text in ((PAGE, page()), (SCHEMA, schema())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is out of date: run python scripts/make_reference.py")


if __name__ == "__main__":
    main()
