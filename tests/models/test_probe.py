"""The probe of loaded models over families of transformers: simple heads, and packed rows kept apart.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_models import tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hpd.losses.products import logits
from hpd.models.forward import add_head_function, has_own_logits, label_inputs
from hpd.models.probe import check_savable, mend_generation, probe_head, probe_packing

pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB = 300
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
COMMON = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
EXPERTS = {
    **COMMON,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
GPT = {**SPECIAL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GRIFFIN = {
    **COMMON,
    "lru_width": 32,
    "attention_window_size": 64,
    "num_hidden_layers": 3,
    "block_types": ["recurrent", "recurrent", "attention"],
}
OPT = {
    **SPECIAL,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
}
MPT = {**SPECIAL, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "no_bias": True}
NEO = {
    **SPECIAL,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 128,
    "attention_types": [[["global", "local"], 1]],
}

# By model type: its configuration, if the head is simple, and if packed rows are kept apart on a CPU.
_PLAIN = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 granite cohere cohere2 "
    "stablelm starcoder2 persimmon nemotron smollm3 glm glm4 ernie4_5 hunyuan_v1_dense exaone4 seed_oss "
    "helium arcee apertus bitnet diffllama vaultgemma ministral doge nanochat jais2 lfm2 solar_open "
    "hyperclovax gpt_neox gpt_neox_japanese jetmoe flex_olmo"
)
_MIXTURES = (
    "mixtral qwen2_moe qwen3_moe olmoe granitemoe phimoe minimax_m2 glm4_moe ernie4_5_moe hunyuan_v1_moe "
    "granitemoeshared"
)
FAMILIES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    **dict.fromkeys(_PLAIN.split(), (COMMON, True, True)),
    **dict.fromkeys(_MIXTURES.split(), (EXPERTS, True, True)),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "ctrl"), (GPT, True, True)),
    **dict.fromkeys(("gptj", "codegen"), ({**GPT, "rotary_dim": 4}, True, True)),
    "gpt_neo": (NEO, True, True),
    "mpt": ({**MPT, "logit_scale": 0.5}, False, False),
    "recurrent_gemma": ({**GRIFFIN, "logits_soft_cap": 2.0}, False, False),
    "opt": (OPT, True, False),
    "bloom": (
        {**SPECIAL, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        True,
        False,
    ),
    "biogpt": (COMMON, True, False),
    "mamba": (COMMON, True, False),
    "rwkv": (COMMON, True, False),
    "gpt_oss": (EXPERTS, True, False),
    "minimax": (EXPERTS, True, False),
}
HANDFUL = ("llama", "gpt2", "qwen3_moe", "gemma2", "mpt", "recurrent_gemma", "opt", "bloom")


def tiny(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family][0], **options})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def own_and_handed_out(model: Any) -> tuple[Tensor, Tensor]:
    """The model's own logits `[T, V]` of a padded row, and those of what its head function is given."""
    ids = torch.tensor([[5, 9, 44, 17, 8, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    index = torch.tensor([0, 2, 4])
    with torch.no_grad():
        own = model(**inputs, use_cache=False).logits[0, index]
        scores = model(**label_inputs(inputs, index), head_function=lambda scores: scores)
    return own.float(), logits(scores)


def look(family: str) -> None:
    _, simple, apart = FAMILIES[family]
    model = tiny(family)
    head, packing = probe_head(model, "student"), probe_packing(model, "student")
    assert head.level == ("ok" if simple else "warning"), head.text
    assert packing.level == ("ok" if apart else "error"), packing.text
    assert has_own_logits(model) is not simple
    # Whichever way was chosen, the operator gets what the model computes.
    own, given = own_and_handed_out(model)
    torch.testing.assert_close(given, own, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", HANDFUL)
def test_the_probe_finds_heads_and_leaks(family: str) -> None:
    look(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in HANDFUL])
def test_the_probe_over_families_of_transformers(family: str) -> None:
    look(family)


def test_the_table_has_the_families_that_people_train() -> None:
    assert len(FAMILIES) >= 45


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt", "opt"])
def test_rounding_is_no_finding(family: str, dtype: torch.dtype) -> None:
    _, simple, apart = FAMILIES[family]
    model = tiny(family, dtype)
    assert probe_head(model, "student").level == ("ok" if simple else "warning")
    assert probe_packing(model, "student").level == ("ok" if apart else "error")


@pytest.mark.parametrize("offset", [0.0, -10.0], ids=["around 0", "far from 0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])
def test_mixed_precision_is_no_finding(family: str, dtype: torch.dtype, offset: float) -> None:
    """It widens what a model returns, so the dtype of the logits no longer tells how they were rounded; and
    those of a trained model lie far from 0, which rounding is relative to."""
    _, simple, _ = FAMILIES[family]
    model = add_head_function(tiny(family, dtype))
    _move_logits(model, offset)
    AcceleratorState._reset_state(reset_partial_state=True)  # a test before this one may have left its own
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, evaluation_mode=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert prepared(input_ids=torch.tensor([[5, 9]])).logits.dtype == torch.float32
    assert probe_head(prepared, "teacher").level == ("ok" if simple else "warning")


def _move_logits(model: Any, offset: float) -> None:
    """Add about `offset` times their spread to all logits of a text: a softmax does not see it."""
    ids = torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        towards = model.base_model(input_ids=ids).last_hidden_state[0].float().mean(0)
        by = offset * model(input_ids=ids).logits.float().std()
        model.get_output_embeddings().weight += by * towards / towards.square().sum()


def test_the_verdicts_name_the_model_and_what_to_do() -> None:
    model = tiny("opt")
    text = probe_packing(model, "teacher").text
    assert text.startswith("the teacher (OPTForCausalLM) reads a row behind another unlike the row alone")
    assert "set train.packing, train.eval_packing and train.padding_free to false" in text
    assert "llama" in text
    text = probe_head(tiny("mpt"), "student").text
    assert text.startswith(
        "the student's head (MptForCausalLM) is more than a product, a scale and a cap (gives"
    )
    assert "its own forward computes the logits" in text


def test_the_probe_leaves_a_model_as_it_was() -> None:
    model = tiny("llama")
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    probe_head(model, "student")
    probe_packing(model, "student")
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_elsewhere_are_not_probed() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON))
    assert probe_head(model, "student").text.endswith("its head was not probed")
    assert probe_packing(model, "student").level == "ok"


def test_own_logits_carry_the_gradient() -> None:
    """Through the model's own head every parameter learns as it does by autograd through its logits."""
    mine, other = tiny("mpt"), tiny("mpt")
    probe_head(mine, "student")
    ids, index = torch.tensor([[5, 9, 44, 17, 8]]), torch.tensor([1, 3])
    inputs = {"input_ids": ids}

    def squares(scores: Any) -> Tensor:
        return logits(scores).square().sum()

    mine(**label_inputs(inputs, index), head_function=squares).backward()
    other(**inputs).logits[0, index].square().sum().backward()
    for (name, parameter), expected in zip(mine.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_label_positions_behind_virtual_tokens(kind: Any) -> None:
    """Prompt tuning and p-tuning put embeddings before each row; positions are counted behind them."""
    model = get_peft_model(tiny("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    add_head_function(model.get_base_model())
    ids = torch.tensor([[5, 9, 44, 17], [8, 90, 12, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    index = torch.tensor([0, 3, 4, 6])
    with torch.no_grad():
        everything = model(**inputs, use_cache=False).logits
        given = logits(model(**label_inputs(inputs, index), head_function=lambda scores: scores))
    assert everything.shape[1] == ids.shape[1] + 3
    expected = everything[:, 3:].flatten(0, 1)[index]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    assert probe_packing(model, "student").level == "error"


@pytest.mark.parametrize(
    ("said", "left_out"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ("temperature", "top_p")),
        ({"do_sample": False, "top_k": 20}, ("top_k",)),
        ({"do_sample": True, "temperature": 0.9, "length_penalty": 2.0}, ("length_penalty",)),
    ],
)
def test_a_generation_configuration_that_cannot_be_written_is_mended(
    said: dict[str, Any], left_out: tuple[str, ...]
) -> None:
    generation = GenerationConfig(**said, eos_token_id=3)
    with pytest.raises(ValueError, match=left_out[0]):
        generation.validate(strict=True)
    (verdict,) = mend_generation(generation)
    assert verdict.level == "warning"
    assert all(f"{name}: {said[name]}" in verdict.text for name in left_out)
    generation.validate(strict=True)
    for name, value in said.items():
        assert getattr(generation, name) == (None if name in left_out else value)
    assert mend_generation(generation) == []


def test_what_cannot_be_saved_is_found_before_training() -> None:
    model = tiny("llama")

    class Broken:
        def save_pretrained(self, folder: str) -> None:
            raise OSError("no vocabulary file")

    good = check_savable(model.config, model.generation_config, None)
    assert good == []
    (verdict,) = check_savable(model.config, model.generation_config, Broken())
    assert verdict.level == "error"
    assert "the student's tokenizer cannot be saved" in verdict.text
    assert "OSError: no vocabulary file" in verdict.text
    greedy = GenerationConfig(do_sample=False)
    greedy.num_return_sequences = 2
    (verdict,) = check_savable(model.config, greedy, None)
    assert "generation_config.json cannot be saved" in verdict.text


def test_a_disk_that_takes_no_more_is_not_the_students_fault(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (20, 2000):  # config.json; tokenizer.json, whose library has no class for it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match=rf"{tmp_path} cannot be written \(File too large\).*TMPDIR"):
                check_savable(model.config, None, tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert check_savable(model.config, None, tokenizer) == []
