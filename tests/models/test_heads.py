"""Heads of real architectures, adapters on them, and the forward that hands them out.

Axes: B rows, T tokens, N label positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
)

from hpd.losses import Head, Scores, head_of, reweighted_nll
from hpd.losses.products import logits, project_
from hpd.methods import method_terms, name_terms
from hpd.models.forward import add_head_function, model_inputs, scores_of

# PEFT warns about tied embeddings and transposed layers, both of which are meant here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

VOCAB = 67
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2, cap 30": Gemma2Config(**SIZES),
    "gemma2, cap 0.05": Gemma2Config(**SIZES, final_logit_softcapping=0.05),
    "gemma3, no cap": Gemma3TextConfig(**SIZES),
    "gemma3, cap 0.05": Gemma3TextConfig(**SIZES, final_logit_softcapping=0.05),
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "cohere2": Cohere2Config(**SIZES, logit_scale=0.3),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "phi, bias": PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
}
# What differs from a plain projection.
EXTRAS: dict[str, dict[str, Any]] = {
    "gemma2, cap 30": {"softcap": 30.0},
    "gemma2, cap 0.05": {"softcap": 0.05},
    "gemma3, cap 0.05": {"softcap": 0.05},
    "cohere": {"scale": 0.3},
    "cohere2": {"scale": 0.3},
    "granite": {"scale": 0.25},
}


def tiny(name: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    # The configuration is copied: adapters and generation write into it.
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name].__class__(**CONFIGS[name].to_dict()), attn_implementation="eager"
    )
    bias = model.get_output_embeddings().bias
    if bias is not None:
        nn.init.normal_(bias)  # zero at the start, and a bias of zero proves nothing
    return model.eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Two rows, the second padded on the right."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


INDEX = torch.tensor([0, 3, 7, 9, 13])  # positions of the flattened batch that are not padding


def scores(model: Any, inputs: dict[str, Tensor]) -> Scores:
    return model(**inputs, label_index=INDEX, head_function=lambda given: given)


# ---- architectures


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_hidden_states_and_head_give_the_model_s_logits(name: str, inputs: dict[str, Tensor]) -> None:
    model = tiny(name)
    expected = model(**inputs).logits.flatten(0, 1)[INDEX]
    outputs = model(**inputs, output_hidden_states=True)
    last = outputs.hidden_states[-1].flatten(0, 1)[INDEX]
    given = scores(add_head_function(model), inputs)
    assert torch.equal(given.hidden, last)
    assert given.head.scale == pytest.approx(EXTRAS.get(name, {}).get("scale", 1.0))
    assert given.head.softcap == EXTRAS.get(name, {}).get("softcap")
    assert (given.head.bias is not None) == (name == "phi, bias")
    assert given.vocab == VOCAB
    torch.testing.assert_close(logits(given), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(project_(given, torch.empty_like(expected)), expected, rtol=0, atol=1e-5)
    if EXTRAS.get(name, {}).get("softcap") == 0.05:
        plain = given.hidden @ given.head.weight.t()  # type: ignore[union-attr]
        assert (plain - expected).abs().max() > 1e-3  # the cap is at work
    truncated = logits(given, VOCAB - 10)
    torch.testing.assert_close(truncated, expected[:, : VOCAB - 10], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "llama, tied", "gemma2, cap 0.05", "cohere", "granite", "gpt2", "phi, bias"]
)
def test_parameters_get_the_gradient_of_the_model_s_own_logits(name: str, inputs: dict[str, Tensor]) -> None:
    """Cross-entropy through the head function, against autograd through the logits that the model returns."""
    labels = torch.tensor([5, 6, 7, 8, 9])
    own = tiny(name)
    loss = nn.functional.cross_entropy(own(**inputs).logits.flatten(0, 1)[INDEX], labels, reduction="sum")
    loss.backward()
    ours = add_head_function(tiny(name))
    terms = name_terms(method_terms("sft", {}))
    function = lambda given: reweighted_nll(given, given, labels, terms, chunk_bytes=2 * VOCAB * 4).loss  # noqa: E731
    fused = ours(**inputs, label_index=INDEX, head_function=function)
    fused.backward()
    assert fused.item() == pytest.approx(loss.item(), rel=1e-5)
    for (parameter, mine), other in zip(ours.named_parameters(), own.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), parameter
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        head_of(tiny("llama").model)


# ---- adapters


def adapted(name: str = "llama", **options: Any) -> Any:
    """A PEFT model whose adapter is not the identity it starts as."""
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny(name), config)
    torch.manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name or "modules_to_save" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def merged_weight(model: Any) -> Tensor:
    return model.merge_and_unload().get_output_embeddings().weight.detach().clone()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "phi, bias"])
def test_lora_on_the_head_is_merged_into_its_weight(
    name: str, rslora: bool, inputs: dict[str, Tensor]
) -> None:
    model = adapted(name, target_modules=["lm_head"], use_rslora=rslora)
    base = model.get_base_model()
    frozen = base.get_output_embeddings().get_base_layer().weight
    head = head_of(base)
    assert head.weight is not None
    assert (head.weight - frozen).abs().max() > 1e-2
    given = scores(add_head_function(base), inputs)
    expected = model(**inputs).logits.flatten(0, 1)[INDEX]
    torch.testing.assert_close(logits(given), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(head.weight.detach(), merged_weight(model), rtol=0, atol=1e-6)


def test_the_adapter_on_the_head_learns_and_its_base_does_not(inputs: dict[str, Tensor]) -> None:
    labels = torch.tensor([5, 6, 7, 8, 9])
    plain, fused = (adapted(target_modules=["lm_head", "q_proj"]) for _ in range(2))
    nn.functional.cross_entropy(
        plain(**inputs).logits.flatten(0, 1)[INDEX], labels, reduction="sum"
    ).backward()
    add_head_function(fused.get_base_model())
    terms = name_terms(method_terms("sft", {}))
    function = lambda given: reweighted_nll(given, given, labels, terms).loss  # noqa: E731
    fused(**inputs, label_index=INDEX, head_function=function).backward()
    learned = set()
    for (name, mine), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (not mine.requires_grad), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
            learned |= {part for part in ("lm_head", "q_proj") if part in name and mine.grad.abs().max() > 0}
    assert learned == {"lm_head", "q_proj"}


def test_two_adapters_on_the_head_add_up() -> None:
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"]))
    layer = model.get_base_model().get_output_embeddings()
    nn.init.normal_(layer.lora_B["second"].weight, std=0.3)
    base = layer.get_base_layer().weight
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    torch.testing.assert_close(head_of(model.get_base_model()).weight, base + deltas[0])
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(head_of(model.get_base_model()).weight, base + deltas[0] + deltas[1])
    model.base_model.set_adapter("second")
    torch.testing.assert_close(head_of(model.get_base_model()).weight, base + deltas[1])


def test_a_merged_adapter_is_not_added_twice() -> None:
    model = adapted(target_modules=["lm_head"])
    before = head_of(model.get_base_model()).weight
    model.merge_adapter()
    torch.testing.assert_close(head_of(model.get_base_model()).weight, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_that_is_trained_whole(name: str, inputs: dict[str, Tensor]) -> None:
    inner = {"llama": "q_proj", "gpt2": "c_attn"}[name]
    model = adapted(name, target_modules=[inner], modules_to_save=["lm_head"])
    base = model.get_base_model()
    wrapper = base.get_output_embeddings()
    head = head_of(base)
    assert head.weight is wrapper.modules_to_save["default"].weight
    given = scores(add_head_function(base), inputs)
    torch.testing.assert_close(logits(given), model(**inputs).logits.flatten(0, 1)[INDEX], rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert head_of(base).weight is wrapper.original_module.weight
    torch.testing.assert_close(head.weight.detach(), merged_weight(model))


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
@torch.no_grad()
def test_with_the_adapter_off_the_head_is_the_base_model_s(
    options: dict[str, Any], inputs: dict[str, Tensor]
) -> None:
    model, untouched = adapted(**options), tiny()
    base = add_head_function(model.get_base_model())
    assert not torch.equal(head_of(base).weight, untouched.lm_head.weight)  # type: ignore[arg-type]
    with model.disable_adapter():
        off = scores(model, inputs)
    assert torch.equal(off.head.weight, untouched.lm_head.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(
        logits(off), untouched(**inputs).logits.flatten(0, 1)[INDEX], rtol=0, atol=1e-5
    )
    assert not torch.equal(scores(model, inputs).hidden, off.hidden) or options["target_modules"] == [
        "lm_head"
    ]


@pytest.mark.parametrize(("name", "tokens"), [("llama", {"lm_head": [3, 4]}), ("llama, tied", [3, 4])])
def test_tokens_that_are_trained_alone(name: str, tokens: Any, inputs: dict[str, Tensor]) -> None:
    model = adapted(name, target_modules=["q_proj"], trainable_token_indices=tokens)
    for parameter_name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in parameter_name:
            nn.init.normal_(parameter)
    base = add_head_function(model.get_base_model())
    given = scores(model, inputs)
    torch.testing.assert_close(logits(given), model(**inputs).logits.flatten(0, 1)[INDEX], rtol=0, atol=1e-5)
    frozen = tiny(name).get_output_embeddings().weight
    assert given.head.weight is not None
    moved = (given.head.weight != frozen).any(-1).nonzero().flatten()
    assert moved.tolist() == [3, 4]
    given.head.weight.sum().backward()
    assert any("tokens_delta" in n and p.grad is not None for n, p in model.named_parameters())
    with model.disable_adapter():
        assert torch.equal(head_of(base).weight, frozen)  # type: ignore[arg-type]


def test_an_active_adapter_that_is_elsewhere_changes_nothing() -> None:
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    before = head_of(model.get_base_model()).weight
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(head_of(model.get_base_model()).weight, before)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LoraConfig(target_modules=["lm_head"], use_dora=True), "LoRA with use_dora"),
        (LoraConfig(target_modules=["lm_head"], lora_bias=True), "LoRA with lora_bias"),
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "An adapter other than LoRA"),
    ],
)
def test_an_adapter_that_is_no_sum_is_refused(config: PeftConfig, kind: str) -> None:
    model = get_peft_model(tiny(), config)
    with pytest.raises(ValueError, match=f"{kind} on the output head is not supported: use plain LoRA"):
        head_of(model.get_base_model())


# ---- the forward


@pytest.mark.parametrize("name", ["llama", "gemma2, cap 30", "gpt2"])
@torch.no_grad()
def test_the_original_forward_and_generation_are_unchanged(name: str, inputs: dict[str, Tensor]) -> None:
    plain, patched = tiny(name), add_head_function(tiny(name))
    assert torch.equal(patched(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(
        patched(**inputs, labels=inputs["input_ids"]).loss, plain(**inputs, labels=inputs["input_ids"]).loss
    )
    assert inspect.signature(patched.forward) == inspect.signature(plain.forward)
    prompt = inputs["input_ids"][:1, :5]
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        written = []
        for model in (plain, patched):
            torch.manual_seed(4)
            written.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=6,
                    pad_token_id=0,
                    **options,
                )
            )
        assert torch.equal(*written)


@torch.no_grad()
def test_the_head_does_not_run_on_other_positions(inputs: dict[str, Tensor]) -> None:
    model = add_head_function(tiny())
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    given = scores(model, inputs)
    assert given.hidden.shape == (len(INDEX), 16)
    assert not calls
    model(**inputs)
    assert calls


def test_patching_twice_is_patching_once(inputs: dict[str, Tensor]) -> None:
    model = add_head_function(tiny())
    forward = model.forward
    assert add_head_function(model) is model
    assert model.forward is forward


def test_a_head_that_is_replaced_after_the_patch_is_found(inputs: dict[str, Tensor]) -> None:
    model = add_head_function(tiny())
    model.lm_head = nn.Linear(16, VOCAB, bias=False)
    assert scores(model, inputs).head.weight is model.lm_head.weight


def test_what_the_head_function_returns_comes_back(inputs: dict[str, Tensor]) -> None:
    model = add_head_function(tiny())
    result = model(**inputs, label_index=INDEX, head_function=lambda given: ("anything", given.vocab))
    assert result == ("anything", VOCAB)


@pytest.mark.parametrize("training", [True, False])
def test_scores_are_without_gradient_and_dropout(training: bool, inputs: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5)
    model = add_head_function(AutoModelForCausalLM.from_config(config)).train(training)
    extras = {"labels": inputs["input_ids"], "label_index": INDEX}
    first, second = (scores_of(model, {**inputs, **extras}, INDEX) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert not first.hidden.requires_grad
    assert model.training == training


def test_a_model_gets_its_own_inputs_only() -> None:
    collated = dict.fromkeys(
        [
            "input_ids",
            "attention_mask",
            "labels",
            "label_keys",
            "position_ids",
            "cu_seq_lens_q",
            "seq_idx",
            "row_id",
        ]
    )
    assert list(model_inputs(collated)) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "cu_seq_lens_q",
        "seq_idx",
    ]


def test_a_truncated_head_is_a_view() -> None:
    head = Head(torch.randn(10, 4), torch.randn(10), scale=2.0, softcap=5.0)
    cut = head.truncated(6)
    assert cut.weight is not None
    assert cut.bias is not None
    assert cut.weight.shape == (6, 4)
    assert cut.bias.shape == (6,)
    assert cut.weight.data_ptr() == head.weight.data_ptr()  # type: ignore[union-attr]
    assert cut[2:] == head[2:]
    assert head.truncated(None).weight.shape == (10, 4)  # type: ignore[union-attr]
    assert Head(None).truncated(6) == Head(None)
