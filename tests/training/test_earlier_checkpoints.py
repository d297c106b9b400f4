"""A checkpoint of the version before is gone on from bit for bit, whatever it holds."""

import pytest
import torch
from helpers.earlier_checkpoints import rewrite_as_earlier
from helpers.trainers import _stop_at, make_trainer, rows, weights
from tiny_models import tiny_pair

from hpd.config.schema import GuardsConfig
from hpd.methods.prefixes import Prefixes, ReplayConfig, RolloutConfig
from hpd.methods.strategy import StrategyConfig
from hpd.training.checkpoints import is_complete
from hpd.training.state import read_state

OPTIONS = {
    "train": rows(24),
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "max_steps": 6,
    "logging_steps": 2,  # the checkpoint lies between two logs
    "optim": "adamw_torch",
}
SHARE = {"schedule": "adaptive", "start": 0.2, "end": 1.0}
RUNS = {
    "adaptive terms": {"method": "taid"},
    "adaptive skews": {"method": "distillm2", "rollouts": RolloutConfig(max_new_tokens=4)},
    "replay": {
        "method": "forward_kl",
        "prefixes": Prefixes(student=0.8),
        "rollouts": RolloutConfig(max_new_tokens=4, replay=ReplayConfig(capacity=6, fresh=0.5)),
    },
    "repeated updates": {
        "method": "opd",
        "prefixes": Prefixes(student=0.8),
        "rollouts": RolloutConfig(max_new_tokens=4),
        "strategy": StrategyConfig(type="policy_gradient", updates=2),
    },
    "importance of replay": {
        "method": "opd",
        "prefixes": Prefixes(student=0.8),
        "rollouts": RolloutConfig(
            max_new_tokens=4, replay=ReplayConfig(capacity=6, fresh=0.5, importance=True)
        ),
        "strategy": StrategyConfig(type="policy_gradient", updates=2),
    },
    "adaptive share": {
        "method": "forward_kl",
        "prefixes": Prefixes(student=SHARE, adaptive_margin=-100.0),
        "rollouts": RolloutConfig(max_new_tokens=4),
        "evaluation": rows(4),
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}
OF_THE_CLOCK = ("runtime", "per_second", "train_loss", "total_flos")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def logs(trainer):
    return [
        {name: value for name, value in log.items() if not any(word in name for word in OF_THE_CLOCK)}
        for log in trainer.state.log_history
    ]


@pytest.mark.parametrize("name", RUNS)
def test_an_earlier_checkpoint_is_gone_on_from_bit_for_bit(pair, tmp_path, name):
    options = {**OPTIONS, **RUNS[name]}
    straight = make_trainer(pair, tmp_path / "straight", **options)
    straight.train()
    first = make_trainer(pair, tmp_path / "stopped", **options)
    first.add_callback(_stop_at(3))
    first.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    rewrite_as_earlier(checkpoint)
    assert is_complete(checkpoint)
    assert not list(checkpoint.glob("state-*"))
    assert (checkpoint / "rollouts-rank0.pt").is_file() == (
        name in ("replay", "importance of replay", "repeated updates")
    )
    second = make_trainer(pair, tmp_path / "stopped", **options)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(straight), weights(second))
    assert logs(straight) == logs(second)
    assert straight._schedule.state_dict() == second._schedule.state_dict()
    last = tmp_path / "stopped" / "checkpoint-6"
    assert (last / "state-rank0.pt").is_file()
    assert not {"hpd_adaptive", "hpd_student_share"} & second.state.stateful_callbacks.keys()


def test_skipped_steps_of_an_earlier_checkpoint_count(pair, tmp_path):
    options = {**OPTIONS, "train": rows(24), "guards": GuardsConfig(non_finite="skip")}
    first = make_trainer(pair, tmp_path, **options)
    first.add_callback(_stop_at(3))
    first._watch.skipped_steps = 2
    first.train()
    rewrite_as_earlier(tmp_path / "checkpoint-3")
    second = make_trainer(pair, tmp_path, **options)
    second.train(resume_from_checkpoint=True)
    assert second._watch.skipped_steps == 2


def test_a_process_without_a_part_goes_on_with_what_all_share(pair, tmp_path, caplog):
    """As where something else has written the checkpoint."""
    first = make_trainer(pair, tmp_path, **OPTIONS, method="taid")
    first.add_callback(_stop_at(3))
    first.train()
    checkpoint = tmp_path / "checkpoint-3"
    rewrite_as_earlier(checkpoint)
    found = read_state(checkpoint, 1, "cpu", first.stateful, required=False).parts
    assert "the next log covers the steps from here on only" in caplog.text
    assert set(found) <= {"terms", "watch", "share"}
    assert found["terms"] == first._schedule.state_dict()
    with pytest.raises(ValueError, match="holds no state-rank1.pt, which replay and repeated updates need"):
        read_state(checkpoint, 1, "cpu", first.stateful, required=True)
