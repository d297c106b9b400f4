"""Rollouts that were stored: each token's log-probability in its place, or the number of the wrong row."""

import math

import pytest
from datasets import Dataset

from hpd.batch import DATASET, STUDENT
from hpd.data.stored_rollouts import mark_rollouts

GOOD = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "behavior_logprobs": [None, -0.5, 0.0]}


def test_log_probabilities_stay_with_their_labels():
    (row,) = mark_rollouts(Dataset.from_list([GOOD]))
    assert math.isnan(row["behavior_logprobs"][0])
    assert row["behavior_logprobs"][1:] == [-0.5, 0.0]
    assert row["sources"] == [DATASET, STUDENT, STUDENT]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([-0.5, 0.0], "Row 1 has 3 tokens and a behavior_logprobs of 2 entries"),
        (None, "a behavior_logprobs of NoneType"),
        ([None, -0.5, None], "Row 1 has behavior_logprobs None at token 2"),
        ([None, math.nan, -0.5], "nan at token 1"),
        ([None, -math.inf, -0.5], "-inf at token 1"),
        ([None, 0.25, -0.5], "0.25 at token 1, and the log-probability of a token that was drawn"),
        ([-0.1, -0.5, -0.5], "-0.1 at token 0, which has no label"),
    ],
)
def test_wrong_ones_are_refused_by_the_number_of_their_row(given, said):
    rows = Dataset.from_list([GOOD, {**GOOD, "behavior_logprobs": given}])
    with pytest.raises(ValueError, match=said):
        mark_rollouts(rows)


def test_texts_are_refused():
    rows = Dataset.from_list([{**GOOD, "behavior_logprobs": ["", "-0.5", "-0.1"]}])
    with pytest.raises(ValueError, match="'' at token 0, which has no label"):
        mark_rollouts(rows)
    with pytest.raises(ValueError, match="the rows lack labels, behavior_logprobs"):
        mark_rollouts(Dataset.from_list([{"input_ids": [1, 2]}]))
