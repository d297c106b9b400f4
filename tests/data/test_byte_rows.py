"""Rows in two tokenizers: the same text for both, each in its own template, at every cut and packing."""

import numpy as np
import pytest
import torch
from helpers.two_tokenizers import piece_tokenizer
from tiny_models import tiny_tokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import IGNORE_INDEX, TokenBatch, as_teacher_reads
from hpd.data.byte_rows import byte_row, two_tokenizers
from hpd.data.collator import DistillCollator

TEXTS = ["one two, three", "the sum is 12 — né 日本", "ten\n\n nine  eight", "x"]


@pytest.fixture(scope="module")
def sides():
    student = tiny_tokenizer()
    return student, two_tokenizers(student, piece_tokenizer())


def text_rows():
    return [{"prompt": f"say {i}:", "completion": " " + text} for i, text in enumerate(TEXTS)]


def chat_rows():
    return [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("rows", [text_rows, chat_rows])
def test_both_read_the_answer_and_its_end(sides, rows):
    student, other = sides
    for index, (row, text) in enumerate(zip(rows(), TEXTS, strict=True)):
        found = byte_row(row, student, other, "completion", index)
        learned = [
            token for token, label in zip(found.ids, found.labels, strict=True) if label != IGNORE_INDEX
        ]
        assert student.decode(learned).strip() == text + "<|im_end|>"
        ended = "<end_of_turn>" if rows is chat_rows else "<eos>"
        assert other.tokenizer.decode(found.teacher_ids).strip() == text + ended
        assert found.chunks.aligned.all()
        # The ends are one event: a chunk of one token each.
        assert [int(count[-1]) for count in found.chunks.tokens] == [1, 1]
        assert found.prefix[0] == other.tokenizer.bos_token_id
        before = other.tokenizer.decode(found.prefix)
        assert ("<start_of_turn>assistant" in before) == (rows is chat_rows)
        assert "im_start" not in before


def test_what_does_not_align_is_no_label(sides):
    student, other = sides
    row = {"prompt": "say:", "completion": " one\u2581, two three"}
    found = byte_row(row, student, other, "completion", 0)
    assert found.chunks.unaligned_bytes > 0
    masked = [token for token, label in zip(found.ids, found.labels, strict=True) if label == IGNORE_INDEX]
    assert "\u2581" in student.decode(masked)
    assert "three" in student.decode([label for label in found.labels if label != IGNORE_INDEX])


@pytest.mark.parametrize(
    ("row", "labels", "said"),
    [
        ({"prompt": "a", "completion": "b"}, "all", "Row 7 is not a prompt and its completion"),
        ({"prompt": None, "messages": []}, "completion", "set data.labels: last_turn"),
        ({"prompt": "a", "completion": ""}, "completion", "Row 7 is not a prompt"),
    ],
)
def test_rows_without_one_answer_are_refused(sides, row, labels, said):
    with pytest.raises(ValueError, match=said):
        byte_row(row, *sides, labels, 7)


def batch_of(examples, padding_free):
    inner = DataCollatorForLanguageModeling(pad_token_id=9999, padding_free=padding_free)
    inputs = DistillCollator(inner)(examples)
    return inputs, TokenBatch.pop(dict(inputs))


def cut(example, length):
    return {name: values[:length] for name, values in example.items()}


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("length", [None, 9, 12, 15])
def test_a_batch_has_the_same_text_in_both_index_lists(sides, padding_free, length):
    """Whatever a cut leaves: each chunk has the same bytes on both sides, and the tokens before it too."""
    other = sides[1]
    examples = [byte_row(row, *sides, "completion", i).columns() for i, row in enumerate(text_rows())]
    inputs, batch = batch_of([cut(example, length) for example in examples], padding_free)
    own, read = as_teacher_reads(inputs, batch)
    assert int(batch.chunks.max()) == int(batch.teacher_chunks.max())
    assert (batch.chunks.diff() >= 0).all()
    whole = "".join(" " + text for text in TEXTS).encode()
    joined = b""
    for chunk in range(int(batch.chunks.max()) + 1):
        texts = []
        for table, labels, chunks in (
            (other.student, batch.labels, batch.chunks),
            (other.teacher, read.labels, batch.teacher_chunks),
        ):
            symbols, _ = table.answer(labels[chunks == chunk].tolist())
            texts.append(symbols.tolist())
        assert texts[0] == texts[1]
        joined += bytes(symbol for symbol in texts[0] if symbol < 256)
    assert joined == whole if length is None else len(joined) < len(whole)
    # A position's label is the token behind it, on both sides.
    assert torch.equal(inputs["input_ids"].flatten()[batch.index + 1], batch.labels)
    assert torch.equal(own["input_ids"].flatten()[read.index + 1], read.labels)
    assert not own["input_ids"].eq(9999).any(), "the student's padding is not shown to the teacher"
    given = sum(label != IGNORE_INDEX for e in examples for label in cut(e, length)["labels"])
    assert int(batch.dropped) == given - len(batch.labels)
    assert np.array_equal(inputs["labels"][:, 1:].ne(-100).sum(), len(batch.labels))


def test_packed_rows_are_the_rows(sides):
    examples = [byte_row(row, *sides, "completion", i).columns() for i, row in enumerate(text_rows())]
    packed = {name: [value for example in examples for value in example[name]] for name in examples[0]}
    packed["seq_lengths"] = [len(example["input_ids"]) for example in examples]
    inputs, batch = batch_of([packed], padding_free=True)
    apart, expected = batch_of(examples, padding_free=True)
    for name in ("index", "labels", "keys", "chunks", "teacher_chunks", "teacher_labels", "teacher_keys"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    for name in ("teacher_input_ids", "teacher_position_ids", "input_ids"):
        assert torch.equal(inputs[name], apart[name])


def test_a_chunk_at_a_rows_first_token_is_not_learned(sides):
    """Nothing stands before it for the student, whatever the teacher reads."""
    student, other = sides
    found = byte_row({"prompt": "say:", "completion": " one two"}, student, other, "completion", 0)
    columns = found.columns()
    bare = {name: values[found.start :] for name, values in columns.items()}
    _, batch = batch_of([bare], padding_free=False)
    _, whole = batch_of([columns], padding_free=False)
    assert int(whole.chunks.max()) - int(batch.chunks.max()) == 1
    first = int((whole.chunks == 0).sum())
    assert torch.equal(batch.labels, whole.labels[first:])
