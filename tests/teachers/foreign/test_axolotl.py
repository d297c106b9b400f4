"""axolotl's targets: which token a list is about, what lists do not tell, and damaged ones."""

from __future__ import annotations

import math

import datasets
import pytest
import torch

from hpd.teachers.foreign import AxolotlFile

HALF = math.log(0.5)


def write(path, *, about, labels=True, **changes):
    """A row of tokens 0 1 2 3 whose last two are learned; the list about token t is (t, t + 10)."""
    learned = [False, False, True, True]
    lists = [[t, t + 10] for t in range(4)]
    if about == "next":
        learned, lists = [*learned[1:], False], [*lists[1:], [0, 1]]
    row = {
        "input_ids": [0, 1, 2, 3],
        "target_token_ids": lists,
        "target_logprobs": [[HALF, HALF] if one else [-1e9, -1e9] for one in learned],
        "target_mask": [[int(one)] * 2 for one in learned],
        **({"labels": [-100, -100, 2, 3]} if labels else {}),
        **changes,
    }
    datasets.Dataset.from_list([row]).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("about", ["this", "next"])
def test_masks_tell_which_token_a_list_is_about(tmp_path, about):
    file = AxolotlFile(write(tmp_path / "rows.parquet", about=about))
    assert file.about == about
    assert file.scaled
    assert file.k == 2
    found = file.answers(0)
    assert found.known.tolist()[:3] == [False, True, True]
    # The answer of place 1 is about the token 2.
    assert found.tokens[found.known].tolist() == [[2, 12], [3, 13]]
    torch.testing.assert_close(found.logprobs[found.known], torch.full((2, 2), HALF))


def test_without_labels_it_must_be_said(tmp_path):
    path = write(tmp_path / "rows.parquet", about="next", labels=False)
    with pytest.raises(ValueError, match="Say it: --about this"):
        AxolotlFile(path)
    assert AxolotlFile(path, "next").answers(0).tokens[1].tolist() == [2, 12]


def test_damaged_targets_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", about="this", target_mask=[[1, 1]] * 3)
    with pytest.raises(ValueError, match="its 4 tokens have .* 3 of target_mask"):
        AxolotlFile(path)
    path = write(tmp_path / "b.parquet", about="this", target_logprobs=[[0.1, 7.0]] * 4)
    with pytest.raises(ValueError, match="is 7, above 0"):
        AxolotlFile(path)
    path = write(tmp_path / "c.parquet", about="this", target_token_ids=[[1, 2], [3], [4, 5], [6, 7]])
    with pytest.raises(ValueError, match="not k numbers a token"):
        AxolotlFile(path)


def rows(path, *found):
    """Rows of tokens 0 1 2 3 whose last two are learned."""
    same = {"input_ids": [0, 1, 2, 3], "labels": [-100, -100, 2, 3]}
    datasets.Dataset.from_list([{**same, **row} for row in found]).to_parquet(path)
    return str(path)


NONE = -math.inf
LISTS = {
    "target_token_ids": [[0, 1], [0, 1], [2, 12], [3, 13]],
    "target_mask": [[0, 0], [0, 0], [1, 1], [1, 1]],
}


def test_lists_of_unequal_lengths_and_masks_of_single_tokens(tmp_path):
    """As axolotl's collator: shorter lists and rows are padded with masked numbers."""
    short = {
        "target_token_ids": [[0], [0], [2, 12], [3]],
        "target_logprobs": [[NONE], [NONE], [HALF, HALF], [0.0]],
        "target_mask": [[0], [0], [1, 1], [1]],
    }
    padded = {**LISTS, "target_logprobs": [[-1e9, -1e9]] * 2 + [[HALF, HALF], [0.0, -1e9]]}
    padded["target_mask"] = [[0, 0], [0, 0], [1, 1], [1, 0]]
    padded["target_token_ids"] = [[0, 0], [0, 0], [2, 12], [3, 0]]
    ends = {name: lists[:3] for name, lists in padded.items()}
    file = AxolotlFile(rows(tmp_path / "r.parquet", short, padded, ends))
    assert (file.about, file.k, file.scaled) == ("this", 2, True)
    for number in (0, 1):
        found = file.answers(number)
        assert found.known.tolist() == [False, True, True]
        assert found.tokens[1:, 0].tolist() == [2, 3]
        torch.testing.assert_close(found.logprobs[1:], torch.tensor([[HALF, HALF], [0.0, NONE]]))
    assert file.answers(2).known.tolist() == [False, True]


def test_a_token_without_probability_is_not_told_and_the_others_are(tmp_path):
    """Probabilities below float32's least are -inf there, and shorter answers of a server end with -inf."""
    found = {**LISTS, "target_logprobs": [[NONE, NONE]] * 2 + [[0.0, NONE], [HALF, HALF]]}
    answers = AxolotlFile(rows(tmp_path / "r.parquet", found)).answers(0)
    assert answers.known.tolist() == [False, True, True]
    assert answers.logprobs[1].tolist() == [0.0, NONE]


def test_a_mask_may_lack_a_token_that_is_learned_or_be_missing(tmp_path):
    lists = {**LISTS, "target_logprobs": [[NONE, NONE]] * 2 + [[HALF, HALF]] * 2}
    lacking = {**lists, "target_mask": [[0, 0]] * 3 + [[1, 1]]}
    file = AxolotlFile(rows(tmp_path / "a.parquet", lacking))
    assert (file.about, file.answers(0).known.tolist()) == ("this", [False, False, True])
    without = {name: value for name, value in lists.items() if name != "target_mask"}
    file = AxolotlFile(rows(tmp_path / "b.parquet", without))
    assert (file.about, file.answers(0).known.tolist()) == ("this", [False, True, True])


def test_the_temperature_of_targets_is_undone(tmp_path):
    """Targets as axolotl softens them, p^(1/T) / sum: T gives p back, divided by its sum over the k."""
    p = torch.tensor([[0.7, 0.3], [0.9, 0.1]], dtype=torch.float64)
    soft = torch.log_softmax(p.log() / 2.0, -1)
    path = rows(tmp_path / "r.parquet", {**LISTS, "target_logprobs": [[NONE, NONE]] * 2 + soft.tolist()})
    found = AxolotlFile(path, temperature=2.0)
    torch.testing.assert_close(found.answers(0).logprobs[1:].double().exp(), p, rtol=1e-6, atol=1e-7)
    assert found.digest() != AxolotlFile(path).digest()
    raw = rows(
        tmp_path / "raw.parquet", {**LISTS, "target_logprobs": [[NONE, NONE]] * 2 + [[-2.0, -3.0]] * 2}
    )
    with pytest.raises(ValueError, match="they were not softened"):
        AxolotlFile(raw, temperature=2.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_logprobs": [[HALF, HALF]] * 3 + [[math.nan, HALF]]}, "not a number"),
        ({"target_token_ids": [[0, 1]] * 2 + [[2, 2], [3, 13]]}, "the token 2 twice"),
        ({"target_token_ids": [[0, 1]] * 2 + [[-2, 2], [3, 13]]}, "a token has the number -2"),
    ],
)
def test_numbers_that_are_none_are_named(tmp_path, change, said):
    row = {**LISTS, "target_logprobs": [[HALF, HALF]] * 4, **change}
    with pytest.raises(ValueError, match=said):
        AxolotlFile(rows(tmp_path / "r.parquet", row))
