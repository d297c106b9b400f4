"""Several validation sets: each has metrics of its own, in logs, summaries, reports and choices."""

import json

import pytest
from helpers.trainers import rows
from safetensors.torch import load_file
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd.cli import app
from hpd.config import load_recipe
from hpd.experiments.curves import curve_panels, validation_is_missing
from hpd.experiments.experiment import is_of_validation, validation_metrics
from hpd.experiments.metrics import higher_is_better, label
from hpd.experiments.plots import level_of
from hpd.experiments.results import read_results
from hpd.training.caching import write_cache
from hpd.training.run import train

STEPS = {"save_strategy": "steps", "save_steps": 1}
FIGURES = ("loss", "forward_kl", "reverse_kl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture
def tree(pair, tmp_path):
    validation = {
        "near": write(tmp_path / "near.jsonl", rows(4)),
        "far-off": write(tmp_path / "far.jsonl", rows(6, offset=5)),
    }
    return {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": write(tmp_path / "rows.jsonl", rows(8)), "validation": validation},
        "method": "forward_kl",
        "output_dir": str(tmp_path / "run"),
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "logging_steps": 1,
            "save_strategy": "best",
            "metric_for_best_model": "far-off_forward_kl",
        },
    }


def logs_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_set_is_measured_apart_as_alone(tree, tmp_path):
    summary = train(load_recipe(tree))
    logs = logs_of(tmp_path / "run")
    for name in ("near", "far-off"):
        for figure in FIGURES:
            measured = [log[f"eval_{name}_{figure}"] for log in logs if f"eval_{name}_{figure}" in log]
            assert len(measured) == 3, "after each step, and at the end"
            assert summary[f"{name}_{figure} before"] > measured[0]
            assert summary[f"{name}_{figure} after"] == pytest.approx(measured[-1], abs=1e-6)
    assert not any("eval_loss" in log or "eval_forward_kl" in log for log in logs)
    # The best checkpoint is that of the set that was named.
    best = min(
        (log["eval_far-off_forward_kl"], log["step"])
        for log in logs
        if "eval_far-off_forward_kl" in log and log["step"]
    )
    (kept,) = {path.name for path in (tmp_path / "run").glob("checkpoint-*")} & {f"checkpoint-{best[1]}"}
    assert kept
    # Alone, a set is measured the same.
    for name, place in tree["data"]["validation"].items():
        alone = {**tree, "output_dir": str(tmp_path / name), "data": {**tree["data"], "validation": place}}
        alone["train"] = {**tree["train"], "metric_for_best_model": "forward_kl"}
        found = train(load_recipe(alone))
        for figure in FIGURES:
            assert summary[f"{name}_{figure} after"] == pytest.approx(found[f"{figure} after"], abs=1e-6)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "near")]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0]), "training is as with one"


def test_commands_show_the_sets(tree, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(tree))
    doctor = CliRunner().invoke(app, ["doctor", str(file)])
    assert "8 rows, 4 held out (near), 6 held out (far-off)" in " ".join(doctor.output.split())
    shown = CliRunner().invoke(app, ["train", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "near_forward_kl" in shown.output
    for name, batches in (("near", 1), ("far-off", 1)):
        assert f"validation of {name} {batches}/{batches}" in shown.output
    assert "validation 1/1" not in shown.output
    assert "far-off_top1_agreement" in shown.output
    results = read_results([tmp_path / "run"])
    titles = {panel.key: panel.title for panel in curve_panels(results, {})}
    for name in ("near", "far-off"):
        assert titles[f"curve-{name}_forward_kl"].startswith(f"KL(teacher || student), nats, of {name}")
        level = level_of(results, f"{name}_student_entropy")
        assert level is not None
        assert level[0] == results.runs[0].figures[f"{name}_teacher_entropy"]
    assert "curve-forward_kl" not in titles
    assert not validation_is_missing(results)


def test_a_cache_holds_all_sets(tree, tmp_path):
    tree["cache"] = {"path": str(tmp_path / "cache")}
    summary = write_cache(load_recipe(tree))
    tree["teacher"] = {"type": "cached", "path": str(summary.path), "model": tree["teacher"]}
    assert "far-off_loss after" in train(load_recipe(tree))


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ({}, "data.validation is an empty mapping"),
        ({"a b": "x.jsonl"}, "'a b' becomes part of the names of metrics"),
        ({"a": " "}, "data.validation.a is empty"),
        ({"a": "x.jsonl", "b": "x.jsonl"}, "names x.jsonl twice"),
        ({"a": 0.5}, "data.validation"),
    ],
    ids=["empty", "name", "place", "twice", "share"],
)
def test_slips_in_sets_are_refused_when_the_recipe_is_read(tree, validation, said):
    with pytest.raises(ValueError, match=said):
        load_recipe({**tree, "data": {**tree["data"], "validation": validation}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric_for_best_model": "forward_kl"}, "of several validation sets each has NAME_loss"),
        ({"metric_for_best_model": "far_forward_kl"}, "Did you mean '"),
        ({"metric_for_best_model": None}, "train.save_strategy: best needs train.metric_for_best_model"),
        ({"load_best_model_at_end": True, **STEPS, "metric_for_best_model": None}, "model is 'loss'"),
        ({"eval_strategy": "no", "save_strategy": "no"}, "has no effect where nothing is evaluated during"),
    ],
    ids=["no-set", "misspelled", "none", "default", "no-evaluation"],
)
def test_a_best_model_by_what_is_not_measured_is_refused_before_models_load(tree, tmp_path, changes, said):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({**tree, "train": {**tree["train"], **changes}}))
    done = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert (done.exit_code, said in " ".join(done.output.split())) == (2, True), done.output


def test_an_adaptive_share_needs_one_set(tree):
    tree["method"] = "distillm"
    with pytest.raises(ValueError, match=r"an adaptive share follows the validation loss.* or several"):
        train(load_recipe(tree))


def test_names_of_experiments():
    assert label("math_forward_kl") == "KL(teacher || student), nats, of math"
    assert higher_is_better("math_forward_kl") is False
    assert higher_is_better("math_top1_agreement") is True
    assert is_of_validation("math_loss")
    assert not is_of_validation("accuracy")
    assert validation_metrics({"a": "x"})[:2] == ["a_loss", "a_forward_kl"]
    assert validation_metrics("x")[:2] == ["loss", "forward_kl"]
