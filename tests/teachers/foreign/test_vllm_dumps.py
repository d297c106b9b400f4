"""Dumps of prompt_logprobs in the shapes that vLLM's engine and server give them."""

from __future__ import annotations

import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from hpd.teachers.foreign import VllmFile

IDS = [5, 7, 2]
# The engine names the token of the prompt behind the k likeliest where it is none of them.
PLACES = [
    None,
    {
        "3": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        "4": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
        "7": {"logprob": -6.0, "rank": 40, "decoded_token": "c"},
    },
    {"2": {"logprob": -0.25, "rank": 1}, "9": {"logprob": None, "rank": 2}},
]
SHAPES = {
    "RequestOutput": {"request_id": "0", "prompt_token_ids": IDS, "prompt_logprobs": PLACES, "outputs": []},
    "completion": {
        "object": "text_completion",
        "choices": [{"index": 0, "prompt_token_ids": IDS, "prompt_logprobs": PLACES, "text": "x"}],
    },
    "chat": {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {}}],
        "prompt_token_ids": IDS,
        "prompt_logprobs": PLACES,
    },
    "batch": {
        "custom_id": "0",
        "response": {"body": {"choices": [{"prompt_token_ids": IDS, "prompt_logprobs": PLACES}]}},
    },
}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read(tmp_path, shape):
    file = VllmFile(write(tmp_path / "rows.jsonl", SHAPES[shape], SHAPES["RequestOutput"]))
    assert (len(file), file.k) == (2, 2)
    for number in range(2):
        assert file.ids(number).tolist() == IDS
        found = file.answers(number)
        assert found.tokens.tolist() == [[3, 4], [2, 9]]
        assert found.label_logprobs is not None
        torch.testing.assert_close(found.label_logprobs, torch.tensor([-6.0, -0.25]))
        assert found.logprobs[1, 1] == -1e5
        assert found.known.all()


def test_the_token_of_the_row_alone_does_not_count_as_likeliest(tmp_path):
    """Three entries everywhere, of which one each is the row's token far down: k is 2 by the ranks."""
    places = [None, PLACES[1], {**PLACES[2], "2": {"logprob": -8.0, "rank": 70}}]
    places[2] = {
        "9": {"logprob": -0.1, "rank": 1},
        "8": {"logprob": -3.0, "rank": 2},
        "2": {"logprob": -8.0, "rank": 70},
    }
    file = VllmFile(write(tmp_path / "r.jsonl", {"prompt_token_ids": IDS, "prompt_logprobs": places}))
    assert file.k == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt_logprobs": PLACES, "prompt": "text"}, "return_token_ids"),
        ({"prompt_token_ids": IDS, "prompt_logprobs": PLACES[:2]}, "3 tokens have 2 entries"),
        ({"choices": [{"text": "x"}]}, "no field 'prompt_logprobs'"),
        ([1, 2], "cannot be read"),
        ({"prompt_token_ids": IDS, "prompt_logprobs": [None, None, None]}, "says nothing about any token"),
    ],
)
def test_what_is_no_dump_is_named(tmp_path, line, said):
    with pytest.raises(ValueError, match=said):
        VllmFile(write(tmp_path / "rows.jsonl", line))


def test_a_cut_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(SHAPES["chat"]) + "\n" + json.dumps(SHAPES["chat"])[:40])
    with pytest.raises(ValueError, match="Row 2 of .* cannot be read"):
        VllmFile(str(path))


ROW = SHAPES["RequestOutput"]


def test_files_of_every_kind_and_folders_of_them(tmp_path):
    text = json.dumps(ROW)
    (tmp_path / "1.jsonl").write_text(text + "\n\n" + text)
    (tmp_path / "2.json").write_text(json.dumps([ROW, ROW], indent=1))
    (tmp_path / "3.json").write_text(json.dumps(ROW, indent=1))
    (tmp_path / "4.jsonl.gz").write_bytes(gzip.compress((text + "\n").encode()))
    (tmp_path / "5.json.gz").write_bytes(gzip.compress(json.dumps([ROW]).encode()))
    token = pa.struct([("logprob", pa.float32()), ("rank", pa.int64())])
    places = [None, *([(t, {**told}) for t, told in place.items()] for place in PLACES[1:])]
    kind = pa.list_(pa.map_(pa.string(), token))
    table = {"prompt_token_ids": pa.array([IDS]), "prompt_logprobs": pa.array([places], kind)}
    pq.write_table(pa.table(table), tmp_path / "6.parquet")
    one = {"prompt_token_ids": pa.array([IDS]), "prompt_logprobs": pa.array([json.dumps(PLACES)])}
    pq.write_table(pa.table(one), tmp_path / "7.parquet")
    Dataset.from_list([ROW]).select_columns(["prompt_token_ids", "prompt_logprobs"]).to_parquet(
        tmp_path / "8.parquet"  # a structure with a field for every token
    )
    (tmp_path / "notes.txt").write_text("not a dump")
    file = VllmFile(str(tmp_path))
    assert (len(file), file.k) == (10, 2)
    for number in range(10):
        found = file.answers(number)
        assert file.ids(number).tolist() == IDS
        assert found.tokens.tolist() == [[3, 4], [2, 9]]
        assert found.label_logprobs is not None
        torch.testing.assert_close(found.label_logprobs, torch.tensor([-6.0, -0.25]))
    before = file.digest()
    (tmp_path / "8.parquet").unlink()
    assert VllmFile(str(tmp_path)).digest() != before


def test_what_cannot_be_unpacked_is_named(tmp_path):
    whole = gzip.compress(json.dumps(ROW).encode())
    for name, content in (
        ("a.jsonl.gz", whole[:-20]),
        ("b.json.gz", b"text"),
        ("c.parquet", b"PAR1 text PAR1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read: .* or no dump of vLLM"):
            VllmFile(str(tmp_path / name))


def test_the_row_of_a_file_is_named_in_a_folder(tmp_path):
    write(tmp_path / "a.jsonl", ROW, ROW)
    write(tmp_path / "b.jsonl", ROW, {**ROW, "prompt_logprobs": [None, {"3": {"logprob": -0.5}}, PLACES[2]]})
    with pytest.raises(ValueError, match=r"Row 2 of \S+/b\.jsonl .* no log-probability of token 7"):
        VllmFile(str(tmp_path)).answers(3)


def test_a_missing_place_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder without dumps"):
        VllmFile(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        VllmFile(str(tmp_path / "none"))


def test_a_failed_request_of_a_batch_is_no_row(tmp_path):
    failed = {"custom_id": "1", "response": None, "error": {"message": "too long"}}
    file = VllmFile(write(tmp_path / "r.jsonl", failed, SHAPES["batch"]))
    assert len(file) == 1
    assert file.ids(0).tolist() == IDS


def test_a_label_without_rank_is_none_of_the_likeliest(tmp_path):
    places = [None, {**PLACES[1], "7": {"logprob": -6.0, "rank": None}}]
    file = VllmFile(write(tmp_path / "r.jsonl", {"prompt_token_ids": IDS[:2], "prompt_logprobs": places}))
    assert file.k == 2


def test_equal_numbers_stand_by_rank(tmp_path):
    """Two tokens are equally likely and vLLM kept one of them as its second: so do we."""
    place = {
        "7": {"logprob": -2.0, "rank": 3},
        "3": {"logprob": -0.5, "rank": 1},
        "9": {"logprob": -2.0, "rank": 2},
    }
    more = {"2": {"logprob": -0.1, "rank": 1}, "3": {"logprob": -3.0, "rank": 2}}
    row = {"prompt_token_ids": IDS, "prompt_logprobs": [None, place, more]}
    assert VllmFile(write(tmp_path / "r.jsonl", row)).answers(0).tokens[0].tolist() == [3, 9]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"3": {"logprob": math.nan, "rank": 1}, "7": {"logprob": -1.0, "rank": 2}}, "not a number"),
        ({"3": {"logprob": -0.1, "rank": 1}, "7": {"logprob": math.nan, "rank": 9}}, "not a number"),
        ({"3": {"logprob": 2.5, "rank": 1}, "7": {"logprob": -1.0, "rank": 2}}, "2.5, above 0"),
        ([[3, -0.5]], "neither null nor an object"),
        ({"the": {"logprob": -0.5, "rank": 1}}, "no log-probability of token 7"),
    ],
)
def test_numbers_that_are_none_are_named(tmp_path, place, said):
    row = {"prompt_token_ids": IDS[:2], "prompt_logprobs": [None, place]}
    with pytest.raises(ValueError, match=said):
        VllmFile(write(tmp_path / "r.jsonl", row)).answers(0)


def test_the_rows_own_token_alone_is_not_enough(tmp_path):
    row = {"prompt_token_ids": IDS[:2], "prompt_logprobs": [None, {"7": {"logprob": -3.0, "rank": 12}}]}
    with pytest.raises(ValueError, match="prompt_logprobs: 0"):
        VllmFile(write(tmp_path / "r.jsonl", row))
