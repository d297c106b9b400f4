"""Settings of a trainer: each is used, refused by name, or without effect for a stated reason."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers
import trl
from transformers import TrainingArguments
from trl import SFTConfig

import hpd
from hpd import DistillConfig
from hpd.config import load_recipe
from hpd.training.arguments import as_config, check_names, train_arguments
from hpd.training.settings import IN_RECIPES, REFUSED, USED, WITHOUT_EFFECT

FIELDS = [f.name for f in dataclasses.fields(DistillConfig) if f.init]
CPU = {"use_cpu": True, "report_to": "none", "bf16": False}


def recipe(**train):
    return load_recipe(
        {
            "student": "student",
            "teacher": "teacher",
            "data": {"path": "rows.jsonl"},
            "train": {"use_cpu": True, "report_to": "none", **train},
            "output_dir": "run",
        }
    )


def readers():
    """The source that trains: where a setting that is used must be read."""
    home = Path(transformers.__file__).parent
    files = [
        *home.glob("trainer*.py"),
        home / "training_args.py",
        *(home / "integrations").glob("*.py"),
        *(Path(trl.__file__).parent / "trainer").glob("sft_*.py"),
        *(Path(hpd.__file__).parent / "training").glob("*.py"),
    ]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_one_place(name):
    places = [place for place in (USED, REFUSED, WITHOUT_EFFECT) if name in place]
    assert len(places) == 1, f"{name}: find out whether DistillTrainer reads it, and add it to one table"


def test_no_table_names_a_field_that_is_gone():
    assert {*USED, *REFUSED, *WITHOUT_EFFECT, *IN_RECIPES} <= set(FIELDS)


def test_what_is_called_used_is_read_somewhere():
    text = readers()
    read = set(re.findall(r"(?<=args\.)\w+|(?<=self\.)\w+", text))
    assert [name for name in USED if name not in read] == []


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_is_called_without_effect_is_refused_in_a_recipe(name):
    with pytest.raises(ValueError, match=f"train.{name} has no effect"):
        check_names(recipe(**{name: True}))


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"loss_type": "dft"}, "method or terms"),
        ({"label_smoothing_factor": 0.1}, "my_module:name"),
        ({"label_names": ["targets"]}, "column labels"),
    ],
)
def test_settings_of_another_loss_are_refused_by_name(options, instead):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"train.{name} has no effect.*{instead}"):
        DistillConfig(output_dir="run", **CPU, **options)
    with pytest.raises(ValueError, match=f"train.{name} has no effect.*{instead}"):
        train_arguments(recipe(**options))


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"assistant_only_loss": True}, "data.labels: assistant"),
        ({"completion_only_loss": False}, "data.labels: completion, or all"),
        ({"dataset_text_field": "body"}, "data.columns"),
        ({"output_dir": "elsewhere"}, "output_dir beside train"),
        ({"trust_remote_code": True}, "student.trust_remote_code"),
    ],
)
def test_settings_with_a_place_elsewhere_in_a_recipe_are_refused_there(options, instead):
    with pytest.raises(ValueError, match=f"has no effect: set {instead}"):
        train_arguments(recipe(**options))


def test_a_field_of_a_newer_library_is_refused_and_ones_own_is_not():
    newer = dataclasses.make_dataclass("Newer", [("quantum", bool, False)], bases=(DistillConfig,))
    newer.__module__ = "trl.trainer.sft_config"
    assert newer(output_dir="run", **CPU).quantum is False
    with pytest.raises(ValueError, match=r"train.quantum is newer than this version of hpd"):
        newer(output_dir="run", quantum=True, **CPU)
    own = dataclasses.make_dataclass("Own", [("quantum", bool, False)], bases=(DistillConfig,))
    own.__module__ = "my_script"
    assert own(output_dir="run", quantum=True, **CPU).quantum is True


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"optim": "adamw_8bit"}, "bitsandbytes"),
        ({"optim": "paged_lion_8bit"}, "bitsandbytes"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"optim": "galore_adamw"}, "galore-torch"),
        ({"optim": "adamw_torch_8bit"}, "torchao"),
        ({"use_liger_kernel": True}, "liger-kernel"),
    ],
)
def test_a_package_behind_a_setting_is_missed_before_anything_loads(options, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"not installed: pip install {package}"):
        DistillConfig(output_dir="run", **CPU, **options)


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"]
)
def test_optimizers_of_torch_need_no_package(optim, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert DistillConfig(output_dir="run", optim=optim, **CPU).optim == optim


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_settings_of_the_parents_are_taken_over_as_they_are(kind):
    given = kind(output_dir="run", learning_rate=3e-4, accelerator_config={"split_batches": True}, **CPU)
    taken = as_config(given)
    assert isinstance(taken, DistillConfig)
    assert taken.vocabulary == "error"
    for field in dataclasses.fields(kind):
        if field.init:
            assert getattr(taken, field.name) == getattr(given, field.name), field.name


def test_settings_that_are_taken_over_are_checked():
    with pytest.raises(ValueError, match="loss_type has no effect"):
        as_config(SFTConfig(output_dir="run", loss_type="dft", **CPU))
    with pytest.raises(TypeError, match="args is a dict"):
        as_config({"learning_rate": 1})


def test_settings_of_another_trainer_of_trl_are_refused():
    with pytest.raises(ValueError, match="DPOConfig, whose .* would have no effect"):
        as_config(trl.DPOConfig(output_dir="run", **CPU))


@pytest.mark.parametrize(("given", "meant"), [("no", "no"), (False, "no"), ("steps", "steps")])
def test_no_is_a_strategy_whatever_yaml_makes_of_it(given, meant):
    assert train_arguments(recipe(save_strategy=given)).save_strategy == meant


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("forward_kl", False),
        ("eval_math_reverse_kl", False),
        ("reverse_kl_k1", False),
        ("loss", False),
        ("gsm8k_truncated", False),
        ("gsm8k_accuracy", True),
        ("top1_agreement", True),
    ],
)
@pytest.mark.parametrize("make", [DistillConfig, SFTConfig])
def test_the_best_of_a_kl_is_the_smallest(tmp_path, make, metric, higher):
    args = make(output_dir=str(tmp_path), use_cpu=True, bf16=False, metric_for_best_model=metric)
    assert as_config(args).greater_is_better is higher


def test_an_entropy_is_not_best_without_a_direction(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "metric_for_best_model": "student_entropy"}
    with pytest.raises(ValueError, match="neither better high nor low"):
        DistillConfig(**given)
    assert DistillConfig(**given, greater_is_better=True).greater_is_better is True
