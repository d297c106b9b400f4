"""TokenBatch: the shift, the layouts, and the numbers that draws are made from.

Axes: B rows, T tokens, N label positions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import IGNORE_INDEX, TokenBatch, token_batch, uniforms
from hpd.data.collator import DistillCollator

PAD = 0
# Rows of different length; -100 marks the prompt. The first row labels its first token, which nothing
# predicts.
ROWS = [
    {"input_ids": [11, 12, 13, 14], "labels": [11, 12, 13, 14]},
    {"input_ids": [21, 22, 23, 24, 25, 26], "labels": [-100, -100, -100, 24, 25, 26]},
    {"input_ids": [11, 12, 33], "labels": [-100, 12, 33]},
    {"input_ids": [41, 42], "labels": [-100, -100]},
]
NUM_LABELS = 3 + 3 + 2


def collate(
    rows: list[dict[str, Any]], vocab: int | None = None, **options: Any
) -> tuple[dict[str, Any], TokenBatch]:
    inputs = DistillCollator(DataCollatorForLanguageModeling(pad_token_id=PAD, **options), vocab)(rows)
    return inputs, TokenBatch.pop(inputs)


def packed_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Several rows in one, as TRL's packing writes them."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
    }


LAYOUTS = {
    "padded": lambda: collate(ROWS),
    "padded, multiple of 8": lambda: collate(ROWS, pad_to_multiple_of=8),
    "padded, with positions": lambda: collate(ROWS, return_position_ids=True),
    "padding-free": lambda: collate(ROWS, padding_free=True),
    "padding-free, multiple of 8": lambda: collate(ROWS, padding_free=True, pad_to_multiple_of=8),
    "packed": lambda: collate([packed_row(ROWS[:2]), packed_row(ROWS[2:])], padding_free=True),
    "packed in one": lambda: collate([packed_row(ROWS)], padding_free=True),
    "packed, padded": lambda: collate([packed_row(ROWS[:1]), packed_row(ROWS[1:])], return_position_ids=True),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request: pytest.FixtureRequest) -> tuple[dict[str, Any], TokenBatch]:
    return request.param()


def test_a_position_is_labeled_by_the_next_token(layout: tuple[dict[str, Any], TokenBatch]) -> None:
    inputs, batch = layout
    assert batch.labels.tolist() == [12, 13, 14, 24, 25, 26, 12, 33]
    flat = inputs["input_ids"].flatten()
    assert flat[batch.index].tolist() == [11, 12, 13, 23, 24, 25, 11, 12]
    assert flat[batch.index + 1].tolist() == batch.labels.tolist()
    assert batch.dropped.item() == 0


def test_keys_do_not_depend_on_the_layout(layout: tuple[dict[str, Any], TokenBatch]) -> None:
    keys = layout[1].keys
    assert torch.equal(keys, collate(ROWS)[1].keys)
    assert len(set(keys.tolist())) == NUM_LABELS  # rows 0 and 2 begin with the same two tokens


def test_keys_do_not_depend_on_the_rest_of_the_batch() -> None:
    together = collate(ROWS)[1].keys
    alone = torch.cat([collate([row])[1].keys for row in ROWS])
    assert torch.equal(alone, together)


def test_the_trainer_counts_the_labels_that_the_loss_sums(layout: tuple[dict[str, Any], TokenBatch]) -> None:
    inputs, batch = layout
    assert inputs["labels"][:, 1:].ne(IGNORE_INDEX).sum() == len(batch.labels) == NUM_LABELS
    assert (inputs["labels"][:, 0] == IGNORE_INDEX).all()


def test_padding_on_the_left_is_a_layout_like_the_others() -> None:
    width = max(len(row["input_ids"]) for row in ROWS)
    fill = lambda name, value: torch.tensor(  # noqa: E731
        [[value] * (width - len(row[name])) + row[name] for row in ROWS]
    )
    ids = fill("input_ids", PAD)
    mask = torch.tensor([[0] * (width - len(row["labels"])) + [1] * len(row["labels"]) for row in ROWS])
    batch = token_batch({"input_ids": ids, "labels": fill("labels", IGNORE_INDEX), "attention_mask": mask})
    right = collate(ROWS)[1]
    assert torch.equal(batch.labels, right.labels)
    assert torch.equal(batch.keys, right.keys)
    assert torch.equal(ids.flatten()[batch.index + 1], batch.labels)


def test_a_row_that_starts_inside_a_document_is_a_row_of_its_own() -> None:
    ids, positions = torch.tensor([[5, 6, 7], [8, 9, 5]]), torch.tensor([[4, 5, 6], [2, 3, 4]])
    together = token_batch({"input_ids": ids, "labels": ids, "position_ids": positions})
    alone = [
        token_batch({"input_ids": ids[row], "labels": ids[row], "position_ids": positions[row]}).keys
        for row in (slice(0, 1), slice(1, 2))
    ]
    assert together.labels.tolist() == [6, 7, 9, 5]
    assert torch.equal(together.keys, torch.cat(alone))


def test_without_mask_or_positions_every_token_is_real() -> None:
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    bare = token_batch({"input_ids": ids, "labels": ids})
    masked = token_batch({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    assert bare.labels.tolist() == [6, 7, 6, 8]
    known = TokenBatch._fields.index("behavior_logprobs")
    assert all(torch.equal(a, b) for a, b in zip(bare[:known], masked[:known], strict=True))
    assert bare.behavior_logprobs is None
    assert masked.behavior_logprobs is None


def test_some_positions_of_stored_rollouts_stay_the_students() -> None:
    """As they are dealt out among several teachers."""
    rows = [
        {**row, "behavior_logprobs": [-t / 10 for t in row["labels"]], "sources": [1] * len(row["labels"])}
        for row in ROWS[:3]
    ]
    batch = collate(rows)[1]
    some = batch.at(torch.tensor([2, 3, 6]))
    assert some.labels.tolist() == [14, 24, 12]
    assert some.behavior_logprobs is not None
    torch.testing.assert_close(some.behavior_logprobs, torch.tensor([-1.4, -2.4, -1.2]))
    assert some.by_student is not None
    assert some.by_dataset is not None
    assert (some.by_student.tolist(), some.by_dataset.tolist()) == ([0, 1, 2], [])
    assert some.rows is not None
    assert some.rows.tolist() == [0, 1, 2]


def test_the_pad_token_inside_a_row_is_a_token() -> None:
    with_pad = {"input_ids": [5, PAD, 7], "labels": [-100, PAD, 7]}
    batch = collate([with_pad, {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}])[1]
    assert batch.labels.tolist() == [PAD, 7]
    assert torch.equal(batch.keys, collate([with_pad])[1].keys)


def test_keys_depend_on_every_token_of_the_row_and_its_place() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    seen = collate([row])[1].keys.tolist()
    for ids in ([6, 5, 7, 8], [5, 6, 8, 7], [5, 6, 7, 9], [4, 6, 7, 8]):
        seen += collate([{**row, "input_ids": ids}])[1].keys.tolist()
    assert len(set(seen)) == 5 * 3


def test_many_keys_do_not_collide() -> None:
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (500, 40), generator=numbers)
    ids[:, 0] = torch.arange(500)  # no two rows alike
    keys = token_batch({"input_ids": ids, "labels": ids}).keys
    assert len(keys) == 500 * 39
    assert len(keys.unique()) == len(keys)


@pytest.mark.parametrize("padding_free", [False, True])
def test_labels_beyond_the_common_vocabulary_are_dropped_and_counted(padding_free: bool) -> None:
    inputs, batch = collate(ROWS, vocab=25, padding_free=padding_free)
    assert batch.labels.tolist() == [12, 13, 14, 24, 12]
    assert batch.dropped.item() == 3
    assert inputs["labels"][:, 1:].ne(IGNORE_INDEX).sum() == 5
    assert torch.equal(inputs["input_ids"], collate(ROWS, padding_free=padding_free)[0]["input_ids"])
    kept = torch.tensor([0, 1, 2, 3, 6])
    assert torch.equal(batch.keys, collate(ROWS)[1].keys[kept])


def test_a_batch_without_labels_is_empty() -> None:
    inputs, batch = collate(
        [{"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": [7], "labels": [7]}]
    )
    assert [len(field) for field in batch[:3]] == [0, 0, 0]
    assert inputs["labels"].eq(IGNORE_INDEX).all()
    assert uniforms(batch.keys, seed=0, step=0, count=2).shape == (0, 2)


@pytest.mark.parametrize("padding_free", [False, True])
def test_pop_leaves_what_the_model_takes(padding_free: bool) -> None:
    plain = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=padding_free)(ROWS)
    inputs, _ = collate(ROWS, padding_free=padding_free)
    assert list(inputs) == list(plain)
    for name, value in plain.items():
        if name != "labels":
            assert torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(value))
    with pytest.raises(KeyError):
        TokenBatch.pop(inputs)


# ---- uniform numbers


def keys_of(count: int) -> Tensor:
    """Consecutive integers: harder to tell apart than the hashes that real keys are."""
    return torch.arange(count)


def assert_uniform(numbers: Tensor) -> None:
    """Mean, variance and the Kolmogorov-Smirnov distance, all within 4.5 standard errors or the 1e-6
    quantile."""
    count = numbers.numel()
    ordered = numbers.flatten().sort().values
    assert ordered[0] >= 0.0
    assert ordered[-1] < 1.0
    assert abs(ordered.mean().item() - 0.5) < 4.5 / math.sqrt(12 * count)
    assert abs(ordered.var().item() - 1 / 12) < 4.5 / math.sqrt(180 * count)
    ranks = torch.arange(count, dtype=torch.float64)
    distance = torch.maximum(ordered - ranks / count, (ranks + 1) / count - ordered).max().item()
    assert distance * math.sqrt(count) < 2.7


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_numbers_are_uniform_over_positions_draws_steps_and_seeds() -> None:
    assert_uniform(uniforms(keys_of(20_000), seed=0, step=0, count=4))
    assert_uniform(uniforms(keys_of(3), seed=0, step=0, count=20_000))
    assert_uniform(torch.cat([uniforms(keys_of(3), seed=1, step=step, count=1) for step in range(4000)]))
    assert_uniform(torch.cat([uniforms(keys_of(3), seed=seed, step=7, count=1) for seed in range(4000)]))


def test_numbers_do_not_collide() -> None:
    numbers = torch.cat(
        [uniforms(keys_of(5000), seed=s, step=t, count=3) for s in range(2) for t in range(-1, 3)]
    )
    assert len(numbers.unique()) == numbers.numel() == 120_000
    # Every one of the 53 bits is used.
    bits = (numbers.flatten() * 2.0**53).long()
    share = torch.stack([(bits >> k & 1).double().mean() for k in range(53)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(120_000)


def test_numbers_depend_on_seed_step_and_draw_and_on_nothing_else() -> None:
    keys, count = keys_of(10_000), 3
    numbers = uniforms(keys, seed=3, step=5, count=count)
    assert torch.equal(uniforms(keys, seed=3, step=5, count=count), numbers)
    assert torch.equal(uniforms(keys[100:200], seed=3, step=5, count=2), numbers[100:200, :2])
    others = [
        uniforms(keys, seed=4, step=5, count=count),
        uniforms(keys, seed=3, step=6, count=count),
        uniforms(keys, seed=3, step=-1, count=count),
        uniforms(keys, seed=5, step=3, count=count),
        uniforms(keys + 1, seed=3, step=5, count=count),
        numbers.roll(1, dims=1),
    ]
    for other in others:
        assert not (other == numbers).any()
        assert abs(correlation(other, numbers)) < 4.5 / math.sqrt(numbers.numel())


def test_neighboring_positions_are_independent() -> None:
    keys = collate([{"input_ids": list(range(1, 5001)), "labels": list(range(1, 5001))}])[1].keys
    numbers = uniforms(keys, seed=0, step=0, count=2)
    assert_uniform(numbers)
    for lag in (1, 2, 16):
        assert abs(correlation(numbers[lag:], numbers[:-lag])) < 4.5 / math.sqrt(numbers.numel())
    assert abs(correlation(numbers[:, 0], numbers[:, 1])) < 4.5 / math.sqrt(len(numbers))


def test_sources_and_rows_follow_the_tokens_through_every_layout() -> None:
    student = {
        "input_ids": [5, 6, 7, 8],
        "labels": [-100, 6, 7, 8],
        "sources": [0, 0, 1, 1],
        "behavior_logprobs": [0.0, 0.0, -1.0, -2.0],
    }
    dataset = {
        "input_ids": [5, 9],
        "labels": [-100, 9],
        "sources": [0, 0],
        "behavior_logprobs": [math.nan] * 2,
    }
    for padding_free in (False, True):
        inner = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=padding_free)
        batch = TokenBatch.pop(DistillCollator(inner)([dataset, student]))
        assert batch.labels.tolist() == [9, 6, 7, 8]
        assert (batch.by_dataset.tolist(), batch.by_student.tolist()) == ([0, 1], [2, 3])
        assert (batch.rows.tolist(), batch.row_lengths.tolist()) == ([0, 1, 1, 1], [1, 3])
        assert batch.behavior_logprobs[2:].tolist() == [-1.0, -2.0]
