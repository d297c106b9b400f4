"""Models and rows of the shapes that TRL's own tests of SFTTrainer take from the Hub, made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import NUM_TOKENS, SHAPE, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

__all__ = ["FAMILIES", "SPECIAL", "TEMPLATES", "rows_of", "save_family"]

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": _TWO_KINDS,
    "glm4_moe": {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_neox": {},
    "gpt_oss": {**_TWO_KINDS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": {},
    "mistral": {},
    "nemotron_h": {
        **_ROUTED,
        "layers_block_type": ["mamba", "moe", "attention"],
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "olmo3": _TWO_KINDS,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4},
}
"""transformers' model types, and what makes each a small one."""

_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **SHAPE}

_TURN = (
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ BODY + '<|im_end|>' }}{% endgeneration %}{% else %}{{ BODY + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
_OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CALLS = "(m['content'] or '') + (('<call>' + m['tool_calls'] | tojson) if m.get('tool_calls') else '')"
_THOUGHTS = "(('<think>' + m['thinking'] + '</think>') if m.get('thinking') else '') + m['content']"
_PARTS = (
    "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}{% endmacro %}"
)
TEMPLATES = {
    "parts": (
        _PARTS
        + "{% for m in messages %}"
        + _TURN.replace("BODY", "body(m['content'])")
        + "{% endfor %}"
        + _OPENING
    ),
    "tools": (
        "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}" + _TURN.replace("BODY", _CALLS) + "{% endfor %}" + _OPENING
    ),
    "harmony": (
        "{{ '<|im_start|>system\n' + (model_identity or '') + ' ' + (reasoning_effort or '') + "
        "'<|im_end|>\n' }}{% for m in messages %}"
        + _TURN.replace("BODY", _THOUGHTS)
        + "{% endfor %}"
        + _OPENING
    ),
    "role_capital": (
        "{{ '<|im_start|>' + ('SYSTEM' if role_capital else 'system') + '\nbe kind<|im_end|>\n' }}"
        "{% for m in messages %}{{ '<|im_start|>' + (m['role'] | upper if role_capital else m['role']) + "
        "'\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + _OPENING
    ),
}
"""Chat templates by what rows ask of them."""

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def save_family(family: str, folder: Path, template: str | None = "") -> Path:
    """Save a small model and its tokenizer; `template` names one of TEMPLATES, None is no template."""
    tokenizer = tiny_tokenizer(leading_bos=False)
    if template != "":
        tokenizer.chat_template = None if template is None else TEMPLATES[template]
    config = AutoConfig.for_model(
        family,
        **{**_SHAPE, **FAMILIES[family]},
        vocab_size=NUM_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _save_remote(folder: Path) -> Path:
    """A model whose code lies beside its weights."""
    save_family("llama", folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    autos = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    file.write_text(json.dumps({**config, "model_type": "remote", "auto_map": autos}), encoding="utf-8")
    (folder / "remote.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class RemoteConfig(LlamaConfig):\n    model_type = 'remote'\n\n\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n",
        encoding="utf-8",
    )
    return folder


def _save_seeing(folder: Path) -> Path:
    """A vision-language model with its processor."""
    tokenizer = tiny_tokenizer(leading_bos=False)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATES["parts"]  # TRL hands a processor messages in parts
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, **ends, vocab_size=NUM_TOKENS + 1, initializer_range=0.1),
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        image_token_index=NUM_TOKENS,
        image_seq_length=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


SPECIAL: dict[str, Callable[[Path], Path]] = {"remote": _save_remote, "llava": _save_seeing}
"""Models that are more than a configuration."""


def rows_of(kind: str, split: str = "train") -> Dataset:
    """Seventeen rows to train on, or two to evaluate, of one of the kinds that TRL's tests use."""
    return Dataset.from_list([_row(kind, i) for i in (range(17) if split == "train" else range(17, 19))])


def _row(kind: str, i: int) -> dict[str, Any]:
    question = f"say {_NUMBERS[i % 10]}:"
    answer = " ".join(_NUMBERS[i % 10 : i % 10 + 1 + i % 4])
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    match kind:
        case "standard_language_modeling":
            return {"text": f"{question} {answer}"}
        case "conversational_language_modeling":
            return {"messages": [user, assistant]}
        case "standard_prompt_completion":
            return {"prompt": question, "completion": f" {answer}"}
        case "conversational_prompt_completion":
            return {"prompt": [user], "completion": [assistant]}
        case "standard_implicit_prompt_preference":
            return {"chosen": f"{question} {answer}", "rejected": f"{question} ten"}
        case "from_value":
            turns = [{"from": turn["role"], "value": turn["content"]} for turn in (user, assistant)]
            return {"conversations": turns}
        case "toolcall":
            return _tool_row(user, answer)
    thoughts = {**assistant, "thinking": f"the user wants {answer}"}
    asked = {"reasoning_effort": ("low", "high")[i % 2], "model_identity": "you count"}
    if kind == "harmony_language_modeling":
        return {"messages": [user, thoughts], "chat_template_kwargs": asked}
    assert kind == "harmony_prompt_completion"
    return {"prompt": [user], "completion": [thoughts], "chat_template_kwargs": asked}


def _tool_row(user: dict[str, str], answer: str) -> dict[str, Any]:
    number = {"type": "object", "properties": {"number": {"type": "integer"}}}
    count = {"name": "count", "description": "count on", "parameters": number}
    call = {"type": "function", "function": {"name": "count", "arguments": {"number": 1}}}
    turns = [
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "count", "content": answer},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, "tools": json.dumps([{"type": "function", "function": count}])}
