"""Dumps of prompt_logprobs in the shapes that vLLM's engine and server give them."""

from __future__ import annotations

import json

import pytest
import torch

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


def test_a_folder_is_called_one_and_a_file_in_it_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder: give the one JSON Lines file of a vLLM dump"):
        VllmFile(str(tmp_path))
    (tmp_path / "dump.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match=r"is a folder: .* dump, such as \S+/dump\.jsonl\."):
        VllmFile(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        VllmFile(str(tmp_path / "none"))
