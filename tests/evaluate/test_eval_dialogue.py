"""ROUGE-L tasks: the protocol's prompt, its score against an independent one, and the public files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.evaluate import evaluate
from hpd.evaluate.benchmarks.dialogue import alpaca_prompt, dolly, rouge_l, self_instruct, sni, vicuna
from hpd.evaluate.benchmarks.rows import read_rows
from hpd.evaluate.task import Task
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Answer

ROWS = [
    {"instruction": "Name a color.", "input": "", "output": "Red is a color."},
    {"instruction": "Add.", "input": "1 and 2", "output": ["three", "3"]},
]


def _file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _lcs_f1(text: str, reference: str) -> float:
    """ROUGE-L without stemming, by the recursion of its definition."""
    a, b = (re.findall(r"[a-z0-9]+", side.lower()) for side in (text, reference))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def test_rouge_l_equals_its_definition_and_takes_the_best_reference() -> None:
    texts = ["the red cat sat on a mat", "one two", "", "the the the"]
    references = [["a red cat sat", "the cat on the mat"], ["two one", "three"], ["one"], ["the a the"]]
    for score, text, given in zip(rouge_l(texts, references), texts, references, strict=True):
        assert score == pytest.approx(max(_lcs_f1(text, reference) for reference in given))


def test_words_are_stemmed() -> None:
    assert rouge_l(["running dogs"], [["run dog"]]) == [1.0]


def test_tasks(tmp_path: Path) -> None:
    task = sni(_file(tmp_path, ROWS))
    assert isinstance(task, Task)
    json.dumps(dict(task.options))
    assert task.metric == "rouge_l"
    assert GenerationSettings(**task.defaults).num_samples == 5
    first, second = task.examples()
    assert second.prompt == alpaca_prompt("Add.", "1 and 2")
    assert "### Input:" not in first.prompt
    verdicts = task.grade([first, second], [Answer(text="  red is a color\n"), Answer(text="3")])
    assert [verdict.value for verdict in verdicts] == [1.0, 1.0]
    assert {verdict.correct for verdict in verdicts} == {None}
    chat = dolly(_file(tmp_path, ROWS), template="chat", limit=2)
    assert [example.prompt for example in chat.examples()] == ["Name a color.", "Add.\n\n1 and 2"]
    assert chat.defaults["chat_template"] == "auto"


def test_thoughts_are_no_part_of_an_answer(tmp_path: Path) -> None:
    task = dolly(_file(tmp_path, ROWS), limit=1)
    (example,) = task.examples()
    texts = ["<think>Blue? No, a color.</think>Red is a color.", "<think>Red is a color."]
    closed, unclosed = task.grade([example] * 2, [Answer(text=text) for text in texts])
    assert (closed.value, closed.detail) == (1.0, "")
    assert (unclosed.value, unclosed.detail) == (0.0, "thoughts that never end: the answer is empty")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"instruction": "x", "input": "", "output": ""}], {}, "row 1 has no output"),
        ([ROWS[0], {"output": "x"}], {}, "row 2 has no instruction"),
        (ROWS, {"template": "plain"}, "must be alpaca or chat"),
    ],
)
def test_errors(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicuna(_file(tmp_path, rows), **options)


def test_the_protocol_on_a_tiny_model(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    task = dolly(_file(tmp_path, ROWS))
    settings = GenerationSettings(**{**task.defaults, "max_new_tokens": 6, "num_samples": 3})
    result = evaluate(model, tokenizer, task, settings, output_dir=tmp_path / "run")
    assert (result.metric, result.num_examples, result.num_samples, len(result.records)) == (
        "rouge_l",
        2,
        3,
        6,
    )
    assert result.figures["std_over_samples"] >= 0
    assert len({record.text for record in result.records}) > 2
    (entry,) = json.loads((tmp_path / "run" / "evals.json").read_text())
    assert entry["rouge_l"] == result.value


@pytest.mark.parametrize(
    ("factory", "file", "count"),
    [
        (dolly, "dolly/test_even.jsonl", 250),
        (self_instruct, "self_instruct/user_oriented_even.jsonl", 126),
        (vicuna, "vicuna/minillm_valid.jsonl", 80),
        (sni, "sni/test_len11plus.jsonl.gz", 1694),
    ],
)
def test_public_files(shared: Path, factory: Any, file: str, count: int) -> None:
    path = shared / "data" / file
    examples = factory(path).examples()
    assert len(examples) == count
    assert len({example.id for example in examples}) == count
    assert all(example.metadata["references"] for example in examples)
    given = [row.get("prompt") for row in read_rows(path)]
    if given[0] is not None:  # MiniLLM's files bring the prompt: ours must be the same, letter for letter
        assert [example.prompt for example in examples] == given
