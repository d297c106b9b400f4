"""Weights do not follow the file that they came from: writing it again in place changes no run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, TrainerCallback

from hpd.config import load_recipe
from hpd.models.memory import own_weights
from hpd.progress import Progress
from hpd.training.run import train


def write_in_place(path: Path) -> None:
    content = path.read_bytes()
    with path.open("wb") as file:  # cut, then written: the pages of every mapping are dropped in between
        file.write(content)


def test_a_mapped_weight_is_lost_with_its_file_and_an_owned_one_is_not(tmp_path):
    student, _ = tiny_pair("llama", tmp_path)
    kept = {}
    for owned in (False, True):
        model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        if owned:
            own_weights(model)
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight.fill_(7.0)
        write_in_place(student / "model.safetensors")
        kept[owned] = bool((weight == 7.0).all())
    # Should the first ever hold, transformers reads weights into memory, and own_weights can go.
    assert kept == {False: False, True: True}


def test_tied_weights_stay_tied(tmp_path):
    student, _ = tiny_pair("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    own_weights(model)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


class _Rewrite(TrainerCallback):
    def __init__(self, path):
        self._path = path

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            write_in_place(self._path)


class _Rewriting(Progress):
    def __init__(self, path):
        self._path = path

    def callbacks(self):
        return (_Rewrite(self._path),)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_run_does_not_notice_that_its_models_are_written_again(tmp_path, role):
    pair = dict(zip(("student", "teacher"), tiny_pair("llama", tmp_path), strict=True))
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "max_length": 32,
        "use_cpu": True,
    }
    weights = {}
    for name in ("undisturbed", "disturbed"):
        recipe = {
            **{key: str(path) for key, path in pair.items()},
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "train": settings,
            "output_dir": str(tmp_path / name),
        }
        progress = _Rewriting(pair[role] / "model.safetensors") if name == "disturbed" else Progress()
        train(load_recipe(recipe), progress=progress)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert all((weights["disturbed"][key] == value).all() for key, value in weights["undisturbed"].items())
