"""The probe in training: by the trainer in Python, and by the command line before a model loads."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from PIL import Image
from tiny_models import SHAPE, tiny_pair, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import SFTConfig, SFTTrainer

from hpd import DistillConfig, DistillTrainer
from hpd.cli import app
from hpd.config.load import load_recipe
from hpd.training.plan import plan
from hpd.training.settings import check_special_tokens

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    **SHAPE,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
GRIFFIN = {
    "lru_width": 32,
    "attention_window_size": 64,
    "logits_soft_cap": 2.0,
    "num_hidden_layers": 3,
    "block_types": ["recurrent", "recurrent", "attention"],
}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "logit_scale": 0.5, "no_bias": True}
IDS = [
    [1] + [20 + (7 * i + 3 * j) % 250 for j in range(n)] for i, n in enumerate((9, 21, 14, 30, 5, 12, 8, 9))
]
ROWS = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in IDS])


def tiny(family: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "max_length": 64,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return {**defaults, **options}


def make(student: Any, teacher: Any, folder: Path, rows: Any = ROWS, **options: Any) -> DistillTrainer:
    own = ("method", "peft_config", "processing_class")
    given = {name: options.pop(name) for name in own if name in options}
    return DistillTrainer(
        model=student,
        teacher=teacher,
        args=DistillConfig(**settings(folder, **options)),
        train_dataset=rows,
        eval_dataset=rows,
        **{"method": "forward_kl", "processing_class": tiny_tokenizer(False), **given},
    )


def forward_kl(student: Any, teacher: Any) -> float:
    """Mean over tokens, from the models' own logits."""
    with torch.no_grad():
        log_q, log_p = (
            torch.cat(
                [model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in IDS]
            )
            for model in (student, teacher)
        )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def main(arguments: list[str]) -> int:
    """The exit code of the command line."""
    try:
        app(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# ---- heads


@pytest.mark.parametrize(("family", "options"), [("recurrent_gemma", GRIFFIN), ("mpt", MPT)])
def test_other_heads_give_the_loss_of_the_models_own_logits(family, options, tmp_path):
    student, teacher = tiny(family, 0, **options), tiny(family, 1, **options)
    right = forward_kl(student, teacher)
    trainer = make(student, teacher, tmp_path)
    assert [v.level for v in trainer.verdicts if v.topic == "head"] == ["warning", "warning"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-4, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < right


def test_a_copied_student_with_its_own_logits_is_its_own_teacher(tmp_path):
    student = tiny("mpt", **MPT)
    start = copy.deepcopy(student)
    trainer = make(student, "self", tmp_path, method="sft")
    trainer.train()
    metrics = make(student, start, tmp_path / "b").evaluate()
    assert trainer.evaluate()["eval_forward_kl"] == pytest.approx(metrics["eval_forward_kl"], rel=1e-4)
    assert metrics["eval_forward_kl"] > 1e-5


# ---- packing


@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_rows_that_leak_into_each_other_are_refused(role, layout, tmp_path):
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    models = {"student": tiny("llama"), "teacher": tiny("llama", 1), role: tiny("bloom", **sizes)}
    with pytest.raises(
        ValueError, match=rf"packing: the {role} \(BloomForCausalLM\) reads a row behind"
    ) as found:
        make(models["student"], models["teacher"], tmp_path, **layout)
    assert "set train.packing, train.eval_packing and train.padding_free to false" in str(found.value)
    trainer = make(models["student"], models["teacher"], tmp_path)
    right = forward_kl(models["student"], models["teacher"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-4)


def test_wrapped_packing_is_warned_of(tmp_path):
    trainer = make(tiny("llama"), tiny("llama", 1), tmp_path, packing=True, packing_strategy="wrapped")
    (verdict,) = [v for v in trainer.verdicts if v.level == "warning"]
    assert "packing_strategy: wrapped joins rows into one text" in verdict.text


def test_validation_rows_packed_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train.eval_packing packs the validation rows"):
        make(tiny("llama"), tiny("llama", 1), tmp_path, eval_packing=True)


# ---- mixtures of experts


EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("layout", [{}, {"packing": True}])
@pytest.mark.parametrize("family", EXPERTS)
def test_sft_of_a_mixture_of_experts_is_trl_s(family, layout, tmp_path):
    options = {**EXPERTS[family], "router_aux_loss_coef": 0.1, "output_router_logits": True}
    theirs = SFTTrainer(
        model=tiny(family, **options),
        args=SFTConfig(**settings(tmp_path / "theirs", **layout)),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tiny_tokenizer(False),
    )
    ours = make(
        tiny(family, **options), tiny(family, 1, **options), tmp_path / "ours", method="sft", **layout
    )
    logged: list[list[dict[str, float]]] = []
    for trainer in (theirs, ours):
        trainer.train()
        logged.append(
            [{k: log[k] for k in ("loss", "aux_loss", "grad_norm")} for log in trainer.state.log_history[:3]]
        )
    for mine, other in zip(*logged, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    evaluated = [
        {k: trainer.evaluate()[k] for k in ("eval_loss", "eval_aux_loss")} for trainer in (theirs, ours)
    ]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-5)
    assert logged[1][0]["aux_loss"] > 1.0


def test_a_coefficient_of_zero_turns_the_balancing_loss_off(tmp_path):
    options = {**EXPERTS["mixtral"], "router_aux_loss_coef": 0.1, "output_router_logits": True}
    student, teacher = (tiny("mixtral", seed, **options) for seed in (0, 1))
    trainer = make(student, teacher, tmp_path, router_aux_loss_coef=0.0)
    metrics = trainer.evaluate()
    assert "eval_aux_loss" not in metrics
    assert metrics["eval_loss"] == pytest.approx(forward_kl(student, teacher), rel=1e-4)


# ---- prompt tuning


def test_prompt_tuning_reads_the_label_positions(tmp_path):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    trainer = make(tiny("llama"), tiny("llama", 1), tmp_path, method="sft", peft_config=adapter)
    model = trainer.model.eval()
    losses = []
    with torch.no_grad():
        for ids in IDS:
            log_q = model(input_ids=torch.tensor([ids])).logits[0, 8:-1].log_softmax(-1)
            losses.append(-log_q.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    right = torch.cat(losses).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < right


def test_prompt_tuning_of_packed_rows_is_refused(tmp_path):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    with pytest.raises(
        ValueError, match=r"the student \(LlamaForCausalLM with its adapter\) reads a row behind"
    ):
        make(tiny("llama"), tiny("llama", 1), tmp_path, peft_config=adapter, packing=True)


# ---- images


_SEEING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)


def seeing_processor() -> Any:
    tokenizer = tiny_tokenizer(False)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=_SEEING_TEMPLATE,
    )


def seeing_model(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, **ends, vocab_size=301, initializer_range=0.1),
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.1),
        image_token_index=300,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config).eval()


def seen_rows() -> Dataset:
    numbers = np.random.default_rng(0)
    user = {"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "what"}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": "one two"}]}
    return Dataset.from_list(
        [
            {
                "messages": [user, assistant],
                "images": [Image.fromarray(numbers.integers(0, 255, (16, 16, 3), dtype=np.uint8))],
            }
            for _ in range(4)
        ]
    )


def test_images_reach_a_student_that_sees(tmp_path):
    student, rows = seeing_model(0), seen_rows()
    options = {"max_length": None, "method": "sft", "processing_class": seeing_processor()}
    trainer = make(student, seeing_model(1), tmp_path, rows, **options)
    batch = trainer.data_collator.inner([rows[i] for i in range(4)])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        log_q, blind = (
            student(**{**batch, "pixel_values": pixels}).logits[:, :-1].log_softmax(-1)
            for pixels in (batch["pixel_values"], torch.zeros_like(batch["pixel_values"]))
        )
    nll = -log_q.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    right = nll[labels != -100].mean().item()
    assert not torch.allclose(log_q, blind, atol=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-5)
    before = [parameter.detach().clone() for parameter in student.model.vision_tower.parameters()]
    trainer.train()
    moved = [
        not torch.equal(a, b) for a, b in zip(before, student.model.vision_tower.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) // 2


def test_a_teacher_that_does_not_see_is_refused(tmp_path):
    options = {"max_length": None, "processing_class": seeing_processor()}
    with pytest.raises(
        ValueError, match="the teacher, LlamaForCausalLM, does not: give a vision-language model"
    ):
        make(seeing_model(0), tiny("llama", vocab_size=301), tmp_path, seen_rows(), **options)


# ---- tokens that a model does not have


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_added_tokens_without_embeddings_are_named(role, tmp_path):
    tokenizer = tiny_tokenizer(False)
    tokenizer.add_tokens(["<think>"])
    number = tokenizer.convert_tokens_to_ids("<think>")
    models = {"student": tiny("llama"), "teacher": tiny("llama", 1)}
    for other in models:
        if other != role:
            models[other].resize_token_embeddings(number + 1)
    rows = Dataset.from_list([{"text": "one <think> two"}] * 4)
    with pytest.raises(
        ValueError, match=rf"'<think>' \(number {number}\), and the {role}'s embeddings"
    ) as found:
        make(
            models["student"],
            models["teacher"],
            tmp_path,
            rows,
            processing_class=tokenizer,
            vocabulary="shared_prefix",
        )
    assert f"resize_token_embeddings({number + 1}) on the {role}" in str(found.value)
    # Rows without the token are fine.
    rows = Dataset.from_list([{"text": "one two"}] * 4)
    make(
        models["student"],
        models["teacher"],
        tmp_path,
        rows,
        processing_class=tokenizer,
        vocabulary="shared_prefix",
    )


# ---- packages and special tokens


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_token_that_the_tokenizer_lacks_is_named(name, tmp_path):
    args = DistillConfig(**settings(tmp_path, **{name: "</s>"}))
    with pytest.raises(
        ValueError, match=rf"train.{name} is '</s>', which the student's tokenizer does not have"
    ):
        check_special_tokens(args, tiny_tokenizer(False))


# ---- the command line


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def write_recipe(folder: Path, pair: Any, train: str = "", rows: str = "one two") -> Path:
    row = json.dumps({"prompt": "say one: ", "completion": rows})
    (folder / "rows.jsonl").write_text((row + "\n") * 8)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"student: {pair[0]}\nteacher: {pair[1]}\nmethod: forward_kl\n"
        f"data: {{path: {folder / 'rows.jsonl'}}}\n"
        f"train: {{max_steps: 2, max_length: 128, use_cpu: true{train}}}\noutput_dir: {folder / 'run'}\n"
    )
    return recipe


def refuse_to_load(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (", optim: adamw_bnb_8bit", "train.optim: adamw_bnb_8bit needs the package bitsandbytes"),
        (", optim: grokadamw", "train.optim: grokadamw needs the package grokadamw"),
        (", use_liger_kernel: true", "train.use_liger_kernel needs the package liger_kernel"),
        (", eos_token: </s>", "train.eos_token is '</s>'"),
        (", eval_packing: true", "train.eval_packing packs the validation rows"),
    ],
)
@pytest.mark.parametrize("switches", [["--dry-run"], []])
def test_settings_are_refused_before_a_model_loads(
    pair, tmp_path, monkeypatch, capsys, train, said, switches
):
    missing = ("bitsandbytes", "grokadamw", "liger_kernel")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find(name))
    monkeypatch.setattr("hpd.training.single.load_model", refuse_to_load)
    assert main(["train", str(write_recipe(tmp_path, pair, train)), *switches]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "Traceback" not in error


def test_a_generation_configuration_that_cannot_be_written_is_repaired_at_save(pair, tmp_path, capsys):
    """As in the files of Vicuna and many tunes: do_sample is false, and there is a temperature."""
    student = shutil.copytree(pair[0], tmp_path / "student")
    (student / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 3}'
    )
    recipe = write_recipe(tmp_path, (student, pair[1]), ", save_steps: 1")
    assert main(["train", str(recipe), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "the student's generation_config.json has temperature: 0.9, top_p: 0.6" in shown
    assert main(["train", str(recipe)]) == 0
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert "temperature" not in saved
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.do_sample in (False, None)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_added_tokens_are_found_before_a_model_loads(pair, tmp_path, monkeypatch, capsys, role):
    monkeypatch.setattr("hpd.training.single.load_model", refuse_to_load)
    folders = {
        name: shutil.copytree(folder, tmp_path / name)
        for name, folder in zip(("student", "teacher"), pair, strict=True)
    }
    for name, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<think>"])
        tokenizer.save_pretrained(folder)
        if name != role:
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.resize_token_embeddings(len(tokenizer))
            model.save_pretrained(folder)
    recipe = write_recipe(
        tmp_path, tuple(folders.values()), ", vocabulary: shared_prefix", rows="<think> one two"
    )
    assert main(["train", str(recipe)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"'<think>' (number 300), and the {role}'s embeddings have 300 rows" in error
    assert f"Call resize_token_embeddings(301) on the {role}" in error


def test_packing_of_a_leaking_student_is_refused_before_anything_is_measured(pair, tmp_path, capsys):
    student = tmp_path / "student"
    shutil.copytree(pair[0], student)
    bloom = tiny("bloom", hidden_size=32, n_layer=2, n_head=4)
    for weights in student.glob("*.safetensors"):
        weights.unlink()
    bloom.save_pretrained(student)
    recipe = write_recipe(tmp_path, (student, pair[1]), ", packing: true")
    assert main(["train", str(recipe)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "packing: the student (BloomForCausalLM) reads a row behind another unlike the row alone" in error
    assert not (tmp_path / "run").exists()


def test_verdicts_of_packing_are_in_the_plan(pair, tmp_path):
    planned = plan(
        load_recipe(write_recipe(tmp_path, pair, ", packing: true, packing_strategy: wrapped"), [])
    )
    (verdict,) = [v for v in planned.verdicts if v.topic == "packing"]
    assert verdict.level == "warning"
