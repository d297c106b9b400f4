"""The situations of TRL's own tests of SFTTrainer (tests/test_sft_trainer.py), by the names of those tests.

Names and inputs are theirs; models and rows from the Hub are replaced by small ones of the same families and
formats (helpers/trl_inputs.py). What is checked is ours: see tests/training/test_trl_habits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from helpers.trl_inputs import SPECIAL, rows_of, save_family

__all__ = [
    "DIFFERENT",
    "ELSEWHERE",
    "PREPARED",
    "REFUSED",
    "REFUSED_BY_BOTH",
    "TRAINED",
    "Situation",
    "folder_of",
]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Situation(NamedTuple):
    """What a test gives to a trainer."""

    rows: str | Callable[[Path], Any] = "standard_language_modeling"
    """A kind of `rows_of`, or the data set of a model's folder."""
    family: str = "qwen2"
    template: str | None = ""
    settings: Mapping[str, Any] = _NOTHING
    options: Callable[[Path], dict[str, Any]] = lambda folder: {}
    """Further arguments of the trainer, of a model's folder; `model` and `teacher` replace the path."""
    evaluates: Callable[[], Any] | None = None
    """What `evaluate` is given after training."""


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def _adapted(**options: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"peft_config": LoraConfig(**options)}


def _quantized(folder: Path, **options: Any) -> Any:
    """The folder's model in 4 bits that compute in float16, as TRL's tests have it."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", quantization_config=kind)


def _qlora(folder: Path) -> dict[str, Any]:
    adapter = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=8, bias="none", task_type="CAUSAL_LM")
    return {"model": _quantized(folder), "peft_config": adapter}


def _with_eval(rows: Any = None, **more: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"eval_dataset": rows() if rows else _held_out(), **more}


def _held_out() -> Dataset:
    return rows_of("standard_language_modeling", "test")


def _tokenized(folder: Path) -> Dataset:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return rows_of("standard_language_modeling").map(
        lambda row: tokenizer(row["text"]), remove_columns=["text"]
    )


def _streamed(kind: str) -> Callable[[Path], Any]:
    return lambda folder: rows_of(kind).to_iterable_dataset()


def _capitals(folder: Path) -> Dataset:
    rows = rows_of("conversational_language_modeling")
    return rows.add_column("chat_template_kwargs", [{"role_capital": bool(i % 2)} for i in range(len(rows))])


def _user_in_completion(folder: Path) -> Dataset:
    def more(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": [*row["completion"], row["prompt"][0], row["completion"][0]]}

    return rows_of("conversational_prompt_completion").map(more)


def _tools_as_objects(folder: Path) -> Dataset:
    import json

    return rows_of("toolcall").map(lambda row: {"tools": json.loads(row["tools"])})


def _listed(*rows: dict[str, Any]) -> Callable[[Path], Dataset]:
    return lambda folder: Dataset.from_list(list(rows))


def _transformed(folder: Path) -> Dataset:
    return Dataset.from_dict({"text": ["hello world"]}).with_transform(
        lambda rows: {"text": [f"{text} <AUG>" for text in rows["text"]]}
    )


_SETS: dict[str, Callable[[], Any]] = {
    "dataset": _held_out,
    "iterable_dataset": lambda: _held_out().to_iterable_dataset(),
    "dataset_dict": lambda: DatasetDict({"data1": _held_out(), "data2": _held_out()}),
    "iterable_dataset_dict": lambda: IterableDatasetDict(
        {"data1": _held_out().to_iterable_dataset(), "data2": _held_out().to_iterable_dataset()}
    ),
    "dict_of_dataset": lambda: {"data1": _held_out(), "data2": _held_out()},
    "dict_of_iterable_dataset": lambda: {
        "data1": _held_out().to_iterable_dataset(),
        "data2": _held_out().to_iterable_dataset(),
    },
}

_PROMPTED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prompt_tuning": lambda folder: {
        "peft_config": PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, tokenizer_name_or_path=str(folder)
        )
    },
    "prefix_tuning": lambda folder: {
        "peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    },
    "prompt_encoder": lambda folder: {
        "peft_config": PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32
        )
    },
}


def _eight() -> PromptEncoderConfig:
    return PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)


_EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
_CHECKPOINTED = {"gradient_checkpointing": True}
_MASKS = {"input_ids": [41, 42, 43, 44], "assistant_masks": [0, 0, 1, 1]}
_LANGUAGE, _TALK = "standard_language_modeling", "conversational_language_modeling"
_KINDS = (_LANGUAGE, _TALK, "standard_prompt_completion", "conversational_prompt_completion")
_HUB = {
    "tiny-Cohere2ForCausalLM": "cohere2",
    "tiny-Glm4MoeForCausalLM": "glm4_moe",
    "tiny-GptOssForCausalLM": "gpt_oss",
    "tiny-Qwen2ForCausalLM-2.5": "qwen2",
    "tiny-Qwen3MoeForCausalLM": "qwen3_moe",
    "tiny-NemotronHForCausalLM-nano": "nemotron_h",
    "tiny-Olmo3ForCausalLM": "olmo3",
    "tiny-Lfm2ForCausalLM": "lfm2",
    "tiny-Lfm2ForCausalLM-2.5": "lfm2",
}

TRAINED: dict[str, Situation] = {
    **{f"test_train[{name}]": Situation(family=family) for name, family in _HUB.items()},
    **{f"test_train_dataset_format[{kind}]": Situation(kind) for kind in _KINDS},
    "test_train_gpt_oss": Situation("harmony_language_modeling", "gpt_oss", "harmony"),
    "test_train_model": Situation(options=lambda folder: {"model": _loaded(folder)}),
    "test_train_nll_loss": Situation(settings={"loss_type": "nll"}),
    "test_train_nll_loss_peft": Situation(settings={"loss_type": "nll"}, options=_adapted()),
    "test_train_with_formatting_func": Situation(
        "standard_implicit_prompt_preference",
        options=lambda folder: {
            "formatting_func": lambda row: f"### Chosen: {row['chosen']}\n### Rejected: {row['rejected']}"
        },
    ),
    "test_train_dense_with_peft_config_lora": Situation(options=_adapted()),
    "test_train_moe_with_peft_config": Situation(
        family="gpt_oss",
        options=_adapted(target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    ),
    "test_train_peft_model": Situation(
        options=lambda folder: {"model": get_peft_model(_loaded(folder), LoraConfig())}
    ),
    "test_train_with_peft_config_and_gradient_checkpointing": Situation(
        settings=_CHECKPOINTED, options=_adapted()
    ),
    **{
        f"test_train_with_{name}gradient_checkpointing_reentrant[{flag}]": Situation(
            settings={**_CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": flag}},
            options=options,
        )
        for flag in (True, False)
        for name, options in (("peft_config_and_", _adapted()), ("", lambda folder: {}))
    },
    "test_train_with_non_chatml_conversational_data": Situation("from_value"),
    "test_train_with_pretokenized_data": Situation(_tokenized),
    "test_train_with_iterable_dataset": Situation(_streamed(_LANGUAGE)),
    "test_train_padding_free": Situation(settings={"padding_free": True, "max_length": None}),
    **{
        f"test_train_packing[{strategy}]": Situation(
            settings={"packing": True, "packing_strategy": strategy, "max_length": 10}
        )
        for strategy in ("bfd", "wrapped")
    },
    "test_train_with_chat_template_kwargs": Situation(_capitals, template="role_capital"),
    "test_train_assistant_only": Situation(_TALK, "qwen3", settings={"assistant_only_loss": True}),
    "test_train_completion_only": Situation(
        "conversational_prompt_completion", "qwen3", settings={"completion_only_loss": True}
    ),
    "test_train_completion_only_harmony": Situation(
        "harmony_prompt_completion", "gpt_oss", "harmony", {"completion_only_loss": True}
    ),
    "test_train_assistant_only_and_completion_only": Situation(
        _user_in_completion,
        "qwen3",
        settings={"assistant_only_loss": True, "completion_only_loss": True},
    ),
    "test_train_assistant_only_iterable_dataset": Situation(
        _streamed(_TALK), "qwen3", settings={"assistant_only_loss": True}
    ),
    "test_train_with_set_chat_template_from_path": Situation(
        _TALK, "gpt_neox", None, {"chat_template_path": "FOLDER/template.jinja", "save_strategy": "steps"}
    ),
    "test_train_toolcall_data": Situation("toolcall", template="tools", settings={"max_length": 512}),
    "test_train_toolcall_data_as_json": Situation(
        _tools_as_objects, template="tools", settings={"max_length": 512}
    ),
    "test_train_with_eval": Situation(settings=_EVALUATED, options=_with_eval()),
    **{f"test_evaluate_with_eval_dataset[{kind}]": Situation(evaluates=make) for kind, make in _SETS.items()},
    "test_train_with_metric_for_best_model": Situation(
        settings={**_EVALUATED, "metric_for_best_model": "eval_mean_token_accuracy"}, options=_with_eval()
    ),
    "test_train_with_multiple_eval_dataset": Situation(
        settings=_EVALUATED, options=_with_eval(_SETS["dict_of_dataset"])
    ),
    "test_train_with_compute_metrics": Situation(
        settings=_EVALUATED, options=_with_eval(compute_metrics=lambda prediction: {"my_metric": 0.123})
    ),
    "test_train_with_gradient_checkpointing": Situation(settings=_CHECKPOINTED),
    "test_train_with_peft_config_prompt_tuning[prefix_tuning]": Situation(
        settings={"gradient_checkpointing": False}, options=_PROMPTED["prefix_tuning"]
    ),
    "test_trust_remote_code": Situation(family="remote", settings={"trust_remote_code": True}),
    **{
        f"test_train_vlm_text_only_data[{kind}-tiny-Qwen2_5_VLForConditionalGeneration]": Situation(
            kind,
            "llava",
            options=lambda folder: {"teacher": AutoModelForImageTextToText.from_pretrained(folder)},
        )
        for kind in _KINDS
    },
    **{
        f"test_sft_trainer_transformers_mp[{family}-{packed}]": Situation(
            family=family,
            settings={"packing": packed, "max_length": 128, "bf16": True},
            options=lambda folder: {"model": _loaded(folder), "eval_dataset": _held_out()},
        )
        for family in ("llama", "mistral")
        for packed in (True, False)
    },
    "test_peft_with_quantization": Situation(
        settings={"bf16": True},
        options=lambda folder: {
            "model": _quantized(folder, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4"),
            "peft_config": LoraConfig(),
        },
    ),
    **{
        f"test_sft_trainer_transformers_mp_gc_peft_qlora[{family}-{packed}-{kwargs}]": Situation(
            family=family,
            settings={
                **_CHECKPOINTED,
                "packing": packed,
                "max_length": 128,
                "bf16": True,
                "gradient_checkpointing_kwargs": kwargs,
            },
            options=lambda folder: {**_qlora(folder), "eval_dataset": _held_out()},
        )
        for family in ("llama", "mistral")
        for packed in (True, False)
        for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True})
    },
    **{
        f"test_sft_trainer_with_chat_format_qlora[{family}-{packed}]": Situation(
            _TALK, family, settings={"packing": packed, "max_length": 128, "bf16": True}, options=_qlora
        )
        for family in ("llama", "mistral")
        for packed in (True, False)
    },
}
"""Trained by both: the same losses, the same weights moved, the same things logged."""

_FIRST_TOKEN = (
    "differs: TRL also learns a text's first token, from the virtual ones, and divides by the count without "
    "it; the same where the first token is no label, as in prompt-completion rows"
)
_TAGS = "differs: the model's tags are hpd and distillation"
DIFFERENT: dict[str, tuple[Situation, str]] = {
    "test_train_model_dtype": (
        Situation(settings={"model_init_kwargs": {"dtype": "float16"}}),
        "differs: step 1 is the same; then Adam with float16 states amplifies rounding",
    ),
    **{
        f"test_train_with_peft_config_prompt_tuning[{kind}]": (
            Situation(settings={"gradient_checkpointing": False}, options=_PROMPTED[kind]),
            _FIRST_TOKEN,
        )
        for kind in ("prompt_tuning", "prompt_encoder")
    },
    "test_prompt_tuning": (Situation(options=lambda folder: {"peft_config": _eight()}), _FIRST_TOKEN),
    "test_prompt_tuning_peft_model": (
        Situation(options=lambda folder: {"model": get_peft_model(_loaded(folder), _eight())}),
        _FIRST_TOKEN,
    ),
    "test_tag_added": (Situation(), _TAGS),
    "test_tag_added_peft": (Situation(options=_adapted()), _TAGS),
}
"""Trained by both, with a stated difference."""

PREPARED: dict[str, Situation] = {
    "test_init_with_training_arguments": Situation(),
    "test_eval_packing": Situation(settings={"packing": True, "max_length": 64}, options=_with_eval()),
    "test_only_train_packing": Situation(
        settings={"packing": True, "eval_packing": False, "max_length": 64}, options=_with_eval()
    ),
    "test_dataset_preparation_builds_labels_for_assistant_only_loss": Situation(
        _TALK, "qwen3", settings={"assistant_only_loss": True}
    ),
    "test_fully_masked_examples_dropped_after_truncation": Situation(
        _listed(
            {"input_ids": [41, 42, 43, 44, 45], "assistant_masks": [0, 0, 0, 1, 1]},
            {"input_ids": [46, 47, 48], "assistant_masks": [1, 1, 1]},
        ),
        settings={"max_length": 3},
    ),
    "test_dataset_truncated_to_max_length": Situation(settings={"max_length": 4}),
    "test_dataset_preparation_builds_labels_for_completion_only": Situation("standard_prompt_completion"),
    "test_dataset_preparation_respects_existing_labels": Situation(
        _listed(
            {**_MASKS, "labels": [41, -100, 43, -100]},
            {"input_ids": [45, 46], "assistant_masks": [1, 1], "labels": [-100, 46]},
        )
    ),
    "test_dataset_preparation_builds_labels_for_pretokenized_with_masks": Situation(
        _listed(_MASKS, {"input_ids": [45, 46, 47], "assistant_masks": [0, 1, 0]})
    ),
    "test_packing_carries_labels": Situation(
        "standard_prompt_completion", settings={"packing": True, "max_length": 64}
    ),
    **{
        f"test_init_with_eval_dataset[{kind}]": Situation(options=_with_eval(make))
        for kind, make in _SETS.items()
    },
    "test_init_with_eval_dataset[none]": Situation(),
}
"""Prepared by both: the same rows."""

REFUSED_BY_BOTH: dict[str, tuple[Situation, str]] = {
    "test_dataset_with_transform_requires_skip_prepare_dataset": (Situation(_transformed), "with_transform"),
    "test_padding_free_without_packing_and_max_length_raises": (
        Situation(settings={"max_length": 16, "padding_free": True}),
        "`max_length` is not enforced",
    ),
    "test_skip_prepare_dataset_with_masks_but_no_labels_raises": (
        Situation(_listed(_MASKS, _MASKS), settings={"dataset_kwargs": {"skip_prepare_dataset": True}}),
        "Add a 'labels' column",
    ),
    "test_train_dataset_required": (Situation(lambda folder: None), "train_dataset. is required"),
    "test_vision_dataset_with_text_model_raises": (
        Situation(_listed({"messages": [{"role": "user", "content": "look"}], "images": ["a.png"]})),
        "vision|images",
    ),
}

REFUSED: dict[str, tuple[Situation, str, str]] = {
    "test_train_dft_loss": (
        Situation(settings={"loss_type": "dft"}),
        "train.loss_type has no effect",
        "refused: the loss is that of method or terms",
    ),
    "test_train_with_set_chat_template_from_model": (
        Situation(_TALK, "gpt_neox", None, {"chat_template_path": "FOLDER/qwen2"}),
        r"student's head has 320 tokens and the teacher's 300.*vocabulary: shared_prefix",
        "refused: the other model's template brings tokens and pads the student's head, and the teacher's "
        "has none for them; a template in a file, or train.vocabulary: shared_prefix",
    ),
}
"""Refused here: what is given, the message, and the reason."""

_INTERNAL = "not the trainer's: a function inside TRL"
_SEEING = (
    "not a text distiller's; images do reach a student and a teacher that see "
    "(tests/training/test_probing.py)"
)
_LIGER = "refused where liger_kernel is not installed (its layers are for accelerators)"
ELSEWHERE: dict[str, tuple[int, str]] = {
    "TestDFTLoss": (1, _INTERNAL),
    "TestDataCollatorForLanguageModeling": (14, f"{_INTERNAL}, whose collator is used as it is"),
    "TestChunkedCrossEntropyLoss": (10, _INTERNAL),
    "TestPatchChunkedCELMHead": (67, _INTERNAL),
    "test_compute_loss_skip_logits_on_eval_without_metrics_with_liger": (1, _INTERNAL),
    "test_predict_does_not_skip_logits_with_liger": (1, _INTERNAL),
    "test_train_nll_loss_vlm": (9, _SEEING),
    "test_train_vlm": (9, _SEEING),
    "test_train_vlm_multi_image": (1, _SEEING),
    "test_train_vlm_prompt_completion": (3, _SEEING),
    "test_train_vlm_gemma_3n": (1, _SEEING),
    "test_train_with_liger": (1, _LIGER),
    "test_sft_trainer_with_liger": (4, _LIGER),
    "test_sft_trainer_transformers_mp_gc_device_map": (24, "needs several accelerators"),
    "test_train_offloading": (4, "needs an accelerator, and is refused by name without one"),
}
"""Not run here: how many, and why."""


def folder_of(situation: Situation, root: Path) -> Path:
    """The folder of the situation's model, saved at the first call."""
    folder = root / f"{situation.family}-{situation.template}"
    if folder.exists():
        return folder
    if situation.family in SPECIAL:
        return SPECIAL[situation.family](folder)
    return save_family(situation.family, folder, situation.template)
