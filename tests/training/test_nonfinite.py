"""NaN and infinity: found at the step, told apart, written out; the weights stay as they were."""

import json

import pytest
import torch
from helpers.tiny_models import tiny_pair
from helpers.trainers import make_trainer, rows, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hpd.config.schema import GuardsConfig
from hpd.losses import Head, Scores, TopKScores
from hpd.training.nonfinite import NonFinite, all_finite, teacher_is_finite

NAN, INF = float("nan"), float("inf")
ADAM = {"optim": "adamw_torch", "max_steps": 6, "per_device_train_batch_size": 2, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


class _At(TrainerCallback):
    """Does something to the student before a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.action(model)


def poison(model):
    model.model.layers[0].mlp.up_proj.weight[0, 0] = NAN


def report(folder, step):
    return json.loads((folder / "nonfinite" / f"step-{step}.json").read_text())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_all_finite(value):
    assert bool(all_finite(torch.tensor([1.0, -2.0])))
    assert bool(all_finite(torch.zeros(0, 3)))
    assert not bool(all_finite(torch.tensor([1.0, value, 2.0])))


def test_teacher_is_finite():
    hidden = torch.ones(2, 3)
    assert bool(teacher_is_finite(Scores(hidden, Head(None))))
    assert not bool(teacher_is_finite(Scores(hidden, Head(None), torch.tensor([0.0, INF]))))
    known = TopKScores(
        torch.zeros(2, 1).long(), torch.tensor([[-1.0], [-INF]]), torch.tensor([-1.0, -2.0]), 9
    )
    assert bool(teacher_is_finite(known))  # a token that the teacher rules out
    assert not bool(teacher_is_finite(known._replace(label_logprobs=torch.tensor([NAN, -1.0]))))


@pytest.mark.parametrize("where", ["body", "head"])
def test_a_teacher_of_nan_is_blamed_and_the_student_is_untouched(pair, tmp_path, where):
    teacher = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    with torch.no_grad():
        (teacher.lm_head.weight if where == "head" else teacher.model.norm.weight)[0] = NAN
    trainer = make_trainer(pair, tmp_path, teacher=teacher, train=rows(12), **ADAM)
    before = weights(trainer).clone()
    with pytest.raises(NonFinite, match="Step 1: the teacher's scores"):
        trainer.train()
    assert torch.equal(weights(trainer), before)
    found = report(tmp_path, 1)
    assert (found["source"], found["parameters"], found["teacher_finite"]) == ("teacher", [], [False])
    assert [row["teacher_nll"] == row["teacher_nll"] for row in found["rows"]] == [False, False]
    assert all(row["student_nll"] > 0 and "say" in row["text"] for row in found["rows"])
    batch = load_file(tmp_path / "nonfinite" / "step-1.safetensors")
    assert {"0/input_ids", "0/labels", "0/attention_mask"} <= batch.keys()


def test_a_student_of_nan_is_blamed_and_the_steps_before_are_kept(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, train=rows(12), **{**ADAM, "logging_steps": 5})
    trainer.add_callback(_At(3, poison))
    with pytest.raises(NonFinite, match="Step 3: the student's own weights .*layers.0.mlp.up_proj.weight"):
        trainer.train()
    found = report(tmp_path, 3)
    assert found["source"] == "student"
    assert found["gradients"]
    assert found["teacher_finite"] == [True]
    assert (tmp_path / "checkpoint-2" / "complete.json").is_file()


def test_a_learning_rate_that_overflows_is_stopped_at_the_next_step(pair, tmp_path):
    trainer = make_trainer(
        pair, tmp_path, train=rows(12), **{**ADAM, "learning_rate": 1e30, "logging_steps": 50}
    )
    with pytest.raises(NonFinite, match="Step 2: the gradient is NaN or infinite"):
        trainer.train()
    assert report(tmp_path, 2)["learning_rate"] > 1e29


class _Flaw(TrainerCallback):
    """The gradient of some steps overflows: something that a step is, not that the weights are."""

    def __init__(self, trainer, steps):
        self.hook = next(trainer.model.parameters()).register_hook(
            lambda gradient: gradient * INF if trainer.state.global_step + 1 in steps else gradient
        )


def test_skip_leaves_the_step_out_and_the_log_averages_the_others(pair, tmp_path):
    options = {**ADAM, "logging_steps": 3, "lr_scheduler_type": "constant"}
    trainer = make_trainer(pair, tmp_path, train=rows(12), guards=GuardsConfig(non_finite="skip"), **options)
    trainer.add_callback(_Flaw(trainer, {2}))
    seen = []
    trainer.add_callback(_At(2, lambda model: seen.append(weights(trainer).clone())))
    trainer.add_callback(_At(3, lambda model: seen.append(weights(trainer).clone())))
    trainer.train()
    assert torch.equal(*seen)
    assert report(tmp_path, 2)["source"] == "gradient"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["skipped_steps"] for log in logs] == [1, 1]
    single = make_trainer(
        pair, tmp_path / "single", train=rows(12), **{**options, "logging_steps": 1, "max_steps": 1}
    )
    single.train()
    first = single.state.log_history[0]["loss"]
    assert 0.3 * first < logs[0]["loss"] < 1.5 * first  # a mean over two steps, not over three


def test_skip_has_a_limit(pair, tmp_path):
    guards = GuardsConfig(non_finite="skip", max_skipped_steps=2)
    trainer = make_trainer(pair, tmp_path, train=rows(12), guards=guards, **ADAM)
    trainer.add_callback(_Flaw(trainer, {2, 3, 5}))
    with pytest.raises(NonFinite, match=r"Step 5: the gradient .* 2 steps were left out"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "complete.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_skipped_steps": 3}, "no effect"),
        ({"non_finite": "skip", "max_skipped_steps": 0}, ">= 1"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GuardsConfig(**settings)
