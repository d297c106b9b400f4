"""Datasets on disk: every format, and every mistake as one sentence."""

import gzip
import json

import pytest
from datasets import Dataset
from tiny_models import tiny_pair
from transformers import AutoTokenizer

from hpd.config import DataConfig
from hpd.data import load_rows, measure

ROWS = [{"question": f"what is {i}?", "answer": f"it is {i}", "id": i} for i in range(10)]
COLUMNS = {"prompt": "question", "completion": "answer"}


def write(path, rows=ROWS):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def config(path, **options):
    return DataConfig(**{"path": str(path), "columns": COLUMNS, **options})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines(tmp_path, name):
    rows = load_rows(config(write(tmp_path / name)))
    assert len(rows.train) == 10
    assert rows.train[3] == {"prompt": "what is 3?", "completion": "it is 3"}
    assert not rows.conversational


def test_csv_and_parquet_and_json_and_folder(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_csv(str(tmp_path / "rows.csv"))
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    for name in ("rows.csv", "rows.parquet", "rows.json"):
        assert load_rows(config(tmp_path / name)).train[0]["completion"] == "it is 0", name
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS[:4])
    write(folder / "b.jsonl", ROWS[4:])
    assert len(load_rows(config(folder)).train) == 10


def test_chat_wraps_text_into_messages_with_a_system_prompt(tmp_path):
    rows = load_rows(config(write(tmp_path / "r.jsonl"), format="chat", system_prompt="be brief"))
    assert rows.conversational
    assert rows.train[0]["prompt"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is 0?"},
    ]
    assert rows.train[0]["completion"] == [{"role": "assistant", "content": "it is 0"}]


def test_last_turn_splits_a_conversation(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    rows = load_rows(DataConfig(path=str(write(tmp_path / "r.jsonl", [{"messages": turns}])), labels="last_turn"))
    assert [m["content"] for m in rows.train[0]["prompt"]] == ["a", "b", "c"]
    assert [m["content"] for m in rows.train[0]["completion"]] == ["d"]


def test_validation_by_share_file_and_limit(tmp_path):
    file, other = write(tmp_path / "r.jsonl"), write(tmp_path / "v.jsonl", ROWS[:3])
    shared = load_rows(config(file, validation=0.2))
    assert (len(shared.train), len(shared.validation)) == (8, 2)
    assert not {r["prompt"] for r in shared.train} & {r["prompt"] for r in shared.validation}
    given = load_rows(config(file, validation=str(other), limit=5))
    assert (len(given.train), len(given.validation)) == (5, 3)


def test_streaming_reads_lazily(tmp_path):
    rows = load_rows(config(write(tmp_path / "r.jsonl"), streaming=True))
    assert not hasattr(rows.train, "__len__")
    assert next(iter(rows.train))["prompt"] == "what is 0?"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"columns": {}}, "columns question, answer, id.*map them"),
        (ROWS, {"columns": {"prompt": "q", "completion": "answer"}}, "maps prompt to 'q', which the dataset does not have"),
        ([{"question": "a", "answer": ""}], {}, "Row 0 has an empty completion"),
        ([{"question": "only"}], {"columns": {"prompt": "question"}}, "Training needs prompt and completion"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            {"columns": {}, "labels": "last_turn"},
            "empty prompt|no answer to learn",
        ),
    ],
)
def test_rows_that_cannot_be_learnt_from(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_rows(config(write(tmp_path / "r.jsonl", rows), **options))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No dataset at"):
        load_rows(config(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_rows(config(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(config(tmp_path / "broken.jsonl"))
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match="give a .jsonl"):
        load_rows(config(tmp_path / "rows.txt"))


def test_measure_sees_what_training_will(tmp_path):
    student, _ = tiny_pair("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = load_rows(config(write(tmp_path / "r.jsonl"))).train
    lengths = measure(rows, tokenizer, 512, "completion")
    completion = len(tokenizer("what is 3?it is 3" + tokenizer.eos_token)["input_ids"]) - len(
        tokenizer("what is 3?")["input_ids"]
    )
    assert lengths.num_rows == 10
    assert lengths.label_tokens == pytest.approx(completion, abs=1.0)
    assert lengths.ends_with_eos == 1.0
    assert lengths.cut_rows == 0.0
    with pytest.raises(ValueError, match="Every label is masked.*max_length=2"):
        measure(rows, tokenizer, 2, "completion")


def test_measure_counts_the_labels_that_training_keeps(tmp_path):
    student, _ = tiny_pair("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(student)
    turns = [{"role": "user", "content": "say one two"}, {"role": "assistant", "content": "one two"}]
    rows = load_rows(DataConfig(path=str(write(tmp_path / "r.jsonl", [{"messages": turns}])), labels="assistant")).train
    everything = measure(rows, tokenizer, 512, "completion").label_tokens
    assistant = measure(rows, tokenizer, 512, "assistant").label_tokens
    assert 0 < assistant < everything
    assert assistant == len(tokenizer("one two<|im_end|>", add_special_tokens=False)["input_ids"])
