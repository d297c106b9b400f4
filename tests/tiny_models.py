"""Tiny student-teacher pairs on disk: real architectures, a real byte-level tokenizer with a chat template.

The student is random; the teacher has learned to count a little, so that there is something to learn from it
within a few steps. Both differ in width and depth, as real pairs do, so that code which mixes them up fails.
Sizes are those of a unit test; heads, tying and special tokens are those of the family.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["ARCHITECTURES", "NUM_TOKENS", "tiny_model", "tiny_pair", "tiny_tokenizer"]

NUM_TOKENS = 300
"""Tokens that the tokenizer defines; a head may have more rows."""

# transformers' class for Qwen2 adds <|endoftext|> where it is missing, so that is what pads here too, as in
# Qwen2.5.
PAD, BOS, START, EOS = SPECIAL_TOKENS = ("<|endoftext|>", "<|bos|>", "<|im_start|>", "<|im_end|>")

_NUM_READING_STEPS = 12
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_TEXT = (
    "system user assistant what is the sum of the two numbers? the answer is four.",
    *(f"say {_NUMBERS[i]}: {' '.join(_NUMBERS[i:j])}" for i in range(10) for j in range(i + 1, 11, 2)),
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% "
    "endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SHAPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Far above the usual 0.02, which leaves a model of this width next to uniform.
    "initializer_range": 0.1,
}
_STUDENT_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_TEACHER_SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}

# What tells each family from the others where a loss can see it: tied heads, biases, logit caps, windows, a
# leading BOS.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {"student": {"tie_word_embeddings": True}, "bos": False},
    "qwen3": {"student": {"tie_word_embeddings": True}, "bos": False},
    "qwen3_moe": {
        "both": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "bos": False,
    },
    "llama": {"student": {"tie_word_embeddings": True}, "bos": True},
    "mistral": {"both": {"sliding_window": None}, "bos": True},
    "gemma3_text": {
        "both": {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "final_logit_softcapping": 4.0,
        },
        "student": {"layer_types": ["sliding_attention", "full_attention"]},
        "teacher": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        "bos": True,
    },
}


def tiny_pair(
    architecture: str,
    folder: Path,
    *,
    student_vocab: int = NUM_TOKENS,
    teacher_vocab: int = NUM_TOKENS,
    **shape: int,
) -> tuple[Path, Path]:
    """Save a student and a teacher of one family, with one tokenizer, under `folder`.

    Args:
        architecture: a name of ARCHITECTURES (a transformers model type).
        student_vocab, teacher_vocab: rows of each head, >= NUM_TOKENS; those beyond pad it, as in Qwen2.5.
        shape: fields of both configurations, in place of those here.

    Returns:
        The two folders.
    """
    student, teacher = Path(folder) / "student", Path(folder) / "teacher"
    tiny_model(architecture, student, vocab=student_vocab, role="student", seed=0, **shape)
    tiny_model(architecture, teacher, vocab=teacher_vocab, role="teacher", seed=1, **shape)
    return student, teacher


def tiny_model(
    architecture: str,
    folder: Path,
    *,
    vocab: int = NUM_TOKENS,
    role: str = "student",
    seed: int = 0,
    **shape: int,
) -> Path:
    """Save one model and its tokenizer; `shape` are fields of its configuration, in place of those here."""
    family = ARCHITECTURES[architecture]
    tokenizer = tiny_tokenizer(family["bos"])
    config = AutoConfig.for_model(
        architecture,
        **(_STUDENT_SHAPE if role == "student" else _TEACHER_SHAPE),
        **{"tie_word_embeddings": False, **family.get("both", {}), **family.get(role, {})},
        vocab_size=vocab,
        **{**SHAPE, **shape},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    if role == "teacher":
        _read(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer(leading_bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of NUM_TOKENS tokens with a ChatML-like template; any text round-trips."""
    prefix = "{{ bos_token }}" if leading_bos else ""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe(leading_bos)),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[START],
        chat_template=prefix + _CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _read(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """A few steps of maximum likelihood on the text that the tokenizer comes from."""
    batch = tokenizer([text + EOS for text in _TEXT], return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(_NUM_READING_STEPS):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()


@functools.cache
def _trained_bpe(leading_bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    if leading_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
        )
    return tokenizer.to_str()
