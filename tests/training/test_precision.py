"""bfloat16 on a CPU: what is rounded and what is not, and what is said about its speed."""

import pytest
import torch
from helpers.trainers import make_trainer, weights
from tiny_models import tiny_pair

from hpd.losses import Head, Scores
from hpd.losses.products import for_gradients, for_products, logits
from hpd.training import precision
from hpd.training.arguments import DistillConfig


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def test_logits_stay_float32_and_gradient_products_do_not():
    scores = Scores(torch.randn(3, 4), Head(torch.randn(5, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        ready = for_products(scores, 5)
        low = for_gradients(ready)
    assert ready.hidden.dtype == ready.head.weight.dtype == torch.float32
    assert low.hidden.dtype == low.head.weight.dtype == torch.bfloat16
    assert for_gradients(ready) is ready  # outside of autocast
    double = Scores(torch.randn(3, 4).double(), Head(torch.randn(5, 4).double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert for_gradients(double) is double


def test_whole_logits_are_not_rounded_by_autocast_either():
    """Those of policy gradients, rules over positions, guards and the reference."""
    hidden, weight = torch.randn(7, 64), torch.randn(90, 64) * 3.0
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(Scores(leaves[0], Head(leaves[1])))
        given = torch.randn(found.shape)
        found.backward(given)
    torch.testing.assert_close(found, hidden @ weight.T, rtol=1e-6, atol=1e-4)
    for leaf, expected in zip(leaves, (given @ weight, given.T @ hidden), strict=True):
        assert leaf.grad is not None
        assert 0.0 < (leaf.grad - expected).norm() < 3 * 2**-9 * expected.norm()


@pytest.mark.parametrize("method", ["hpd", "forward_kl", "sft", "psft"])
def test_a_step_is_that_of_float32_to_bfloat16s_rounding(pair, tmp_path, method):
    losses, steps = [], []
    for low in (False, True):
        trainer = make_trainer(pair, tmp_path / str(low), method=method, bf16=low, use_cpu=True)
        before = weights(trainer)
        trainer.train()
        steps.append(weights(trainer) - before)
        losses.append(trainer.state.log_history[0]["loss"])
    exact, rounded = steps
    # Eight bits of mantissa: 2 ** -9 = 0.002 for each rounding, and there are some in a row.
    assert 0.0 < (rounded - exact).norm() < 0.03 * exact.norm()
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize(
    ("share", "low", "said"),
    [
        (0.4, False, "float32; products in bfloat16 take 0.4 of float32's time here: train.bf16=true"),
        (3.0, False, "precision: float32; products in bfloat16 take 3 of float32's time here"),
        (0.4, True, "precision: bfloat16 (train.bf16); "),
    ],
    ids=["fast", "slow", "chosen"],
)
def test_what_the_doctor_says(tmp_path, monkeypatch, share, low, said):
    monkeypatch.setattr(precision, "bfloat16_seconds", lambda: share)
    args = DistillConfig(output_dir=str(tmp_path), use_cpu=True, bf16=low)
    hint = precision.precision_hint(args)
    assert hint is not None
    assert said in hint
    assert precision.precision_verdicts(args) == []


def test_a_slow_bfloat16_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_seconds", lambda: 80.0)
    (verdict,) = precision.precision_verdicts(
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    )
    assert verdict.level == "warning"
    assert "80.0 times as long as in float32" in verdict.text


def test_the_speed_is_measured_once():
    precision.bfloat16_seconds.cache_clear()
    assert 0.0 < precision.bfloat16_seconds() == precision.bfloat16_seconds()
    assert precision.bfloat16_seconds.cache_info().misses == 1
