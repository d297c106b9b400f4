"""axolotl's targets: which token a list is about is told by the masks, or has to be said."""

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
    with pytest.raises(ValueError, match="3 masks and 4 labels"):
        AxolotlFile(path)
    path = write(tmp_path / "b.parquet", about="this", target_logprobs=[[0.1, 7.0]] * 4)
    with pytest.raises(ValueError, match="is 7, above 0"):
        AxolotlFile(path)
    path = write(tmp_path / "c.parquet", about="this", target_token_ids=[[1, 2], [3], [4, 5], [6, 7]])
    with pytest.raises(ValueError, match="not k numbers a token"):
        AxolotlFile(path)
