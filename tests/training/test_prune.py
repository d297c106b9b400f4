"""`hpd prune`, from the command line and from Python: an ordinary model comes out, or a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hpd.cli import app
from hpd.training.prune import prune
from tests.tiny_models import tiny_model

ROWS = [{"prompt": f"say {one}:", "completion": f" {one} two three"} for one in ("one", "four", "nine")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    tiny_model("llama", folder / "teacher", role="teacher")
    settings = {"eos_token_id": [3, 0], "temperature": 0.7}  # which transformers reads and refuses to write
    (folder / "teacher/generation_config.json").write_text(json.dumps(settings))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def hpd(place, *arguments):
    whole = ("prune", place / "teacher", "--data", place / "rows.jsonl")
    return CliRunner().invoke(app, [str(a) for a in (*whole, *arguments)])


def test_a_cut_is_an_ordinary_model(place, tmp_path):
    out = tmp_path / "cut"
    done = hpd(place, "--layers", 2, "--intermediate", 0.5, "-o", out)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    about = json.loads((out / "pruning.json").read_text())
    assert f"layers kept, 2 of 3: {about['layers'][0]}, {about['layers'][1]}" in said
    assert "columns kept in each MLP, 48 of 96" in said
    assert f"next: hpd init recipe.yaml --student {out} --teacher {place / 'teacher'}" in said
    dropped = ({0, 1, 2} - {*about["layers"]}).pop()
    assert about["block_influence"][dropped] == min(about["block_influence"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 48)
    assert model.generation_config.eos_token_id == [3, 0]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(place / "teacher").chat_template
    assert about["positions"] == sum(
        len(tokenizer(r["prompt"] + r["completion"]).input_ids) + 1 for r in ROWS
    )


def test_weights_keep_their_dtype(place, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(place / "teacher", dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "low")
    AutoTokenizer.from_pretrained(place / "teacher").save_pretrained(tmp_path / "low")
    prune(str(tmp_path / "low"), str(place / "rows.jsonl"), tmp_path / "cut", layers=2)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype="auto")
    assert (found.dtype, found.config.num_hidden_layers) == (torch.bfloat16, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "{new}"], "Nothing is to be cut"),
        (["-o", "{new}", "--layers", 4], "has 3 layers, and 4 are to stay"),
        (["-o", "{new}", "--intermediate", "1.5"], "in (0, 1], got 1.5"),
        (["-o", "{new}", "--layers", 2, "--format", "xml"], "--format must be auto, chat, plain"),
        (["-o", "{place}", "--layers", 2], "is not an empty folder"),
        (["-o", "{new}", "--layers", 2, "--prompt-column", "question"], "question"),
    ],
)
def test_mistakes_are_refused(place, tmp_path, arguments, said):
    done = hpd(place, *(str(a).format(new=tmp_path / "new", place=place) for a in arguments))
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "new").exists()


def test_what_is_wrong_with_rows_names_options_of_this_command(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    done = hpd(place, "--data", tmp_path / "rows.jsonl", "--layers", 2, "-o", tmp_path / "new")
    text = " ".join(done.output.split())
    assert done.exit_code == 2, text
    assert "data.columns is --prompt-column and --completion-column" in text


def test_conversations_without_an_answer_are_rows_too(place, tmp_path):
    turns = [{"role": "user", "content": "say one"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    done = hpd(place, "--data", tmp_path / "rows.jsonl", "--layers", 2, "-o", tmp_path / "new")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_layers_that_depend_on_their_places_are_refused_and_nothing_is_left(place, tmp_path, family):
    """GPT-2 may divide by the number of the layer; Qwen3 MoE has experts in every second one."""
    sizes = {
        "vocab_size": 300,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "initializer_range": 0.2,
    }
    gpt2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}
    moe = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    moe |= {"head_dim": 8, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4}
    moe |= {"num_experts_per_tok": 2, "decoder_sparse_step": 2}
    config = AutoConfig.for_model(family, **sizes, **(gpt2 if family == "gpt2" else moe))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the first layer is the one to go
        for name, weight in (model.transformer.h if family == "gpt2" else model.model.layers)[
            0
        ].named_parameters():
            if name.split(".")[-2] in ("c_proj", "o_proj", "down_proj"):
                weight.zero_()
    model.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(place / "teacher").save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="depends on their places"):
        prune(str(tmp_path / "whole"), str(place / "rows.jsonl"), tmp_path / "cut", layers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
