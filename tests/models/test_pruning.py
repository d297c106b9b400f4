"""Cuts of a model: what cannot matter goes first and nothing changes; what stays has the teacher's bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hpd.models.pruning import (
    Importance,
    check_prunable,
    choose_cut,
    cut_model,
    measure_importance,
    with_cut,
)
from tests.tiny_models import tiny_model

ROWS = [[5, 9, 200, 31, 7, 7, 80], [1, 250, 3], list(range(40, 72))]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The folder of a whole model of three layers, by family."""
    folder = tmp_path_factory.mktemp("wholes")

    def whole(family):
        there = (folder / family / "config.json").is_file()
        return folder / family if there else tiny_model(family, folder / family, role="teacher")

    return whole


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model, row=ROWS[2]):
    return model(input_ids=torch.tensor([row])).logits[0]


def silence_block(block):
    """Its matrices that write become zero, so that it adds nothing."""
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()


def cut_on_disk(model, folder: Path, layers=None, intermediate=None):
    """The model that is loaded again after a cut, what it had to give, and the cut."""
    check_prunable(model.config, "it", layers, intermediate)
    importance = measure_importance(model, ROWS, columns=intermediate is not None)
    cut = choose_cut(importance, layers, intermediate)
    expected = with_cut(model, cut, ROWS[2])
    cut_model(model, cut)
    model.save_pretrained(folder)
    return load(folder), expected, cut


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_nothing_taken_out_leaves_every_bit(wholes, tmp_path, family):
    whole = wholes(family)
    before = logits(load(whole))
    share = None if family == "qwen3_moe" else 1.0
    again, _, _ = cut_on_disk(load(whole), tmp_path / "same", 3, share)
    saved, given = load_file(tmp_path / "same/model.safetensors"), load_file(whole / "model.safetensors")
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[name], given[name]) for name in given)
    assert torch.equal(logits(again), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_does_nothing_goes_first_and_no_logit_moves(wholes, tmp_path, family):
    model = load(wholes(family))
    silence_block(model.model.layers[1])
    before = logits(model)
    again, _, cut = cut_on_disk(model, tmp_path / "cut", layers=2)
    assert cut.layers == (0, 2)
    torch.testing.assert_close(logits(again), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_that_write_nothing_go_first_and_no_logit_moves(wholes, tmp_path, family):
    model = load(wholes(family))
    idle = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:24]
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            # Twelve that write zeroes, twelve that are never on.
            layer.mlp.down_proj.weight[:, (idle[:12] + number) % 96] = 0
            layer.mlp.up_proj.weight[(idle[12:] + number) % 96] = 0
    before = logits(model)
    again, _, cut = cut_on_disk(model, tmp_path / "cut", intermediate=0.75)
    assert cut.width == again.config.intermediate_size == 72
    for number, kept in enumerate(cut.columns):
        assert not {*kept.tolist()} & {*((idle + number) % 96).tolist()}
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cut_gives_what_the_whole_gives_without_those_parts(wholes, tmp_path, family):
    """Depth and width together; biases and the types of Gemma's layers are cut along."""
    model = load(wholes(family))
    types = getattr(model.config, "layer_types", None)
    again, expected, cut = cut_on_disk(model, tmp_path / "cut", layers=2, intermediate=0.5)
    assert len(again.model.layers) == again.config.num_hidden_layers == 2
    if types:
        assert again.config.layer_types == [types[place] for place in cut.layers]
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    written = load_file(tmp_path / "cut/model.safetensors")
    weights = load_file(wholes(family) / "model.safetensors")
    for new, old in enumerate(cut.layers):
        at = "model.layers.{}.mlp.{}.weight"
        down, up = (weights[at.format(old, name)] for name in ("down_proj", "up_proj"))
        assert torch.equal(written[at.format(new, "down_proj")], down[:, cut.columns[new]])
        assert torch.equal(written[at.format(new, "up_proj")], up[cut.columns[new]])


def test_importance_is_its_formula(wholes):
    model = load(wholes("llama")).double()
    found = measure_importance(model, ROWS, columns=True)
    cosines, writes = [], []
    for row in ROWS:
        out = model(input_ids=torch.tensor([row]), output_hidden_states=True)
        states = list(out.hidden_states[:-1])  # the last one is behind the final norm
        layer = model.model.layers[1]
        x, y = states[1][0], states[2][0]
        cosines.append(torch.nn.functional.cosine_similarity(x, y, dim=-1))
        attended = (
            x
            + layer.self_attn(
                layer.input_layernorm(states[1]),
                position_embeddings=model.model.rotary_emb(states[1], torch.arange(len(row))[None]),
                attention_mask=None,
            )[0]
        )
        inside = layer.post_attention_layernorm(attended)
        mlp = layer.mlp
        written = (mlp.act_fn(mlp.gate_proj(inside)) * mlp.up_proj(inside)).abs() * mlp.down_proj.weight.norm(
            dim=0
        )
        writes.append(written[0] if written.dim() == 3 else written)
    assert found.positions == sum(map(len, ROWS))
    torch.testing.assert_close(found.blocks[1], 1 - torch.cat(cosines).mean())
    torch.testing.assert_close(found.columns[1], torch.cat(writes).mean(0))


def test_ties_keep_the_first():
    blocks = torch.tensor([0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert choose_cut(Importance(blocks, None, 1), layers=2).layers == (0, 1)


@pytest.mark.parametrize(
    ("family", "changes", "layers", "share", "said"),
    [
        ("llama", {}, 4, None, "has 3 layers, and 4 are to stay"),
        ("llama", {}, 0, None, "give a number from 1 to 3"),
        ("llama", {}, None, 0.0, r"in \(0, 1\], got 0.0"),
        ("llama", {}, None, 1.5, "got 1.5"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, 2, None, "stored quantized"),
        ("llama", {"is_encoder_decoder": True}, 2, None, "has an encoder too"),
        ("qwen3_moe", {}, None, 0.5, "mixtures of experts"),
    ],
)
def test_refusals(wholes, family, changes, layers, share, said):
    config = AutoConfig.from_pretrained(wholes(family))
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=said):
        check_prunable(config, "it", layers, share)


def test_matrices_that_are_fused_are_refused_and_depth_is_not():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("phi3", **sizes, num_key_value_heads=2, vocab_size=300, pad_token_id=0)
    with pytest.raises(ValueError, match="each a matrix of its own; layers can be"):
        check_prunable(config, "it", None, 0.5)
    check_prunable(config, "it", 2, None)
