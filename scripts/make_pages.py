"""Write docs/reference/cli.md from the commands, tasks.md from TASKS and matrix.md from the checks of methods
and teachers, or --check them."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from hpd.cli import app
from hpd.config.load import load_recipe
from hpd.evaluate.tasks import PRESETS, TASKS, TaskEntry
from hpd.files import import_named
from hpd.methods import METHODS
from hpd.methods.byte_forms import methods_with_byte_forms
from hpd.teachers.remote.server import why_not_served

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ROOT / "docs/reference/cli.md"
TASK_PAGE = ROOT / "docs/reference/tasks.md"
MATRIX = ROOT / "docs/reference/matrix.md"

_COMMANDS_HEAD = """# Commands

Every command with its arguments, options and defaults.

    hpd --help          # every command
    hpd train --help    # the options of one

`A.B=C` behind a recipe replaces one of its values, `train.max_steps=50`; [the recipe's keys](recipe.md) are
the names. Results go to standard output. [Exit codes](exit-codes.md) say how a command ended, and
[What a terminal shows](terminal.md) has recordings. `hpd --install-completion` sets up completion in your
shell. `python scripts/make_pages.py` writes this page from `hpd/cli.py`.
"""
_COMMANDS_TAIL = """
Next: [the keys of a recipe](recipe.md)
"""
_TASKS_HEAD = """# Tasks

Every benchmark that `hpd eval` and a recipe's `eval` know, where its problems are read from, and its options.

    hpd eval runs/mine --tasks gsm8k,math500 --data DIR

`--data DIR` looks below `DIR` for the files of the table, in their order. Without it the Hub's data set is
read; none of these downloads was made for this page. `-o NAME=VALUE` sets an option, and
[Evaluate](../guides/evaluate.md) says how answers are written and graded. `python scripts/make_pages.py`
writes this page from `TASKS`.

| task | file below `DIR` | on the Hub | options |
|---|---|---|---|
"""
_TASKS_TAIL = """
`module:factory` names [a task of your own](../guides/extend/task.md).

## Presets

`--preset NAME`, or `preset: NAME` in a recipe's `eval`: {presets}.
[Evaluate](answers.md#the-preset-paper) has their numbers.

Next: [evaluate a student](../guides/evaluate.md)
"""

_TOP_K = 20
_MATRIX_HEAD = f"""# Methods and teachers

Which kind of teacher serves which method: works, approximated, or refused when the recipe is read.

    hpd train recipe.yaml method=forward_kl teacher.type=cached teacher.path=cache --dry-run

`approximated` and `tail: uniform`: the {_TOP_K} likeliest tokens and the label are exact, and the other
tokens share the rest evenly; a server is refused without `teacher.tail: uniform`. A mixture serves what all
its teachers serve, and a routed teacher what each of them does. `bytes` is a model with another tokenizer
(`train.vocabulary: bytes`). Engines and their versions are in
[Compatibility](../compatibility.md#engines), what was not run in [one list](../evidence/not-run.md). `python
scripts/make_pages.py` writes this page from `METHODS` and from the checks that refuse a recipe.

| method | model | self | `hidden` cache | `top_k` cache | hpd's server | vLLM, SGLang | `bytes` |
|---|---|---|---|---|---|---|---|
"""
_MATRIX_TAIL = """
[Choose a teacher](../guides/teachers.md) says what each costs.

Next: [methods](../methods.md)
"""

_WORDS = {
    "str": "text",
    "int": "whole number",
    "integer": "whole number",
    "float": "number",
    "Path": "path",
    "list": "several",
}


def commands_page() -> str:
    """Every command with its arguments and options."""
    root: Any = get_command(app)
    sections = [_command(name, command) for name, command in root.commands.items()]
    return "\n".join([_COMMANDS_HEAD, *sections]).rstrip() + "\n" + _COMMANDS_TAIL


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([f"hpd {name}", *(["[OPTIONS]"] if options else []), *map(_place, arguments)])
    parts = [f"## hpd {name}", "", " ".join((command.help or "").split()), "", f"    {usage}", ""]
    example = re.match(r"Example: (.*)", command.epilog or "")
    if example is not None:
        parts += ["Example:", "", f"    {example[1]}", ""]
    parts += ["| argument or option | value | default | meaning |", "|---|---|---|---|"]
    parts += [_row(parameter) for parameter in [*arguments, *options]]
    return "\n".join([*parts, ""])


def _place(argument: Any) -> str:
    return (argument.metavar or argument.name.upper()).strip("{}")


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{_place(parameter)}`"
    else:
        name = ", ".join(f"`{form}`" for form in [*parameter.opts, *parameter.secondary_opts])
    is_switch = getattr(parameter, "is_flag", False)
    value = "" if is_switch else _value(parameter)
    return f"| {name} | {value} | {_default(parameter, is_switch)} | {_cell(parameter.help or '')} |"


def _value(parameter: Any) -> str:
    """What an option takes: its type, and the range of a number."""
    descriptor = getattr(parameter, "type_descriptor", None)  # typer before 0.2x: the type of click
    kind = descriptor.annotation.__name__ if descriptor is not None else parameter.type.name.split()[0]
    holder = parameter if descriptor is not None else parameter.type
    low, high = (None if (b := getattr(holder, key, None)) is None else f"{b:g}" for key in ("min", "max"))
    words = _WORDS.get(kind, kind)
    if low is None:
        return words
    return f"{words}, at least {low}" if high is None else f"{words}, {low} to {high}"


def _default(parameter: Any, is_switch: bool) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or callable(default) or default == () or default == "" or (is_switch and not default):
        return ""
    return "on" if is_switch else f"`{default}`"


def tasks_page() -> str:
    """Every task of `hpd eval`, where its problems are looked for, and its options."""
    rows = [_task(name, entry) for name, entry in TASKS.items()]
    presets = ", ".join(f"`{name}`" for name in PRESETS)
    return _TASKS_HEAD + "\n".join(rows) + "\n" + _TASKS_TAIL.replace("{presets}", presets)


def _task(name: str, entry: TaskEntry) -> str:
    factory = import_named(entry.factory)
    hidden = {"data", "limit", "limit_seed", "few_shot"}
    options = [key for key in inspect.signature(factory).parameters if key not in hidden]
    files = ", ".join(f"`{_cell(pattern)}`" for pattern in entry.files[:3]) or "your file"
    hub = f"`{entry.hub.path}`" if entry.hub is not None else ""
    return f"| `{name}` | {files} | {hub} | {', '.join(f'`{o}`' for o in options)} |"


def matrix_page() -> str:
    """What each kind of teacher can serve each method, as the checks of a recipe say it."""
    return _MATRIX_HEAD + "\n".join(map(_of_method, METHODS)) + "\n" + _MATRIX_TAIL


def _of_method(name: str) -> str:
    reasons = why_not_served(METHODS[name].terms, _TOP_K)
    known = "works" if not reasons else "approximated"
    served = "works" if not reasons else "`tail: uniform`"
    bytes_ = "works" if name in methods_with_byte_forms() else "refused"
    cells = [
        _accepted(name, {"type": "model", "model": "a"}),
        _accepted(name, {"type": "self"}),
        _accepted(name, {"type": "cached", "path": "cache"}),
        _accepted(name, {"type": "cached", "path": "cache"}, known),
        _accepted(name, {"type": "server", "url": "http://a", "protocol": "hpd"}),
        _accepted(
            name,
            {"type": "server", "url": "http://a", "protocol": "openai", "model": "a", "top_k": _TOP_K},
            served,
        ),
        bytes_,
    ]
    return f"| [`{name}`](../methods.md#{name}) | {' | '.join(cells)} |"


_REFUSALS = ("knows the dataset's rows only", "pairs the tokens of two vocabularies")
"""What the checks say where a teacher cannot serve a method."""


def _accepted(method: str, teacher: dict[str, Any], otherwise: str = "works") -> str:
    if METHODS[method].own_prompt:
        teacher = {**teacher, "prompt": "{prompt} {completion}"}
    try:
        load_recipe({"student": "a", "teacher": teacher, "data": "a.jsonl", "method": method})
    except ValueError as error:
        if not any(why in str(error) for why in _REFUSALS):
            raise  # the recipe above is wrong, and not the method
        return "refused"
    return otherwise


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Exit with 1 where a page differs.")
    check = parser.parse_args(arguments).check
    for path, text in ((COMMANDS, commands_page()), (TASK_PAGE, tasks_page()), (MATRIX, matrix_page())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is out of date: run python scripts/make_pages.py")


if __name__ == "__main__":
    main()
