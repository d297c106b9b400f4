"""A checkpoint counts when it is whole; stops, and evaluations that a stop breaks off, leave what goes on as
if undisturbed."""

import logging
import os
import signal

import pytest
import torch
from helpers.trainers import make_trainer, rows, weights
from tiny_models import tiny_pair
from transformers import TrainerCallback

from hpd.training.checkpoints import (
    CheckpointFailed,
    CheckpointUnreadable,
    is_complete,
    mark_complete,
    newest_complete,
    rotate,
    writing,
)
from hpd.training.stopping import Interrupted, catch_signals


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def checkpoint(run, step, complete=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("0123456789")
    if complete:
        mark_complete(folder, {"step": step})
    return folder


def test_what_is_not_whole_is_skipped_with_a_warning_and_kept(tmp_path, caplog):
    whole = checkpoint(tmp_path, 9)
    unmarked, cut, lacking = (
        checkpoint(tmp_path, 10, complete=False),
        checkpoint(tmp_path, 11),
        checkpoint(tmp_path, 12),
    )
    (cut / "weights").write_text("01234")
    (lacking / "weights").unlink()
    assert newest_complete(tmp_path) == whole
    for folder in (unmarked, cut, lacking):
        assert f"{folder} is incomplete" in caplog.text
        assert folder.is_dir()
    assert newest_complete(tmp_path / "nowhere") is None


def test_rotation_keeps_the_newest_the_best_and_what_is_incomplete(tmp_path):
    folders = [checkpoint(tmp_path, step) for step in (1, 2, 3, 10)]
    broken = checkpoint(tmp_path, 11, complete=False)
    rotate(tmp_path, 2, str(folders[1]))
    assert [folder.is_dir() for folder in [*folders, broken]] == [False, True, False, True, True]
    rotate(tmp_path, 1, None)
    assert [folder.is_dir() for folder in folders] == [False, False, False, True]


def test_a_full_disk_is_one_error_whoever_writes(tmp_path):
    with open("/dev/full", "wb", buffering=0) as full:
        for write in (lambda: full.write(b"x"), lambda: torch.save({"x": torch.zeros(1000)}, full)):
            with (
                pytest.raises(
                    CheckpointFailed, match="run could not be written: .*(No space left|took no more)"
                ),
                writing("run"),
            ):
                write()
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes differ")


OPTIONS = {
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "train_sampling_strategy": "random",
    "logging_steps": 3,
}


def test_the_old_checkpoint_outlives_a_failed_save(pair, tmp_path):
    class NoSpace(type(make_trainer(pair, tmp_path))):
        def _save_rng_state(self, output_dir):
            if output_dir.endswith("-4"):
                raise OSError(28, "No space left on device")
            super()._save_rng_state(output_dir)

    trainer = make_trainer(pair, tmp_path, train=rows(12), save_total_limit=1, **OPTIONS)
    trainer.__class__ = NoSpace
    with pytest.raises(CheckpointFailed, match="checkpoint-4 could not be written: No space left on device"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_complete(tmp_path / "checkpoint-2")


class _StopIn(TrainerCallback):
    """Asks for a stop at a batch of an evaluation."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.stop_cleanly("Told to.")


def test_an_evaluation_that_is_broken_off_is_done_again(pair, tmp_path):
    options = {
        **OPTIONS,
        "train": rows(12),
        "evaluation": rows(6, offset=3),
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "save_steps": 3,
    }
    straight, stopped = (make_trainer(pair, tmp_path / name, **options) for name in ("straight", "stopped"))
    straight.train()
    stopped.add_callback(_StopIn(stopped, 3))
    stopped.train()
    assert stopped.stop_reason == "Told to."
    assert not any("eval_loss" in log for log in stopped.state.log_history)
    resumed = make_trainer(pair, tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    logs = [
        [log["eval_loss"] for log in t.state.log_history if "eval_loss" in log] for t in (straight, resumed)
    ]
    assert logs[0] == logs[1]
    assert straight.state.best_metric == resumed.state.best_metric
    assert torch.equal(weights(straight), weights(resumed))


def test_signals_raise_tell_the_trainer_and_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    told = []

    class Trainer:
        def stop_cleanly(self, reason):
            told.append(reason)

    with catch_signals() as signals, signals.stopping(Trainer()):
        os.kill(os.getpid(), signal.SIGTERM)
    assert told == ["SIGTERM."]
    with pytest.raises(Interrupted, match="Ctrl-C"), catch_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_finalizer_swallowed_stops_training_at_once():
    """Python prints what is raised in a finalizer and goes on; the run must not."""
    told = []

    class Trainer:
        def stop_cleanly(self, reason):
            told.append(reason)

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with catch_signals() as signals:
        Finalized()
        assert told == []
        with signals.stopping(Trainer()):
            assert told == ["SIGTERM."]


def stop_reasons(*numbers):
    told = []

    class Trainer:
        def stop_cleanly(self, reason):
            told.append(reason)

    with catch_signals() as signals, signals.stopping(Trainer()):
        for number in numbers:
            os.kill(os.getpid(), number)
    return told


def test_a_closed_terminal_and_a_warning_of_slurm_stop_once(capfd):
    """A shell and the system both tell of a closed terminal, and SIGTERM follows a warning."""
    assert stop_reasons(signal.SIGHUP, signal.SIGHUP) == ["SIGHUP (the terminal was closed)."]
    assert stop_reasons(signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM) == ["SIGUSR1."]
    assert "saving after this step" in capfd.readouterr().err


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_reasons(signal.SIGHUP) == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resuming_without_a_complete_checkpoint_is_an_error(pair, tmp_path, caplog):
    checkpoint(tmp_path, 3, complete=False)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(pair, tmp_path).train(resume_from_checkpoint=True)


def test_a_best_checkpoint_that_is_damaged_is_named(pair, tmp_path):
    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (tmp_path / f"checkpoint-{state.global_step}" / "model.safetensors").write_bytes(bytes(1000))

    options = {**OPTIONS, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(pair, tmp_path, train=rows(12), evaluation=rows(4), **options)
    trainer.add_callback(Damage())
    with pytest.raises(CheckpointUnreadable, match=r"model.safetensors of the checkpoint .* cannot be read"):
        trainer.train()
