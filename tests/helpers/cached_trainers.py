"""Trainers on cached teachers, and the losses that they give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.cached_pairs import make_recipe
from hpd.config import load_recipe
from hpd.progress import Progress
from hpd.teachers.sources import load_teacher
from hpd.training.folder import RunFolder
from hpd.training.plan import plan
from hpd.training.single import make_trainer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("cached"))


def trainer_of(recipe, folder, *overrides):
    loaded = load_recipe(recipe, [f"output_dir={folder}", *overrides])
    planned = plan(loaded)
    from hpd.models import load_model

    student = load_model(loaded.student, "student")
    return make_trainer(planned, student, load_teacher(loaded.teacher), RunFolder(loaded), Progress())


def batches_of(trainer):
    loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
    return [trainer._prepare_inputs(batch) for loader in loaders for batch in loader]


def losses(folder, name="loss"):
    logs = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [log[name] for log in logs if "loss" in log]
