"""Places of rows: splits of folders, compressions, tables, and files that were replaced."""

from __future__ import annotations

import json
import os

import pyarrow
import pytest
from datasets import Dataset

from hpd.config import DataConfig, load_recipe
from hpd.data import load_prompts, load_rows

ROW = {"prompt": "say one: ", "completion": "one two"}
TEST = {"prompt": "TEST", "completion": "TEST"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(path, **options):
    return load_rows(DataConfig(path=str(path), **options))


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
    ],
)
def test_a_folder_is_read_by_split(tmp_path, names):
    for name, row in zip(names, (ROW, TEST), strict=True):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines(*[row] * 8))
    assert load(tmp_path / "set").train[:] == {name: [value] * 8 for name, value in ROW.items()}
    assert set(load(tmp_path / "set", split="test").train["prompt"]) == {"TEST"}
    held = load(tmp_path / "set", validation="test", split="train[:4]")
    assert (len(held.train), len(held.validation)) == (4, 8)
    assert len(load(tmp_path / "set", split="train+test").train) == 16
    assert set(next(iter(load(tmp_path / "set", streaming=True).train))) == {"prompt", "completion"}
    with pytest.raises(ValueError, match="has the splits train, test and no dev: set data.split"):
        load(tmp_path / "set", split="dev")


def test_parquet_shards_of_a_split(tmp_path):
    (tmp_path / "data").mkdir()
    for number, split, row in ((0, "train", ROW), (1, "train", ROW), (0, "test", TEST)):
        count = 2 if split == "train" else 1
        name = f"{split}-{number:05d}-of-{count:05d}.parquet"
        Dataset.from_list([row] * 3).to_parquet(str(tmp_path / "data" / name))
    assert load(tmp_path).train["prompt"][:] == [ROW["prompt"]] * 6


def test_the_card_of_a_downloaded_repository_names_configurations_and_splits(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n"
        "    path: a.jsonl\n  - split: test\n    path: b.jsonl\n- config_name: other\n  data_files: c.jsonl\n"
        "---\n# Rows\n"
    )
    for name, prompt in (("a", "of a"), ("b", "of b"), ("c", "of c")):
        (tmp_path / f"{name}.jsonl").write_text(lines({**ROW, "prompt": prompt}))
    assert load(tmp_path).train["prompt"][:] == ["of a"]
    assert load(tmp_path, split="test").train["prompt"][:] == ["of b"]
    assert load(tmp_path, name="other").train["prompt"][:] == ["of c"]
    with pytest.raises(ValueError, match="data.name is 'third'.*main, other"):
        load(tmp_path, name="third")


def test_a_column_of_one_file_is_null_in_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ROW))
    (tmp_path / "b.jsonl").write_text(lines({**ROW, "source": "web"}))
    rows = load(tmp_path)
    assert len(rows.train) == 2
    assert rows.layouts[0].unread == ("source",)


@pytest.mark.parametrize(
    "name", ["r.tsv", "r.csv", "semicolons.csv", "data.json", "r.jsonl.zst", "r.csv.zst"]
)
def test_tables_and_compressions(tmp_path, name):
    file = tmp_path / name
    text = {
        "r.tsv": "prompt\tcompletion\nsay, one: \tone; two\n",
        "r.csv": 'prompt,completion\n"say, one: ",one; two\n',
        "semicolons.csv": "prompt;completion\nsay, one: ;'one, two'\n",
        "data.json": json.dumps({"version": 1, "data": [{"prompt": "say, one: ", "completion": "one; two"}]}),
        "r.jsonl.zst": lines({"prompt": "say, one: ", "completion": "one; two"}),
        "r.csv.zst": 'prompt,completion\n"say, one: ",one; two\n',
    }[name]
    if name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(file), "zstd") as packed:
            packed.write(text.encode())
    else:
        file.write_text(text)
    answer = "'one, two'" if name == "semicolons.csv" else "one; two"
    assert load(file).train[0] == {"prompt": "say, one: ", "completion": answer}


def test_one_conversation_in_a_json_file_is_a_row(tmp_path):
    turns = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one"}]
    (tmp_path / "r.json").write_text(json.dumps({"messages": turns}))
    assert load(tmp_path / "r.json").train[0] == {"messages": turns}


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_a_replaced_file_of_equal_size_and_time_is_read_again(tmp_path, name):
    file = tmp_path / name
    for word in ("one", "two"):
        text = lines({**ROW, "completion": word}) if name == "r.jsonl" else f"prompt,completion\na,{word}\n"
        file.write_text(text)
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert load(file).train["completion"][:] == [word]


ASK, ANSWER = {"role": "user", "content": "say one"}, {"role": "assistant", "content": "one"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "input": "3 4"}, "Row 0 has the column input, which changes what is learned"),
        ({**ROW, "label": False}, "Row 0 has the column label.*keep the rows that are true"),
        ({**ROW, "weight": 0.5}, "Row 0 has the column weight.*data.ignore"),
        ({**ROW, "completion_mask": [0, 1]}, "Row 0 has the column completion_mask.*input_ids"),
        ({**ROW, "reasoning": "because"}, "Row 0 has the column reasoning.*reasoning_content"),
        ({"prompt": "a", "completions": ["b", "c"], "completion": "b"}, "Row 0 has the column completions"),
        ({"input_ids": [5, 6], "completion_mask": [1]}, "Row 0 has 2 input_ids and a completion_mask"),
        ({"input_ids": [5, 6], "position_ids": [0, 0]}, "Row 0 has the column position_ids.*train.packing"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "Row 0: turn 1 has weight 0.5.*0 or 1"),
        ({"messages": [{**ASK, "weight": 1}, ANSWER]}, "Row 0: turn 0 has weight 1.*assistant's turns"),
        (
            {"prompt": [ASK], "completion": [{**ANSWER, "weight": 0}]},
            "turn 0 has weight 0.*all that is learned",
        ),
        ({**ROW, "history": "earlier"}, "Row 0 has a history that is not a list"),
        ({**ROW, "system": 3}, "Row 0 has a system that is not text"),
    ],
)
def test_a_column_that_changes_what_is_learned_is_refused_where_it_has_no_place(tmp_path, row, message):
    (tmp_path / "r.jsonl").write_text(lines(row))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "r.jsonl")


def test_columns_are_left_out_on_request_and_named_otherwise(tmp_path):
    (tmp_path / "r.jsonl").write_text(lines({**ROW, "weight": 0.5, "id": 3, "text": "say one: one"}))
    rows = load(tmp_path / "r.jsonl", ignore=("weight",))
    assert rows.train[0] == ROW
    assert rows.layouts[0].unread == ("id",)
    assert rows.layouts[0].beside == ("text",)
    with pytest.raises(ValueError, match="data.ignore names wait"):
        load(tmp_path / "r.jsonl", ignore=("wait",))
    with pytest.raises(ValueError, match="no part promt. Did you mean 'prompt'"):
        load(tmp_path / "r.jsonl", columns={"promt": "text"})


def test_the_prompts_of_generation_are_those_of_training(tmp_path):
    file = tmp_path / "r.jsonl"

    def prompts(row, **options):
        file.write_text(lines(row))
        return load_prompts(DataConfig(path=str(file), **options))

    mapped = {"columns": {"prompt": "question", "completion": "answer"}}
    row = {"question": "QQQ", "answer": "AAA", "prompt": "PPP", "completion": "CCC"}
    for given in (row, dict(reversed(row.items()))):
        assert prompts(given, **mapped) == [("QQQ", "AAA")]
    assert prompts({"prompt": "say", "messages": [ASK, ANSWER]}) == [([ASK], "one")]
    talk = [{"from": "human", "value": "say one"}, {"from": "gpt", "value": "one"}]
    assert prompts({"conversations": talk}) == [([ASK], "one")]
    assert prompts({"conversations": talk[:1]}) == [([ASK], None)]
    asked = {"role": "user", "content": "add\n1 2"}
    assert prompts({"instruction": "add", "input": "1 2", "output": "3"}) == [([asked], "3")]
    assert prompts({"prompt": "say one: "}) == [("say one: ", None)]


def parts_of(tmp_path, **shares):
    made = []
    for name, share in shares.items():
        turns = [{**ASK, "content": name}, {**ANSWER, "name": "x"} if name == "b" else ANSWER]
        row = {"a": {"prompt": name, "completion": "one"}, "c": {"text": name}}.get(name, {"messages": turns})
        (tmp_path / f"{name}.jsonl").write_text(lines(*[row] * 30))
        made.append({"path": str(tmp_path / f"{name}.jsonl"), **({} if share is None else {"share": share})})
    return made


def kinds(rows):
    """How many rows of each kind."""
    found = [next(k for k in ("prompt", "messages", "text") if row.get(k) is not None) for row in rows]
    return {kind: found.count(kind) for kind in set(found)}


def mixed(data, **more):
    return load_recipe({"student": "s", "teacher": "t", "data": data, **more}).data


def test_several_datasets_are_mixed_by_share(tmp_path):
    parts = parts_of(tmp_path, a=2, b=1, c=3)
    rows = load_rows(mixed(parts))
    assert kinds(rows.train) == {"prompt": 20, "messages": 10, "text": 30}
    assert rows.train["text"][:] != sorted(rows.train["text"][:], key=str)  # no blocks
    assert "a.jsonl: 20 of 30 rows (33%)" in rows.mixture
    assert rows.train[:] == load_rows(mixed(parts)).train[:]
    everything = load_rows(mixed(parts_of(tmp_path, a=None, b=None, d=None)))
    assert kinds(everything.train) == {"prompt": 30, "messages": 60}
    held = load_rows(mixed({"parts": parts, "validation": 0.1}))
    assert (len(held.train), len(held.validation)) == (54, 6)
    stream = load_rows(mixed({"parts": parts, "streaming": True})).train
    assert {kind for row in stream for kind in kinds([row])} == {"prompt", "messages", "text"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"path": "a", "share": 1}, {"path": "b"}], "give each entry a share, or none"),
        ([{"path": "a", "share": 0}], "share"),
        ([{"path": "a", "labels": "all"}], "of all parts together"),
        ({"parts": [{"path": "a"}], "path": "b"}, "move path, name, columns"),
        ([], "data.path is empty"),
    ],
)
def test_mixtures_that_mean_nothing(data, message):
    with pytest.raises(ValueError, match=message):
        mixed(data)


def test_rows_that_mix_formats_are_each_read_as_what_they_are(tmp_path):
    rows = [{"text": "say one: one"}] * 2 + [{"messages": [ASK, ANSWER]}] * 2 + [ROW] * 2
    (tmp_path / "r.jsonl").write_text(lines(*rows))
    assert kinds(load(tmp_path / "r.jsonl").train) == {"text": 2, "messages": 2, "prompt": 2}


@pytest.mark.parametrize("streaming", [False, True])
def test_dates_in_texts_stay_text(tmp_path, streaming):
    """The reader of JSON lines makes times of them."""
    said = ["2023-05-01", "2023-05-01 10:00:00", "2023-05-01T10:00:00Z"]
    rows = [{"prompt": "when?", "completion": text, "created": said[0]} for text in said]
    (tmp_path / "rows.jsonl").write_text(lines(*rows))
    assert [row["completion"] for row in load(tmp_path / "rows.jsonl", streaming=streaming).train] == said
    turns = [{"role": "user", "content": said[1]}, {"role": "assistant", "content": said[2]}]
    (tmp_path / "turns.jsonl").write_text(lines({"messages": turns}))
    assert next(iter(load(tmp_path / "turns.jsonl", streaming=streaming).train))["messages"] == turns
    (tmp_path / "array.json").write_text(json.dumps(rows))
    assert load(tmp_path / "array.json").train["completion"][:] == said


def test_dates_under_a_key_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"date": "2023-05-01", "completion": "one"}]}))
    with pytest.raises(ValueError, match="a prompt that is a time, .*JSON lines keep them"):
        load(tmp_path / "rows.json", columns={"prompt": "date"})
