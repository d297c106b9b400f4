"""A tokenizer of the other kind than `tiny_models.tiny_tokenizer`: pieces with a sign for the space, bytes
for what no piece has, a begin, and another name for the end. And random text."""

from __future__ import annotations

import functools
import json
import random

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hpd.config import load_recipe

LAYOUTS = {
    "padded": {"per_device_train_batch_size": 4},
    "padding-free": {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
    "packed": {"per_device_train_batch_size": 1, "packing": True, "max_length": 64, "shuffle_dataset": False},
}


def slow(*values):
    """Parameters of a test that take the path of another one, for the slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


DIRECTIONS_AND_LAYOUTS = [
    (0, "padded"),
    (1, "packed"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in ((0, "padding-free"), (0, "packed"), (1, "padded"), (1, "padding-free"))
    ),
]
"""Of `mixed_pairs`: both directions by default, every layout in each in the slow tests."""
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_TEXT = [
    "the sum of two numbers is a number and the other one is three",
    "one two three four five six seven eight nine ten eleven twelve",
    "say one say two say three say one two and three four five",
]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + "
    "message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
# Letters, marks that combine, characters of two, three and four bytes, joined emoji, and what splits lines.
_CHARACTERS = (
    "abcde0123456789 ,.\n\t  "
    + "äéñøß"
    + "e\u0301\u0327"
    + "дом"
    + "日本語"
    + "👩\u200d👩\U0001f3fd🇫🇷"
    + "\x00\x1f\x7f\u2028"
)


@functools.cache
def _pieces() -> str:
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Replace(" ", "\u2581")
    raw.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    merges = [tuple(pair) for pair in model["merges"]]
    whole = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    whole.normalizer = normalizers.Replace(" ", "\u2581")
    whole.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    whole.add_special_tokens(list(SPECIAL))
    whole.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return whole.to_str()


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like, with byte fallback and a leading `<bos>`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_pieces()),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def random_text(rng: random.Random, longest: int = 40) -> str:
    """Up to `longest` characters: some words that both tokenizers know, the rest from everywhere."""
    out = ""
    while len(out) < rng.randint(0, longest):
        kind = rng.random()
        if kind < 0.4:
            out += rng.choice([" the", " sum", "one two", " three", "ten", " and"])
        elif kind < 0.9:
            out += rng.choice(_CHARACTERS)
        else:
            code = rng.randrange(0x110000)
            out += chr(code) if not 0xD800 <= code < 0xE000 and code != 0x2581 else "\ufffd"
    return out


def mixed_pair(folder, swapped: bool = False):
    """Student and teacher on disk: byte-level llama and SentencePiece-like gemma, or the other way round."""
    student, teacher = folder / "student", folder / "teacher"
    tiny_model("llama", teacher if swapped else student, role="teacher" if swapped else "student", seed=0)
    piece_model(student if swapped else teacher)
    return student, teacher


def mixed_pairs(folder):
    """A pair and one with the tokenizers swapped."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    return mixed_pair(folder / "a"), mixed_pair(folder / "b", swapped=True)


def bytes_recipe(pair, folder, given, **changes):
    """The recipe file of a student of `pair` on the rows `given`, two steps of two rows; mappings in
    `changes` add to its own."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    tree = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": str(data)},
        "train": {
            "vocabulary": "bytes", "max_steps": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1,
            "per_device_train_batch_size": 2, "max_length": 64,
        },
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    for key, value in changes.items():
        known = tree.get(key)
        tree[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return load_recipe(file)


def piece_model(folder) -> None:
    """Save a tiny model with `piece_tokenizer`."""
    tokenizer = piece_tokenizer()
    shape = {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "gemma3_text",
        **shape,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        final_logit_softcapping=4.0,
        max_position_embeddings=512,
        initializer_range=0.1,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
