"""Every malformed input ends with one paragraph and exit code 2, before training, and leaves nothing
behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from bad_input.case import Case
from bad_input.datasets import DATASETS, GENERATE, PROBLEMS
from bad_input.models import CHECKPOINTS, TOKENIZERS
from bad_input.recipes import RECIPES
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd.cli import app

GROUPS = {
    "recipe": RECIPES,
    "data": DATASETS,
    "tokenizer": TOKENIZERS,
    "checkpoint": CHECKPOINTS,
    "eval": PROBLEMS,
    "generate": GENERATE,
}
CORPUS = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A good recipe with everything that it names."""
    folder = tmp_path_factory.mktemp("bad")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "problems.jsonl").write_text('{"prompt": "add one", "answer": "two"}\n')
    recipe = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "max_length": 64,
            "gradient_checkpointing": False,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def arguments(case: Case, place: Path, folder: Path) -> list[str]:
    """The command line of a case; training would write to `run` in its folder."""
    names = {
        "{recipe}": place / "recipe.yaml",
        "{student}": place / "student",
        "{teacher}": place / "teacher",
        "{rows}": place / "rows.jsonl",
        "{problems}": place / "problems.jsonl",
    }
    given = case.build(folder)
    for name, path in names.items():
        given = [word.replace(name, str(path)) for word in given]
    if given[0] == "train" and not any(word.startswith("output_dir=") for word in given) and len(given) > 1:
        given.append(f"output_dir={folder / 'run'}")
    return given


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CORPUS)
def test_one_paragraph_and_nothing_left_behind(name, place, monkeypatch):
    case = CORPUS[name]
    folder = place / re.sub(r"\W+", "-", name)
    folder.mkdir()
    given = arguments(case, place, folder)
    before = contents(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("hpd.models.bounded._SECONDS", 1.0)  # of a template that never ends
    done = CliRunner().invoke(app, given, env={"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 2, done.output
    assert re.search(case.message, done.stderr, re.IGNORECASE), done.stderr
    *verdicts, paragraph = done.stderr.strip().splitlines()
    assert paragraph.startswith("error: "), done.stderr
    # A dry run says what fits before it says what does not: its recipe alone goes to standard output.
    assert not verdicts or "--dry-run" in given, done.stderr
    assert len(paragraph) < 1200
    assert contents(folder) == before


def test_the_corpus_is_large():
    assert len(CORPUS) >= 60
