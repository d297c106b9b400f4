"""Weights that bitsandbytes holds in 4 or 8 bits: what is quantized, and that gradients pass it rightly."""

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SHAPE, tiny_pair
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hpd.config.models import ModelConfig, TeacherConfig
from hpd.models.load import load_config, load_model
from hpd.models.probe import probe_head, probe_packing
from hpd.models.quantized import check_trainable, quantized_layers, stored_bits

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Widths of 32 and 48, of which 64 is no divisor."""
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def whole_twin(model, bnb, folder):
    """The same function with the numbers that the packed weights stand for, in float32."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            twin.get_submodule(name).weight = nn.Parameter(weight.float(), requires_grad=False)
    return twin.eval()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_without_bitsandbytes(pair, monkeypatch, role):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    kind = ModelConfig if role == "student" else TeacherConfig
    source = kind(model=str(pair[role == "teacher"]), quantization="4bit")
    with pytest.raises(
        ValueError, match=r"needs bitsandbytes: pip install 'hybrid-policy-distillation\[quantization\]'"
    ):
        load_config(source, role)


def test_four_bits_are_the_function_of_the_numbers_they_stand_for(pair, bnb):
    model = load_model(ModelConfig(model=str(pair[0]), quantization="4bit"), "student")
    twin = whole_twin(model, bnb, pair[0])
    with torch.no_grad():
        found, expected = model(IDS).logits, twin(IDS).logits
        whole = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (whole - expected).abs().max() > 0.01
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight.dtype == torch.float32
    assert probe_head(model, "student").level == probe_packing(model, "student").level == "ok"


def test_gradients_pass_four_bits_after_an_evaluation(pair, bnb):
    model = load_model(ModelConfig(model=str(pair[0]), quantization="4bit"), "student")
    twin = whole_twin(model, bnb, pair[0])
    with torch.no_grad():
        model(IDS)  # where bitsandbytes would repack
    check_trainable(model)
    gradients = []
    for one in (model, twin):
        torch.manual_seed(0)
        adapted = get_peft_model(one, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        adapted.train()
        adapted(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert "layers.0" in next(iter(gradients[0]))
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_eight_bits_pass_gradients(pair, bnb):
    model = load_model(ModelConfig(model=str(pair[0]), quantization="8bit"), "student")
    assert probe_head(model, "student").level == probe_packing(model, "student").level == "ok"
    layer = model.get_submodule("model.layers.0.mlp.gate_proj").train()
    given = torch.randn(5, 32, requires_grad=True)
    out = layer(given)
    weight = layer.state.CB.float() * layer.state.SCB[:, None] / 127
    torch.testing.assert_close(out, given @ weight.T, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    torch.testing.assert_close(given.grad, weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-5)


def test_a_repacked_student_is_refused(pair, bnb):
    model = load_model(ModelConfig(model=str(pair[0]), quantization="4bit"), "student")
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"has repacked its 4-bit layers \(model.layers.1.mlp.up_proj\)"):
        check_trainable(model)


FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_that_are_quantized(family, bnb, tmp_path):
    shape = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        family, vocab_size=300, **(shape if family != "gpt2" else {}), **FAMILIES[family]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(ModelConfig(model=str(tmp_path), quantization="4bit"), "student")
    found = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(config)
    assert set(quantized_layers(described)) == found
    assert found


def test_weights_that_are_stored_quantized(pair, bnb, tmp_path):
    load_model(ModelConfig(model=str(pair[0]), quantization="4bit"), "student").save_pretrained(tmp_path)
    config = load_config(ModelConfig(model=str(tmp_path)), "student")
    assert stored_bits(ModelConfig(model=str(tmp_path)), config) == "4bit"
    with pytest.raises(ValueError, match="is stored quantized .* would have no effect: remove it"):
        load_config(ModelConfig(model=str(tmp_path), quantization="8bit"), "student")
    assert stored_bits(ModelConfig(model="x"), copy.copy(AutoConfig.from_pretrained(pair[0]))) is None
