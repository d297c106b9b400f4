"""Combinations that the Trainer offers and users pick: each trains two steps, and means the same as without
it."""

import importlib.util

import pytest
import torch
from helpers.trainers import gradient, make_trainer, weights
from peft import LoraConfig
from tiny_models import tiny_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def two_steps(pair, folder, **options):
    return losses(make_trainer(pair, folder, **{"max_steps": 2, "per_device_train_batch_size": 4, **options}))


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}]
)
def test_gradient_checkpointing_changes_nothing(pair, tmp_path, options):
    plain = two_steps(pair, tmp_path / "a", **options)
    checkpointed = two_steps(
        pair,
        tmp_path / "b",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **options,
    )
    assert plain == checkpointed
    assert plain[0] != plain[1]


def test_lora_with_checkpointing_and_accumulation_changes_nothing(pair, tmp_path):
    def run(name, **options):
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        return two_steps(pair, tmp_path / name, peft_config=adapter, learning_rate=0.1, **options)

    plain = run("a", per_device_train_batch_size=4)
    combined = run(
        "b",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert combined == pytest.approx(plain, rel=1e-4)
    assert plain[0] != plain[1]


def test_activation_offloading_without_an_accelerator_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"activation_offloading.*none here.*gradient_checkpointing"):
        two_steps(pair, tmp_path, activation_offloading=True)


@pytest.mark.gpu
def test_activation_offloading_changes_nothing(pair, tmp_path):
    assert two_steps(pair, tmp_path / "a") == pytest.approx(
        two_steps(pair, tmp_path / "b", activation_offloading=True)
    )


def test_attention_implementations_agree(pair, tmp_path):
    found = {}
    for implementation in ("sdpa", "eager"):
        trainer = make_trainer(pair, tmp_path / implementation)
        for model in (trainer.model, trainer.teacher.model):
            model.set_attn_implementation(implementation)
        found[implementation] = gradient(trainer)
    assert found["sdpa"][0] == pytest.approx(found["eager"][0], rel=1e-5)
    torch.testing.assert_close(found["sdpa"][1], found["eager"][1], rtol=1e-4, atol=1e-6)


BITS = {"adamw_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", *BITS])
def test_optimizers_of_the_trainer_train(pair, tmp_path, optim):
    if optim in BITS and importlib.util.find_spec(BITS[optim]) is None:
        pytest.skip(f"{optim} needs {BITS[optim]}, which is not installed")
    trainer = make_trainer(pair, tmp_path, optim=optim, max_steps=2, learning_rate=1e-3, metric_stride=1)
    start = weights(trainer).clone()
    seen = losses(trainer)
    assert all(torch.tensor(seen).isfinite())
    assert not torch.equal(start, weights(trainer))


def test_fused_adamw_is_adamw(pair, tmp_path):
    plain, fused = (
        two_steps(pair, tmp_path / name, optim=name) for name in ("adamw_torch", "adamw_torch_fused")
    )
    assert fused == pytest.approx(plain, rel=1e-5)


def test_bf16_autocast_stays_near_float32(pair, tmp_path):
    full = gradient(make_trainer(pair, tmp_path / "a", method="forward_kl"))
    trainer = make_trainer(pair, tmp_path / "b", method="forward_kl", bf16=True)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    batches = list(trainer.get_train_dataloader())
    with trainer.compute_loss_context_manager(), trainer.autocast_smart_context_manager():
        half = gradient(trainer, batches)
    assert half[0] == pytest.approx(full[0], rel=2e-2)
    assert half[0] != full[0]
    assert (half[1] - full[1]).norm() < 0.1 * full[1].norm()
    assert all(torch.tensor(losses(trainer)).isfinite())
