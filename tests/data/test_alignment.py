"""Chunks of two token rows: every byte in one, boundaries wherever both have a token's end."""

import random
import time

import numpy as np
import pytest
from helpers.two_tokenizers import piece_tokenizer, random_text
from tiny_models import tiny_tokenizer

from hpd.data.alignment import align
from hpd.models.token_bytes import token_bytes


def side(*tokens):
    """A token row by its texts."""
    data = "".join(tokens).encode()
    ends = np.cumsum([len(token.encode()) for token in tokens])
    return np.frombuffer(data, dtype=np.uint8).astype(np.uint16), ends


def shown(student, teacher):
    found = align(side(*student), side(*teacher))
    out, before = [], (0, 0)
    for end_s, end_t, aligned in zip(found.student, found.teacher, found.aligned, strict=True):
        out.append(("".join(student[before[0] : end_s]), "".join(teacher[before[1] : end_t]), bool(aligned)))
        before = end_s, end_t
    return out, found.unaligned_bytes


@pytest.mark.parametrize(
    ("student", "teacher", "expected", "lost"),
    [
        (["a", "b"], ["a", "b"], [("a", "a", True), ("b", "b", True)], 0),
        (["ab", "c"], ["a", "bc"], [("abc", "abc", True)], 0),
        (["1", "2", "3", "!"], ["123", "!"], [("123", "123", True), ("!", "!", True)], 0),
        # A token of no bytes belongs to the chunk before it; at the front, to the first.
        (["a", "", "b"], ["a", "b"], [("a", "a", True), ("b", "b", True)], 0),
        (["", "a"], ["a", ""], [("a", "a", True)], 0),
        # Bytes that differ in the middle, at the front, at the end.
        (["a", "x", "c"], ["a", "y", "c"], [("a", "a", True), ("x", "y", False), ("c", "c", True)], 1),
        ([" x", "c"], ["x", "c"], [(" x", "x", False), ("c", "c", True)], 2),
        (["a", "c"], ["a", "c", "d"], [("a", "a", True), ("c", "cd", False)], 1),
        (["a", "c", "d"], ["a", "c"], [("a", "a", True), ("cd", "c", False)], 2),
        (["a", "c"], ["a", " ", "c"], [("a", "a", True), ("c", " c", False)], 1),
        (["a"], ["b", "c"], [("a", "bc", False)], 1),
    ],
)  # fmt: skip
def test_small_rows(student, teacher, expected, lost):
    assert shown(student, teacher) == (expected, lost)


def check_text(text, tables, tokenizers):
    """Each chunk has the same bytes on both sides, all of the text, and no boundary inside is missing."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers]
    if not all(rows):
        assert not text
        return 0
    sides = [table.of(ids) for table, ids in zip(tables, rows, strict=True)]
    found = align(*sides)
    assert found.aligned.all()
    assert found.unaligned_bytes == 0
    data = text.encode()
    cuts = [ends[chunks - 1] for (_, ends), chunks in zip(sides, found[:2], strict=True)]
    assert cuts[0].tolist() == cuts[1].tolist()
    assert cuts[0][-1] == len(data)
    common = set(sides[0][1].tolist()) & set(sides[1][1].tolist())
    assert sorted(common) == cuts[0].tolist()
    return len(cuts[0])


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_byte_of_random_text_is_lost(count):
    tokenizers = tiny_tokenizer(), piece_tokenizer()
    tables, rng = [token_bytes(one) for one in tokenizers], random.Random(count)
    chunks = sum(check_text(random_text(rng), tables, tokenizers) for _ in range(count))
    assert chunks > 5 * count


def test_differences_stay_in_one_chunk():
    """Whatever is put into, taken out of or changed in one side, the rest of the row stays aligned."""
    rng = random.Random(1)
    for _ in range(500):
        words = [rng.choice(["ab", "c", "dé", "f", "日"]) for _ in range(rng.randint(1, 12))]
        place = rng.randrange(len(words))
        other = [*words[:place], *rng.choice([["X"], [], ["X", words[place]]]), *words[place + 1 :]]
        if not other:
            continue
        found = align(side(*words), side(*other))
        assert (~found.aligned).sum() == 1
        assert found.student[-1] == len(words)
        assert found.teacher[-1] == len(other)
        assert (np.diff(found.student, prepend=0) > 0).all()
        assert (np.diff(found.teacher, prepend=0) > 0).all()
        bad = int((~found.aligned).argmax())
        assert len(found.aligned) - 1 >= len(words) - 3
        assert found.aligned[:bad].all()


def test_the_time_is_linear():
    """Sixteen times the length takes less than 64 times the time (quadratic: 256)."""
    rng = np.random.default_rng(0)

    def seconds(count):
        sides = []
        for _ in range(2):
            ends = np.cumsum(rng.integers(1, 5, count))
            sides.append((np.zeros(4 * count, np.uint16), np.append(ends[ends < 4 * count], 4 * count)))
        best = []
        for _ in range(3):
            began = time.process_time()
            align(*sides)
            best.append(time.process_time() - began)
        return min(best)

    assert seconds(160_000) < 64 * seconds(10_000)


def test_a_character_that_one_tokenizer_cannot_tell_is_counted_and_kept_apart():
    """SentencePiece reads its sign for the space, U+2581, as a space: three bytes on one side, one on the
    other."""
    tokenizers = tiny_tokenizer(), piece_tokenizer()
    rows = [
        tokenizer("one\u2581, two three", add_special_tokens=False)["input_ids"] for tokenizer in tokenizers
    ]
    found = align(*(token_bytes(one).of(ids) for one, ids in zip(tokenizers, rows, strict=True)))
    # The teacher has "one" and the sign in one token.
    assert found.aligned.tolist() == [False, True, True, True]
    assert found.unaligned_bytes == len("one\u2581".encode())
