"""What the student writes, in the teacher's tokens: cut characters, special tokens, ends, empty answers."""

import random

import pytest
from helpers.two_tokenizers import piece_tokenizer, random_text
from tiny_models import tiny_tokenizer

from hpd.data.byte_rows import byte_row, two_tokenizers
from hpd.data.written_rows import AnswerReader
from hpd.models.token_bytes import end_of_answer


def reader_of(student, teacher, chat=False):
    both = two_tokenizers(student, teacher)
    return AnswerReader(both, end_of_answer(teacher, both.teacher, chat)), both


@pytest.fixture(scope="module")
def sides():
    student, teacher = tiny_tokenizer(), piece_tokenizer()
    return student, teacher, *reader_of(student, teacher)


@pytest.fixture(scope="module")
def swapped():
    student, teacher = piece_tokenizer(), tiny_tokenizer()
    return student, teacher, *reader_of(student, teacher)


def written(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chunks_of(read, ids):
    """(the student's tokens, the teacher's, learned) of each chunk."""
    out, begin = [], 0
    for place, tokens in enumerate(read.chunks):
        if tokens:
            out.append((ids[begin : place + 1], tokens, read.learned[place]))
            begin = place + 1
    return out


@pytest.mark.parametrize("which", ["sides", "swapped"])
@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_is_read_as_the_same_row_of_a_dataset(which, chat, request):
    student, teacher, _, both = request.getfixturevalue(which)
    reader, _ = reader_of(student, teacher, chat)
    for index, text in enumerate(["one two, three", "12 — né 日本 👩\u200d👩", "ten\n\n nine  eight", "x"]):
        row = {"prompt": "say:", "completion": " " + text}
        if chat:
            row = {
                "prompt": [{"role": "user", "content": "say"}],
                "completion": [{"role": "assistant", "content": text}],
            }
        given = byte_row(row, student, both, "completion", index, writes=True)
        expected = given.columns()
        # Behind the end is the template's.
        stop = given.start + int(given.chunks.student[-1])
        read = reader.read(given.ids[given.start : stop], ended=True)
        assert read.chunks == expected["teacher_chunks"][given.start : stop]
        assert read.learned == [label != -100 for label in given.labels[given.start : stop]]
        assert all(read.learned)


@pytest.mark.parametrize("which", ["sides", "swapped"])
def test_random_tokens_are_read_without_a_byte_lost_or_made_up(which, request):
    """Tokens in no tokenizer's order: every chunk that is learned is the same bytes on both sides, and what
    the teacher reads up to there is what the student wrote."""
    student, _, reader, both = request.getfixturevalue(which)
    rng = random.Random(0)
    plain = [token for token in range(len(both.student)) if token not in both.student.special]
    learned = 0
    for number in range(150):
        ids = written(student, random_text(rng)) if number % 2 else rng.choices(plain, k=rng.randint(0, 12))
        ended = number % 3 > 0
        ids = [*ids, student.eos_token_id] if ended else ids
        read = reader.read(ids, ended)
        assert len(read.chunks) == len(read.learned) == len(ids)
        mine, theirs = b"", b""
        for tokens, others, bit in chunks_of(read, ids):
            (a, _), (b, _) = both.student.of(tokens), both.teacher.of(others)
            mine, theirs = mine + bytes(a.astype("u1")), theirs + bytes(b.astype("u1"))
            is_end = ended and tokens[-1] == student.eos_token_id
            if bit and not is_end:
                assert a.tolist() == b.tolist()
                assert mine == theirs
            if is_end:
                assert others[-1] == reader._end
            learned += bit
        if not ended:
            assert not ids or not read.learned[-1]
            assert reader._end not in [token for tokens in read.chunks for token in tokens]
    assert learned > 300


def test_a_cut_answer_has_no_end_and_its_last_word_is_not_learned(sides):
    student, teacher, reader, _ = sides
    ids = written(student, " one two thr")
    read = reader.read(ids, ended=False)
    found = chunks_of(read, ids)
    assert teacher.decode([token for _, tokens, _ in found for token in tokens]) == " one two thr"
    learned = [token for token, bit in zip(ids, read.learned, strict=True) if bit]
    assert student.decode(learned) == " one two"
    whole = reader.read([*ids, student.eos_token_id], ended=True)
    assert all(whole.learned)
    assert whole.chunks[-1] == [teacher.eos_token_id]


@pytest.mark.parametrize("which", ["sides", "swapped"])
def test_a_character_that_was_cut_is_not_shown_to_the_teacher(which, request):
    student, _, reader, both = request.getfixturevalue(which)
    ids = written(student, " one two 日")[:-1]
    assert bytes(both.student.of(ids)[0].astype("u1")).decode(errors="ignore") == " one two "
    read = reader.read(ids, ended=False)
    shown = bytes(both.teacher.of([t for tokens in read.chunks for t in tokens])[0].astype("u1"))
    assert shown == b" one two "
    assert not read.learned[-1]
    # In the middle it is no cut: those bytes are what the student wrote, and the teacher has tokens of bytes.
    ids = [*ids, *written(student, " three"), student.eos_token_id]
    read = reader.read(ids, ended=True)
    assert all(read.learned)
    shown = bytes(both.teacher.of([t for tokens in read.chunks[:-1] for t in tokens])[0].astype("u1"))
    assert shown == bytes(both.student.of(ids[:-1])[0].astype("u1"))


def test_special_tokens_within_an_answer(sides):
    student, teacher, reader, _ = sides
    role = student.convert_tokens_to_ids("<|im_start|>")
    ids = [*written(student, " one"), role, *written(student, " two"), student.eos_token_id]
    read = reader.read(ids, ended=True)
    shown = teacher.decode([token for tokens in read.chunks for token in tokens])
    # Its name in letters, which the teacher hardly expects; behind it, both read another text.
    assert shown == " one<|im_start|>"
    place = ids.index(role)
    assert read.learned == [True] * (place + 1) + [False] * (len(ids) - place - 1)
    # Letters that look like a token of the teacher's are letters.
    ids = [*written(student, " <end_of_turn> one"), student.eos_token_id]
    read = reader.read(ids, ended=True)
    tokens = [token for tokens in read.chunks for token in tokens]
    assert teacher.convert_tokens_to_ids("<end_of_turn>") not in tokens
    assert all(read.learned)


def test_a_special_token_that_both_have_is_one_event():
    student, teacher = tiny_tokenizer(), piece_tokenizer()
    teacher.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    reader, _ = reader_of(student, teacher)
    role = student.convert_tokens_to_ids("<|im_start|>")
    ids = [*written(student, " one"), role, *written(student, " two"), student.eos_token_id]
    read = reader.read(ids, ended=True)
    assert read.chunks[ids.index(role)] == [teacher.convert_tokens_to_ids("<|im_start|>")]
    assert all(read.learned)


def test_an_end_in_the_middle_ends_the_answer(sides):
    """Models go on behind an end that their generation configuration does not name."""
    student, teacher, reader, _ = sides
    ids = [*written(student, " one"), student.eos_token_id, *written(student, " two")]
    read = reader.read(ids, ended=False)
    place = ids.index(student.eos_token_id)
    assert read.chunks[place] == [teacher.eos_token_id]
    assert read.learned == [i <= place for i in range(len(ids))]
    assert not any(read.chunks[place + 1 :])


def test_an_end_that_only_generation_knows_is_the_end(sides):
    student, teacher, reader, _ = sides
    other = student.convert_tokens_to_ids("<|im_start|>")
    read = reader.read([*written(student, " one"), other], ended=True)
    assert read.chunks[-1] == [teacher.eos_token_id]
    assert all(read.learned)


def test_empty_answers_and_ids_that_no_token_has(sides):
    student, teacher, reader, both = sides
    read = reader.read([student.eos_token_id], ended=True)
    assert (read.chunks, read.learned) == ([[teacher.eos_token_id]], [True])
    assert reader.read([], ended=False) == ([], [])
    beyond = len(both.student) + 5
    assert reader.read([beyond], ended=False) == ([[]], [False])
    ids = [*written(student, " one two"), beyond, *written(student, " three"), student.eos_token_id]
    read = reader.read(ids, ended=True)
    place = ids.index(beyond)
    assert read.learned == [i < place for i in range(len(ids))]


def test_a_chunk_of_two_writers_is_not_learned(sides):
    student, _, reader, _ = sides
    ids = [*written(student, " one two three"), student.eos_token_id]
    whole = chunks_of(reader.read(ids, ended=True), ids)
    first = len(whole[0][0])
    for given in range(len(ids)):
        read = reader.read(ids, True, given)
        expected, begin = [], 0
        for tokens, _, _ in whole:
            expected += [not begin < given < begin + len(tokens)] * len(tokens)
            begin += len(tokens)
        assert read.learned == expected
    assert first > 1, "there is a chunk to cut"


def test_a_space_that_a_tokenizer_puts_before_a_text_is_no_part_of_the_answer():
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    plain = piece_tokenizer()
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    student = tiny_tokenizer()
    reader, both = reader_of(student, teacher)
    ids = [*written(student, "one two"), student.eos_token_id]
    read = reader.read(ids, ended=True)
    shown = [token for tokens in read.chunks[:-1] for token in tokens]
    assert bytes(both.teacher.of(shown)[0].astype("u1")) == b"one two"
    assert all(read.learned)


def test_prompts_that_one_side_reads_into_the_answer_are_refused(sides):
    student, _, _, both = sides
    row = {"prompt": "say ", "completion": "one two"}
    byte_row(row, student, both, "completion", 3)
    byte_row({"prompt": "say", "completion": " one"}, student, both, "completion", 3, writes=True)
    with pytest.raises(ValueError, match="Row 3: tokens merge where prompt and answer meet"):
        byte_row(row, student, both, "completion", 3, writes=True)
