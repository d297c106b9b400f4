"""The bytes of tokens: joined, those of any text are the text's."""

import random

import numpy as np
import pytest
from helpers.two_tokenizers import piece_tokenizer, random_text
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hpd.models.token_bytes import token_bytes


@pytest.mark.parametrize("make", [tiny_tokenizer, piece_tokenizer])
def test_the_bytes_of_a_text_are_those_of_its_tokens(make):
    tokenizer = make()
    table, rng = token_bytes(tokenizer), random.Random(0)
    for _ in range(300):
        text = random_text(rng)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        symbols, ends = table.of(ids)
        assert symbols.astype(np.uint8).tobytes() == text.encode()
        assert len(ends) == len(ids)
        assert b"".join(table.texts()[i] for i in ids) == text.encode()


def test_special_tokens_are_known_and_have_their_text():
    table, tokenizer = token_bytes(piece_tokenizer()), piece_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id, end} <= table.special
    assert tokenizer("one", add_special_tokens=False)["input_ids"][0] not in table.special
    assert table.texts()[end] == b"<end_of_turn>"


def test_a_tokenizer_that_loses_bytes_is_refused():
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    with pytest.raises(
        ValueError, match=r"of the teacher is neither byte-level nor SentencePiece-like.*Word"
    ):
        token_bytes(tokenizer, "teacher")
