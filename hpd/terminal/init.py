"""`hpd init`: a first recipe from five answers."""

from __future__ import annotations

import gzip
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from hpd.config.load import load_recipe
from hpd.config.yaml_file import parse_yaml
from hpd.files import write_atomically
from hpd.methods.fields import nearest
from hpd.methods.names import new_name
from hpd.methods.table import METHODS
from hpd.terminal.console import paragraph, show_next

__all__ = ["Answers", "recipe_text", "run_init"]

# Columns that are read without being named, and pairs that are a prompt and a completion in other words.
_KNOWN = {"prompt", "messages", "conversations", "text", "input_ids", "instruction", "problem"}
_OTHER_NAMES = (("question", "answer"), ("query", "response"), ("input", "output"))

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a recipe cannot do without, and what it is often asked for."""

    student: str
    teacher: str
    data: str
    method: str
    output_dir: str
    prompt_column: str | None = None
    completion_column: str | None = None


def _local_data(text: str) -> str:
    """A path of data that looks like a file's is one that is there."""
    looks_local = text.endswith(_SUFFIXES) or text.startswith((".", "/", "~"))
    if looks_local and not Path(text).expanduser().exists():
        raise ValueError(f"There is no file or folder {text}: give one that is there, or a Hub id.")
    return str(Path(text).expanduser()) if looks_local else text


def _known_method(text: str) -> str:
    text = new_name(text)
    if text not in METHODS:
        raise ValueError(f"There is no method {text!r}. {nearest(text, list(METHODS))}")
    return text


def _same(text: str) -> str:
    return text


# Field, question, default, check.
_QUESTIONS: tuple[tuple[str, str, str | None, Callable[[str], str]], ...] = (
    ("student", "Student, the model that learns (Hub id or folder)", None, _same),
    ("teacher", "Teacher, the model that it learns from (Hub id or folder)", None, _same),
    ("data", "Data (a .jsonl, .json, .csv or .parquet file, a folder, or a Hub id)", None, _local_data),
    (
        "method",
        "Method (hpd methods lists them; forward_kl is the one to start with)",
        "forward_kl",
        _known_method,
    ),
    ("output_dir", "Run folder", "runs/mine", _same),
)


def run_init(path: Path, given: Mapping[str, str | None], overwrite: bool) -> None:
    """Write a recipe from what was given, and from questions about the rest where there is a terminal.

    Raises:
        ValueError: the file exists, an answer is not valid, or something is missing and nobody can be asked.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: choose another file, or replace it with --overwrite.")
    answers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    missing = [name for name, _, default, _ in _QUESTIONS if name not in answers and default is None]
    if missing and not sys.stdin.isatty():
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"There is no terminal to ask in: give {options}.")
    for name, question, default, check in _QUESTIONS:
        if name in answers:
            answers[name] = check(answers[name])
        elif sys.stdin.isatty():
            answers[name] = typer.prompt(question, default=default, value_proc=_asking(check))
        else:
            answers[name] = default
    text = recipe_text(Answers(**answers), path)
    load_recipe(parse_yaml(text, str(path), "recipe", "student, teacher, data"))
    write_atomically(path, text)
    paragraph(f"{path} is written.")
    show_next(f"hpd doctor {shlex.quote(str(path))}")


def _asking(check: Callable[[str], str]) -> Callable[[str], str]:
    """A check whose mistakes are told before the question is asked again."""

    def convert(text: str) -> str:
        try:
            return check(text.strip())
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return convert


def recipe_text(answers: Answers, path: Path) -> str:
    """A recipe with a comment on each line that is likely to change."""
    columns = {"prompt": answers.prompt_column, "completion": answers.completion_column}
    named = {kind: column for kind, column in columns.items() if column is not None}
    named = named or _columns_of(answers.data)
    told = (
        f"  columns: {_written(named)}\n"
        if named
        else "  # columns: {prompt: question, completion: answer}   # where yours have other names\n"
    )
    # Of one size, the line would be an error without effect; of two, its absence is one.
    heads = _head_sizes(answers.student), _head_sizes(answers.teacher)
    differ = None not in heads and heads[0] != heads[1]
    return f"""\
# Written by hpd init. Check it with `hpd doctor {path}`, then `hpd train {path}`.
# Every key: docs/reference/recipe.md. Any value can be replaced on the command line, as train.max_steps=50.
student: {_written(answers.student)}   # the model that learns: a Hub id or a folder
teacher: {_written(answers.teacher)}   # the model that it learns from
method: {answers.method}   # `hpd methods` lists them, docs/start/which-method.md helps to choose
data:
  path: {_written(answers.data)}
{told}  validation: 0.05   # share of the rows that are held out, to measure on
train:   # any field of TRL's SFTConfig
  max_steps: 1000   # or num_train_epochs
  learning_rate: 1.0e-4   # matters more than the method: try a third and three times of it
  per_device_train_batch_size: 4   # hpd doctor {path} --memory 24GiB shows the largest that fits
  max_length: 1024   # tokens of a row; longer rows are cut
  logging_steps: 10
  {"" if differ else "# "}vocabulary: shared_prefix   # output heads of two sizes: both are cut to the shorter
# lora: {{r: 16}}   # train an adapter instead of all weights
# eval: {{data: test.jsonl, limit: 200}}   # questions and answers, before and after training
output_dir: {_written(answers.output_dir)}
"""


def _written(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000).strip()[1:-1]


def _columns_of(data: str) -> dict[str, str]:
    """Prompt and completion in a local JSON Lines file whose columns say so in other words."""
    if not data.endswith((".jsonl", ".jsonl.gz")) or not Path(data).is_file():
        return {}
    try:
        with (gzip.open if data.endswith(".gz") else open)(data, "rt", encoding="utf-8") as file:
            row = json.loads(next(file, "{}"))
    except (OSError, ValueError):  # hpd doctor says what is wrong with it
        return {}
    if not isinstance(row, dict) or row.keys() & _KNOWN:
        return {}
    found = [pair for pair in _OTHER_NAMES if row.keys() >= set(pair)]
    return dict(zip(("prompt", "completion"), found[0], strict=True)) if found else {}


def _head_sizes(model: str) -> int | None:
    """Rows of a local model's output head; None where its configuration is not here."""
    file = Path(model).expanduser() / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("text_config", config) if isinstance(config, dict) else {}
    return found.get("vocab_size")
