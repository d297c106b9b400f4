"""A checkpoint behind the last step of an epoch whose evaluation, log and save are still to come loses none
of them."""

from __future__ import annotations

import json

import pytest
from helpers.faults import left_behind, same
from tiny_models import tiny_pair
from transformers import TrainerCallback

from hpd.config import load_recipe
from hpd.progress import Progress
from hpd.training.checkpoints import read_mark
from hpd.training.run import train


class _Killed(Exception):
    pass


class _KillAt(TrainerCallback):
    """Ends the program where a kill might: nothing that comes after is done."""

    def __init__(self, event, step):
        self._step = step
        setattr(self, event, self._kill)

    def _kill(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise _Killed


class _Kill(Progress):
    def __init__(self, event, step):
        self._callback = _KillAt(event, step)

    def callbacks(self):
        return (self._callback,)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    student, teacher = tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i + 1}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "problems.jsonl").write_text('{"prompt": "say 3:", "answer": "3 and 4"}\n')
    return {
        "student": str(student),
        "teacher": str(teacher),
        "method": "hpd",
        # Dropout draws from the numbers that an evaluation's loader draws from too.
        "lora": {"r": 2, "lora_dropout": 0.3},
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.25},
        "train": {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "use_cpu": True,
            "eval_strategy": "epoch",
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 2,
        },
        "problems": str(folder / "problems.jsonl"),
    }


def recipe(base, folder, **options):
    tree = {**base, "train": {**base["train"], **options}, "output_dir": str(folder)}
    problems = tree.pop("problems")
    if tree["train"].pop("tasks", False):
        tree["eval"] = [{"task": "exact-match", "data": problems, "every": "epoch", "max_new_tokens": 4}]
    return load_recipe(tree)


OPTIONS = {
    "eval": {},
    "eval and log": {"logging_strategy": "epoch"},
    "tasks": {"tasks": True},
    "best": {
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "save, too": {"save_strategy": "epoch"},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "ends within an epoch": {"max_steps": 8, "save_steps": 2},
    "ends within an epoch, save, too": {"max_steps": 8, "save_strategy": "epoch"},
}
EVENTS = {
    "behind a save": ("on_save", 3),
    "at the end of an epoch": ("on_epoch_end", 6),
    "in the evaluation": ("on_evaluate", 3),
    "in the next epoch": ("on_step_end", 7),
    "at the last": ("on_epoch_end", 9),
    "behind the last": ("on_train_end", 9),
    "behind the last of eight": ("on_train_end", 8),
    "before the last of eight": ("on_epoch_end", 8),
}


QUICK = ("eval and log",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPTIONS]
)
def test_killed_around_the_end_of_an_epoch_and_resumed_equals_undisturbed(base, tmp_path, name):
    straight = tmp_path / "straight"
    train(recipe(base, straight, **OPTIONS[name]))
    expected, killed = left_behind(straight), 0
    last = json.loads((straight / "summary.json").read_text())["steps"]
    # An end that this run does not have kills nothing, and undisturbed it is already.
    events = [
        (event, step)
        for event, step in EVENTS.values()
        if step <= last and (event != "on_train_end" or step == last)
    ]
    for number, (event, step) in enumerate(events):
        options, run = OPTIONS[name], tmp_path / str(number)
        try:
            train(recipe(base, run, **options), progress=_Kill(event, step))
        except _Killed:
            killed += 1
            train(recipe(base, run, **options))
        same(expected, left_behind(run))
    assert killed >= 5


def test_a_checkpoint_says_whether_its_epoch_has_ended(base, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(_Killed):
        train(recipe(base, run), progress=_Kill("on_epoch_end", 6))
    assert [read_mark(run / f"checkpoint-{step}")["epoch_ended"] for step in (3, 6)] == [False, False]
    train(recipe(base, tmp_path / "other", save_strategy="epoch"))
    assert read_mark(tmp_path / "other" / "checkpoint-3")["epoch_ended"]
