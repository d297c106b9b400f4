"""The bytes that each token of a tokenizer stands for: what two tokenizers have in common."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt16

from hpd.models.bounded import rendering

__all__ = ["END", "TokenBytes", "end_of_answer", "token_bytes"]

END = 256
"""The symbol of an answer's end, beside the 256 bytes: `<|im_end|>` and `<end_of_turn>` are one event with
two names."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


class TokenBytes(NamedTuple):
    """Bytes of every token id, one behind the other."""

    symbols: UInt16[np.ndarray, "S"]
    offsets: Int[np.ndarray, "V+1"]
    """Token v has the symbols from `offsets[v]` to `offsets[v + 1]`; an id without a token has none."""
    special: frozenset[int]
    """Tokens that are no text: ends, beginnings, roles."""
    ends: frozenset[int]
    """Those that end an answer: the end of text, and what the chat template puts behind one."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, ids: Sequence[int]) -> tuple[UInt16[np.ndarray, "s"], Int[np.ndarray, "n"]]:
        """The bytes of some tokens, joined, and where each token ends among them."""
        tokens = np.asarray(ids, dtype=np.int64)
        starts = self.offsets[tokens]
        lengths = self.offsets[tokens + 1] - starts
        ends = np.cumsum(lengths)
        places = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return self.symbols[places], ends

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token; none of an id beyond the tokenizer's, which a head may have."""
        if token >= len(self):
            return b""
        return self.symbols[self.offsets[token] : self.offsets[token + 1]].astype(np.uint8).tobytes()

    def answer(self, ids: Sequence[int]) -> tuple[UInt16[np.ndarray, "s"], Int[np.ndarray, "n"]]:
        """An answer's bytes and where each token ends, with `END` in the place of the token that ends it.

        That is the last of `ends`, if nothing but white space comes behind it; what comes behind it
        belongs to the template and is left out: fewer ends than tokens.
        """
        place = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self.ends), None)
        if place is None or self.of(ids[place + 1 :])[0].astype(np.uint8).tobytes().strip():
            return self.of(ids)
        symbols, ends = self.of(ids[:place])
        return np.append(symbols, np.uint16(END)), np.append(ends, len(symbols) + 1)

    def texts(self) -> list[bytes]:
        """The bytes of each token, by id."""
        whole = self.symbols.astype(np.uint8).tobytes()
        bounds = self.offsets.tolist()
        return [whole[a:b] for a, b in itertools.pairwise(bounds)]


def token_bytes(tokenizer: Any, role: str = "model") -> TokenBytes:
    """Read a tokenizer of the two kinds whose tokens are bytes.

    Byte-level (GPT-2, Llama 3, Qwen: each character of a token stands for one byte) and SentencePiece-like
    (Llama 2, Gemma: text with a sign for the space, and `<0x0A>` for single bytes).

    Args:
        tokenizer: a fast one of transformers.
        role: whose it is, for errors.

    Raises:
        ValueError: a tokenizer that loses bytes (WordPiece), or has no file that says what its tokens are.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"The tokenizer of the {role}, {type(tokenizer).__name__}, does not tell the bytes of its "
            "tokens: train.vocabulary: bytes needs a fast tokenizer (tokenizer.json)."
        )
    described = json.loads(backend.to_str())
    kinds = {part.get("type") for part in _parts(described.get("decoder"))}
    is_byte_level = "ByteLevel" in kinds
    if not is_byte_level and not kinds & {"ByteFallback", "Metaspace"}:
        raise ValueError(
            f"The tokenizer of the {role} is neither byte-level nor SentencePiece-like (its decoder: "
            f"{', '.join(sorted(map(str, kinds)))}), so the bytes of its tokens are not known: "
            "train.vocabulary: bytes has no effect on it. Choose a model with one of these two kinds."
        )
    added = {entry["id"]: entry for entry in described.get("added_tokens", [])}
    vocabulary = tokenizer.get_vocab()
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    alphabet = _byte_level_alphabet()
    for token, number in vocabulary.items():
        if number in added:
            found[number] = token.encode()
        elif is_byte_level:
            found[number] = _of_byte_level(token, alphabet)
        else:
            found[number] = _of_pieces(token)
    special = {number for number, entry in added.items() if entry["special"]} | set(tokenizer.all_special_ids)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in found])]).astype(np.int64)
    symbols = np.frombuffer(b"".join(found), dtype=np.uint8).astype(np.uint16)
    return TokenBytes(symbols, offsets, frozenset(special), _ends(tokenizer, special))


def end_of_answer(tokenizer: Any, table: TokenBytes, chat: bool) -> int | None:
    """The token that ends an answer: the end of text, or what the chat template puts behind a turn."""
    return (_turn_end(tokenizer, table.special) if chat else None) or tokenizer.eos_token_id


def _ends(tokenizer: Any, special: Collection[int]) -> frozenset[int]:
    return frozenset({tokenizer.eos_token_id, _turn_end(tokenizer, special)} - {None})


def _turn_end(tokenizer: Any, special: Collection[int]) -> int | None:
    """The last special token that the chat template writes."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        with rendering():
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program, and raises anything; the rows will say what
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((token for token in reversed(ids) if token in special), None)


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    """A decoder's steps, of sequences too."""
    if isinstance(decoder, dict):
        yield decoder
        for part in decoder.get("decoders", []):
            yield from _parts(part)


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level token: printable ones stand for themselves, the others
    for the characters from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _of_byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    # A token with another character is text as it stands, as the decoder takes it.
    return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()


def _of_pieces(token: str) -> bytes:
    single = _BYTE.fullmatch(token)
    return bytes([int(single[1], 16)]) if single else token.replace(_SPACE, " ").encode()
