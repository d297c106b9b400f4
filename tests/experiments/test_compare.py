"""Grids: what an experiment file means, what it refuses, and a small one run for real."""

import dataclasses
import importlib
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.forked import context
from helpers.tiny_grid import command, tiny_experiment, tiny_grid

from hpd.config import load_recipe
from hpd.experiments.axes import axis_values
from hpd.experiments.bases import evaluations
from hpd.experiments.compare import compare
from hpd.experiments.experiment import Budget, load_experiment, read_experiment
from hpd.experiments.grid import expand
from hpd.experiments.manifest import differing_paths, require_equal_environments
from hpd.experiments.tuning import Choice, all_tuning, expand_tuning
from hpd.progress import Progress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return tiny_grid(tmp_path_factory)


def write(**changes):
    tree = {
        "name": "e",
        "base": {
            "student": "s",
            "teacher": "t",
            "data": {"path": "d.jsonl"},
            "train": {"learning_rate": 1e-3},
        },
        "axes": {"method": ["hpd", "forward_kl"], "seed": [0, 1]},
        **changes,
    }
    return yaml.safe_dump(tree, sort_keys=False)


def test_the_grid_is_the_product_without_the_excluded(tmp_path):
    text = write(
        axes={"method_kwargs.reverse": [0.0, 1.0], "method_kwargs.mask": [False, True], "seed": [0, 1]},
        exclude=[{"method_kwargs.reverse": 0.0, "method_kwargs.mask": True}],
        set={"method": "hpd", "train.warmup_steps": 3},
    )
    cells = expand(read_experiment(text), tmp_path)
    # A grid that is stopped early has run every variant on the first seed.
    assert [cell.name for cell in cells][2:4] == ["reverse-1__mask-on__seed-0", "reverse-0__mask-off__seed-1"]
    assert len(cells) == 6
    last = cells[-1]
    assert last.recipe.method_kwargs == {"reverse": 1.0, "mask": True}
    assert last.recipe.train == {"learning_rate": 1e-3, "warmup_steps": 3, "seed": 1}
    assert last.axes == {"method_kwargs.reverse": "1", "method_kwargs.mask": "on", "seed": "1"}
    assert {cell.recipe.output_dir for cell in cells} == {
        str(tmp_path / "runs" / cell.name) for cell in cells
    }


def test_a_method_axis_does_not_inherit_the_base_methods_parameters(tmp_path):
    base = {
        "student": "s",
        "teacher": "t",
        "data": {"path": "d"},
        "method": "hpd",
        "method_kwargs": {"mask": False},
    }
    variants = {
        "plain": {"method": "akl"},
        "own": {"method": "akl", "method_kwargs": {"mu": 0.3}},
        "terms": {"terms": [{"objective": "nll"}]},
    }
    cells = expand(read_experiment(write(base=base, variants=variants, axes={"seed": [0]})), tmp_path)
    assert [dict(cell.recipe.method_kwargs) for cell in cells] == [{}, {"mu": 0.3}, {}]
    assert cells[2].recipe.method is None


def test_tuning_has_seeds_of_its_own_and_its_choice_is_frozen_per_variant(tmp_path):
    tune = {"train.learning_rate": [1e-3, 2e-3, 4e-3, 8e-3], "seeds": [10, 11], "metric": "forward_kl"}
    experiment = read_experiment(write(tune=tune))
    cells = expand_tuning(experiment, tmp_path, "train.learning_rate", {})
    assert len(cells) == 2 * 4 * 2
    assert {cell.recipe.train["seed"] for cell in cells} == {10, 11}
    taken = {"hpd": {"train.learning_rate": 4e-3}, "forward_kl": {"train.learning_rate": 1e-3}}
    test = expand(experiment, tmp_path, taken)
    assert {(c.recipe.method, c.recipe.train["learning_rate"]) for c in test} == {
        ("hpd", 4e-3),
        ("forward_kl", 1e-3),
    }
    assert {cell.recipe.train["seed"] for cell in test} == {0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, "unknown key 'axis'; Did you mean 'axes'"),
        ({"tune": {"train.learning_rate": [1e-3, 2e-3, 4e-3, 8e-3], "seeds": [1, 9]}}, "share seed 1"),
        (
            {"tune": {"train.learning_rate": [1e-3, 2e-3, 4e-3], "seeds": [9]}},
            "at least 4 learning rates over a factor of 8",
        ),
        ({"tune": {"train.learning_rate": [1e-3, 2e-3, 3e-3, 4e-3], "seeds": [9]}}, "over a factor of 8"),
        (
            {"tune": {"train.learning_rate": [1, 2, 4, 8], "seeds": [9], "metric": "accuracy"}},
            "better when higher",
        ),
        (
            {"tune": {"train.learning_rate": [1, 2, 4, 8], "seeds": [9], "metric": "tset"}},
            "not measured on validation rows",
        ),
        ({"axes": {"method": ["hpd", "hpd"]}}, "different values"),
        (
            {"axes": {"method": ["hdp"]}},
            "The cell hdp is not a valid recipe. Unknown method 'hdp'. Did you mean 'hpd'",
        ),
        ({"exclude": [{"metod": "hpd"}]}, "Did you mean 'method'"),
        ({"exclude": [{"seed": [0, 1]}]}, "exclude leaves no cell"),
        ({"budget": {"type": "hours", "value": 1}}, "'budget.type'"),
        ({"budget": {"type": "steps", "value": 0}}, "must be > 0"),
        ({"variants": {"a": {"method": "hpd"}}}, "variants or a method axis"),
        ({"own_samples_every": 5}, "own_samples is 0: say how many"),
        ({"own_samples": 5, "own_samples_every": 0}, "own_samples_every >= 1"),
        ({"base": "no.module:here"}, "is not available"),
        ({"axes": {"metod": ["hpd", "sft"]}}, "'metod' is not a recipe path. Did you mean 'method'"),
        ({"axes": {"init": {"a": "student-0"}}}, "gives each label the paths"),
        (
            {"axes": {"init": {"a": {"train.seed": 1}}, "seed": [0]}},
            "'init' and 'seed' both set train.seed",
        ),
        ({"paired": ["init"]}, "names 'init', which is not an axis"),
        ({"budget": {"type": "steps", "value": 3}, "set": {"train.max_steps": 9}}, "and set gives another"),
        (
            {"budget": {"type": "steps", "value": 3}, "axes": {"train.max_steps": [3, 9]}},
            "and axes gives another",
        ),
        (
            {"budget": {"type": "steps", "value": 3}, "set": {"train": {"max_steps": 9}}},
            "and set gives another",
        ),
        (
            {"axes": {"init": {"a": {"train": {"seed": 5}}}, "seed": [0]}},
            "'init' and 'seed' both set train.seed",
        ),
        (
            {"budget": {"type": "steps", "value": 3}, "axes": {"size": {"a": {"train": {"max_steps": 9}}}}},
            "and axes gives another",
        ),
        ({"baseline": {"method": "hdp"}}, "'hdp' is not a label of method. Did you mean 'hpd'"),
        ({"tune": {"train.max_grad_norm": [1.0], "seeds": [9]}}, "two or more different values"),
        (
            {"tune": {"train.max_grad_norm": [1.0, 0], "train.seed": [3, 4], "seeds": [9]}},
            "tuned and an axis",
        ),
    ],
)
def test_mistakes_in_the_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        expand(read_experiment(write(**changes)), tmp_path)


def test_an_axis_of_a_name_of_its_own_replaces_several_places_at_once(tmp_path):
    axes = {
        "writer": ["people", "teacher"],
        "init": {"a": {"student": "s-a", "train.seed": 5}, "b": {"student": "s-b", "train.seed": 6}},
    }
    text = write(
        axes=axes,
        set={"data.path": "$BASE/$writer/$init.jsonl", "method": "hpd"},
        paired=["init"],
        tune={"train.max_grad_norm": [1.0, 0], "seeds": [9], "set": {"student": "$BASE/other"}},
    )
    experiment = read_experiment(text)
    cells = expand(experiment, tmp_path)
    assert experiment.seeds == [5, 6]
    assert [cell.name for cell in cells] == [
        "writer-people__init-a",
        "writer-teacher__init-a",
        "writer-people__init-b",
        "writer-teacher__init-b",
    ]
    last = cells[-1].recipe
    assert (last.student.model, last.train["seed"]) == ("s-b", 6)
    assert last.data.path == str(tmp_path / "base" / "teacher" / "b.jsonl")
    # Every writer gets a choice of its own, on the student of `set`; the axis that is paired over gets none.
    tuning = expand_tuning(experiment, tmp_path, "train.max_grad_norm", {})
    assert [cell.axes["writer"] for cell in tuning] == ["people", "people", "teacher", "teacher"]
    assert {cell.recipe.student.model for cell in tuning} == {str(tmp_path / "base" / "other")}
    assert tuning[-1].recipe.data.path == str(tmp_path / "base" / "teacher" / "a.jsonl")


def test_a_section_given_as_a_mapping_takes_nothing_from_the_base(tmp_path):
    whole = write(set={"train": {"learning_rate": 3e-3, "warmup_steps": 2}})
    assert expand(read_experiment(whole), tmp_path)[0].recipe.train["warmup_steps"] == 2
    part = r"train is given as a whole, which takes learning_rate .*\(train\.warmup_steps\)"
    for changes in (
        {"set": {"train": {"warmup_steps": 2}}},
        {"axes": {"schedule": {"a": {"train": {"warmup_steps": 2}}}, "seed": [0, 1]}},
    ):
        with pytest.raises(ValueError, match=part):
            expand(read_experiment(write(**changes)), tmp_path)
    base = {"student": {"model": "s", "dtype": "bfloat16"}, "teacher": "t", "data": {"path": "d.jsonl"}}
    with pytest.raises(ValueError, match="student is given as a whole, which takes dtype"):
        expand(read_experiment(write(base=base, set={"student": {"model": "z"}})), tmp_path)
    # A teacher of another type has nothing in common with the base's.
    other = write(set={"teacher": {"type": "cached", "path": "cache"}})
    assert expand(read_experiment(other), tmp_path)[0].recipe.teacher.type == "cached"


def test_an_override_below_tune_sets_one_setting(tmp_path):
    tune = {"train.learning_rate": [1e-3, 2e-3, 4e-3, 8e-3], "metric": "forward_kl", "seeds": [9]}
    text = write(tune={**tune, "set": {"train.max_steps": 8}})
    experiment = read_experiment(text, ["tune.set.train.max_steps=2", "tune.set.train.warmup_steps=1"])
    assert experiment.tune.set == {"train.max_steps": 2, "train.warmup_steps": 1}
    cells = expand_tuning(experiment, tmp_path, "train.learning_rate", {})
    assert cells[0].recipe.train == {"learning_rate": 1e-3, "max_steps": 2, "warmup_steps": 1, "seed": 9}


def test_several_settings_are_tuned_one_after_the_other(tmp_path):
    tune = {
        "train.learning_rate": [1e-3, 2e-3, 4e-3, 8e-3],
        "train.max_grad_norm": [1.0, 0.1, 0],
        "seeds": [9],
    }
    experiment = read_experiment(write(tune=tune))
    first = expand_tuning(experiment, tmp_path, "train.learning_rate", {})
    assert {cell.recipe.train["max_grad_norm"] for cell in first} == {1.0}
    taken = {method: {"train.learning_rate": 4e-3} for method in ("hpd", "forward_kl")}
    second = expand_tuning(experiment, tmp_path, "train.max_grad_norm", taken)
    assert {cell.recipe.train["learning_rate"] for cell in second} == {4e-3}
    # The run at the first value has been made already.
    assert {cell.name for cell in first} & {cell.name for cell in second} == {
        f"{method}__learning_rate-0.004__max_grad_norm-1__seed-9" for method in ("hpd", "forward_kl")
    }
    assert len(all_tuning(experiment, tmp_path)) == 2 * (4 + 2)


def test_runs_may_differ_in_the_axes_only():
    recipes = [
        {"method": "hpd", "train": {"seed": s, "warmup_steps": w}, "output_dir": str(s)}
        for s, w in ((0, 1), (1, 2))
    ]
    assert differing_paths(recipes) == ["train.seed", "train.warmup_steps"]
    old, new = {"hpd": "1", "packages": {"torch": "2.8"}}, {"hpd": "1", "packages": {"torch": "2.9"}}
    with pytest.raises(ValueError, match="differ in more than the axes: packages"):
        require_equal_environments([old, new], [])
    require_equal_environments([old, new], ["packages"])


def test_variants_stand_in_the_order_of_their_own_axis():
    from hpd.experiments.results import _label_order

    experiment = read_experiment(
        write(axes={"method_kwargs.reverse": [0.0, 0.5, 1.0], "method_kwargs.sample_fraction": [1.0, 0.0]})
    )
    order = _label_order(experiment)
    assert list(order["method_kwargs.reverse"]) == ["0", "0.5", "1"]
    assert list(order["method_kwargs.sample_fraction"]) == [
        "1",
        "0",
    ]  # a label of two axes has a place in each


def test_choices_say_when_the_best_is_at_the_edge():
    choice = Choice(
        "hpd",
        "train.learning_rate",
        "loss",
        "min",
        2e-3,
        {"0.001": [1.0, 1.2], "0.002": [0.9], "0.004": [1.4]},
    )
    assert not choice.at_edge
    assert choice.spread == pytest.approx(0.5)
    assert choice._replace(chosen=1e-3).at_edge
    assert choice.ties == []
    assert choice._replace(tried={"0.002": [0.9], "0.004": [0.9], "0.001": [1.0]}).ties == [4e-3]


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiment_files_expand(tmp_path, monkeypatch, path):
    """Every cell of every committed experiment is a valid recipe (bases that train or need an extra are
    replaced)."""
    monkeypatch.chdir(ROOT)
    from hpd.demo.recipe import demo_recipe
    from hpd.experiments import tasks

    def cached(folder):
        tree = demo_recipe(folder)
        return {**tree, "teacher": {"type": "cached", "model": tree["teacher"], "path": "cache"}}

    for name in ("chains", "gym_chains", "short_answers"):
        monkeypatch.setattr(tasks, name, demo_recipe)
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    for name in ("real_pair", "real_pair_gpu"):
        monkeypatch.setattr(importlib.import_module("real_pair"), name, cached)
    for name in ("chain_inits", "foreign_chains"):
        monkeypatch.setattr(tasks, name, cached)
    experiment = load_experiment(path)
    assert len(experiment.seeds) >= 3
    # Repetitions differ in a folder's number: four stand for all.
    axes = {
        axis: dict(list(axis_values(values).items())[:4]) if axis in experiment.paired else values
        for axis, values in experiment.axes.items()
    }
    experiment = dataclasses.replace(experiment, axes=axes)
    cells = expand(experiment, tmp_path)
    assert len(cells) >= 12
    if experiment.tune is not None:
        assert all_tuning(experiment, tmp_path)
    assert "$" not in str([cell.recipe for cell in cells])
    if isinstance(experiment.baseline, str):
        from hpd.experiments.grid import group_key

        axes = [axis for axis in cells[0].axes if axis != "seed"]
        assert experiment.baseline in {group_key(cell.axes, axes) for cell in cells}


def test_every_cell_is_a_plain_run_folder(grid):
    names = sorted(path.name for path in (grid / "runs").iterdir())
    assert names == ["forward_kl__seed-0", "forward_kl__seed-1", "hpd__seed-0", "hpd__seed-1"]
    for name in names:
        run = grid / "runs" / name
        assert json.loads((run / "summary.json").read_text())["steps"] == 12
        assert load_recipe(run / "recipe.yaml").output_dir == str(run)
        record = json.loads((run / "experiment.json").read_text())
        assert {"accuracy", "own_entropy", "own_forward_kl", "own_reverse_kl"} <= set(record["figures"])
        assert record["cost"]["label_tokens"] > 0
        logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shares = [log["clipped_share"] for log in logs if "clipped_share" in log]
        assert record["figures"]["clipped_share"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)
        # Thirds of the positions on which the trainer measured the whole.
        thirds = [record["figures"][f"forward_kl_{third}_entropy"] for third in ("low", "mid", "high")]
        whole = json.loads((run / "summary.json").read_text())["forward_kl after"]
        assert sum(thirds) / 3 == pytest.approx(whole, rel=0.02)
        assert (run / "records-exact-match.jsonl").is_file()
    assert len(list((grid / "tune").iterdir())) == 4
    assert json.loads((grid / "teacher" / "figures.json").read_text()).keys() == {"accuracy"}
    choices = json.loads((grid / "tuned.json").read_text())
    assert [choice["group"] for choice in choices] == ["hpd", "forward_kl"]
    # Label tokens are counted where the loss sees them: the two methods read the same rows.
    costs = [
        json.loads((grid / "runs" / name / "experiment.json").read_text())["cost"]
        for name in ("hpd__seed-0", "forward_kl__seed-0")
    ]
    assert costs[0]["label_tokens"] == costs[1]["label_tokens"]
    assert costs[0]["flops"] == costs[1]["flops"] > 0


def test_an_interrupted_grid_goes_on_where_it_stopped(grid):
    kept, lost = grid / "runs" / "hpd__seed-0", grid / "runs" / "hpd__seed-1"
    before, figures = (
        (kept / "summary.json").stat().st_mtime,
        json.loads((lost / "experiment.json").read_text())["figures"],
    )
    shutil.rmtree(lost)
    _, failures = compare(
        grid.parent / "tiny.yaml", jobs=2, allow=["git_commit"]
    )  # somebody may commit meanwhile
    assert failures == []
    assert (kept / "summary.json").stat().st_mtime == before
    assert json.loads((lost / "experiment.json").read_text())["figures"] == pytest.approx(figures, abs=1e-4)


def test_a_grid_does_not_push_its_runs_over_each_other(tmp_path):
    pushed = {"train.push_to_hub": True, "train.hub_model_id": "me/mine"}
    path = tiny_experiment(tmp_path, tune=None, set=pushed)
    with pytest.raises(ValueError, match="push_to_hub would push every run of the experiment"):
        compare(path)
    assert not list((tmp_path / "runs").rglob("summary.json"))


def test_own_samples_without_prompts_are_refused_before_any_run(tmp_path):
    path = tiny_experiment(tmp_path, tune=None, evals=[], own_samples=3, baseline=None)
    with pytest.raises(ValueError, match="own_samples needs prompts to continue: give the recipe an eval"):
        compare(path)
    assert not list((tmp_path / "runs").rglob("summary.json"))


def test_a_changed_question_foreign_runs_and_changed_data_are_refused(grid):
    path = grid.parent / "tiny.yaml"
    text = path.read_text()
    with pytest.raises(ValueError, match="another experiment file or other overrides"):
        compare(path, ["budget.value=13"])
    try:
        path.write_text(text + "\n# another thought\n")
        with pytest.raises(ValueError, match="Changing the question after results are known"):
            compare(path, allow=["git_commit"])
    finally:
        path.write_text(text)
    rows = grid.parent / "rows.jsonl"
    content = rows.read_text()
    try:
        rows.write_text(content + content.splitlines()[0] + "\n")
        with pytest.raises(ValueError, match="Files have changed since the experiment began: data.path"):
            compare(path, allow=["git_commit"])
    finally:
        rows.write_text(content)
    recipe = grid / "runs" / "hpd__seed-0" / "recipe.yaml"
    content = recipe.read_text()
    try:
        recipe.write_text(content.replace("max_length: 64", "max_length: 32"))
        with pytest.raises(ValueError, match=r"train.max_length \(32, not 64\)"):
            compare(path, allow=["git_commit"])
    finally:
        recipe.write_text(content)


def test_dry_run_writes_nothing_and_names_the_method_of_its_prediction(grid, tmp_path):
    done = command("compare", grid.parent / "tiny.yaml", "--dry-run", "--no-probe")
    assert done.exit_code == 0, done.output
    words = (
        "finished runs",
        "method: hpd, forward_kl",
        "equal budget: 12 steps",
        "Memory of 1 at once",
        "other: 0 seconds",
    )
    for word in words:
        assert word in done.output, word
    folder = tmp_path / "new"
    folder.mkdir()
    done = command("compare", tiny_experiment(folder, axes={"method": ["hpd"], "seed": [0]}), "--dry-run")
    assert done.exit_code == 0, done.output
    assert "probe" in done.output
    assert not (folder / "grid").exists()


@pytest.mark.slow
def test_runs_start_by_themselves_beside_a_gpu(tmp_path_factory, monkeypatch):
    module = importlib.import_module("hpd.experiments.compare")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module._context().get_start_method() == "spawn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module._context().get_start_method() == "forkserver"
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(module, "_context", lambda: spawn)
    axes = {"method": ["forward_kl"], "seed": [0]}
    experiment = tiny_experiment(tmp_path_factory.mktemp("spawned"), axes=axes, tune=None)
    _, failures = compare(experiment)
    assert failures == []


def test_a_run_that_fails_costs_only_itself(tmp_path):
    path = tiny_experiment(
        tmp_path,
        axes={"train.optim": ["adamw_torch", "no_such_optimizer"], "seed": [0]},
        tune=None,
        evals=[],
        own_samples=0,
        budget={"type": "steps", "value": 2},
    )
    _, failures = compare(path)
    assert [failure.name for failure in failures] == ["optim-no_such_optimizer__seed-0"]
    assert "no_such_optimizer" in failures[0].reason
    assert (tmp_path / "grid" / "runs" / "optim-adamw_torch__seed-0" / "experiment.json").is_file()


@pytest.mark.parametrize("kind", [pytest.param("label_tokens", marks=pytest.mark.slow), "flops"])
def test_a_budget_stops_the_run_and_the_schedule_ends_there(tmp_path, kind):
    from hpd.estimate.cost import flops_per_token
    from hpd.experiments.worker import Job, run_job

    path = tiny_experiment(tmp_path, budget=None, tune=None)
    (cell, *_) = expand(read_experiment(path.read_text()), tmp_path)
    tree = {**yaml.safe_load(path.read_text())["base"], "method": "sft", "output_dir": str(tmp_path / kind)}
    tree["train"] = {**tree["train"], "max_steps": 40, "logging_steps": 1}
    recipe = load_recipe(tree)
    price = flops_per_token(recipe)
    value = 400 if kind == "label_tokens" else price.backbone * 900
    run_job(Job(recipe, cell.axes, Budget(type=kind, value=value)))
    cost = json.loads((tmp_path / kind / "cost.json").read_text())
    summary = json.loads((tmp_path / kind / "summary.json").read_text())
    assert 3 < summary["steps"] < 40
    per_step = cost[kind] / summary["steps"]
    assert value <= cost[kind] < value + 3 * per_step
    logs = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
    rates = [log["learning_rate"] for log in logs if "loss" in log]
    assert rates[1] > 0.8 * 1e-2  # cosine, over the budget and not over the ceiling of 40 steps
    assert rates[-1] < 0.1 * 1e-2
    assert cost["flops"] == pytest.approx(
        price.backbone * cost["trained_tokens"] + price.head * cost["label_tokens"]
    )
    with pytest.raises(ValueError, match=r"train.max_steps is the ceiling"):
        run_job(
            Job(
                load_recipe({**tree, "output_dir": str(tmp_path / "more")}),
                cell.axes,
                Budget(type=kind, value=1e15),
            )
        )


def test_the_price_of_a_token_is_the_formula_on_the_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    from hpd.estimate.cost import flops_per_token

    path = tiny_experiment(tmp_path)
    base = yaml.safe_load(path.read_text())["base"]

    def weights(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        head: Any = model.get_output_embeddings().weight  # type: ignore[union-attr]
        shared = head is model.get_input_embeddings().weight
        return sum(p.numel() for p in model.parameters()) - head.numel() * (1 if shared else 2), head.numel()

    (student, head), (teacher, teacher_head) = weights(base["student"]), weights(base["teacher"])
    hpd_price, sft_price = (
        flops_per_token(load_recipe({**base, "method": method})) for method in ("hpd", "sft")
    )
    assert hpd_price[:3] == (6 * student + 2 * teacher, 6 * head + 2 * teacher_head, 2 * (student + head))
    assert hpd_price[3:] == (2 * teacher, 2 * teacher_head)
    assert sft_price == (6 * student, 6 * head, 2 * (student + head), 0.0, 0.0)


def test_a_budget_in_seconds_stops_the_run(tmp_path):
    from hpd.experiments.worker import Job, run_job

    path = tiny_experiment(tmp_path, budget=None, tune=None)
    tree = {
        **yaml.safe_load(path.read_text())["base"],
        "method": "sft",
        "output_dir": str(tmp_path / "seconds"),
    }
    tree["train"] = {**tree["train"], "max_steps": 100_000, "logging_steps": 1, "warmup_steps": 0}
    run_job(Job(load_recipe(tree), {"seed": "0"}, Budget(type="seconds", value=2.0)))
    cost = json.loads((tmp_path / "seconds" / "cost.json").read_text())
    assert (
        2.0 <= cost["seconds"] < 6.0
    )  # a step of this pair takes hundredths of a second, here or on a busy machine
    logs = [json.loads(line) for line in (tmp_path / "seconds" / "metrics.jsonl").read_text().splitlines()]
    rates = [log["learning_rate"] for log in logs if "loss" in log]
    assert rates == sorted(rates, reverse=True)  # cosine over the seconds that are spent
    assert rates[-1] < 0.1 * 1e-2
    with pytest.raises(ValueError, match="needs --jobs 1"):
        compare(
            tiny_experiment(tmp_path, budget={"type": "seconds", "value": 2.0}, set={"train.max_steps": 9}),
            jobs=2,
        )


@pytest.mark.slow
def test_a_killed_run_of_a_grid_goes_on_with_what_it_had_spent(tmp_path):
    """Killed after its first checkpoint: the budget covers both lives, and the student is the undisturbed
    one."""
    import os
    import signal
    import time

    from safetensors.torch import load_file

    from hpd.experiments.worker import Job, run_job

    path = tiny_experiment(tmp_path, budget=None, tune=None)
    tree = {**yaml.safe_load(path.read_text())["base"], "method": "hpd"}
    tree["train"] = {
        **tree["train"],
        "max_steps": 400,
        "save_strategy": "steps",
        "save_steps": 5,
        "logging_steps": 5,
    }
    jobs = [
        Job(
            load_recipe({**tree, "output_dir": str(tmp_path / name)}),
            {"seed": "0"},
            Budget(type="label_tokens", value=3000),
        )  # 2988 before the last step: what is left is less than half a step
        for name in ("undisturbed", "killed")
    ]
    run_job(jobs[0])
    process = context().Process(target=run_job, args=(jobs[1],))
    process.start()
    deadline = time.monotonic() + 120
    while (
        not (tmp_path / "killed" / "checkpoint-5" / "complete.json").is_file() and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "killed" / "experiment.json").is_file(), "killed too late: raise the budget"
    run_job(jobs[1])
    costs = [json.loads((tmp_path / name / "cost.json").read_text()) for name in ("undisturbed", "killed")]
    for kind in ("label_tokens", "trained_tokens", "flops"):
        assert costs[0][kind] == costs[1][kind] > 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "killed"))
    assert all((one[key] == other[key]).all() for key in one)


EVAL = {
    "task": "exact-match",
    "data": "problems.jsonl",
    "limit": 7,
    "limit_seed": 3,
    "num_samples": 4,
    "max_new_tokens": 9,
    "batch_size": 5,
    "temperature": 0.8,
    "top_p": 0.9,
    "seed": 11,
    "system_prompt": "Be brief.",
    "few_shot": 2,
    "few_shot_data": "shots.jsonl",
}


def test_an_evaluation_is_the_bases_eval_but_for_what_it_changes(tmp_path):
    base = {"student": "s", "teacher": "t", "data": {"path": "d"}, "eval": {**EVAL, "every": 5}}
    entries = [{"name": "same"}, {"name": "greedy", "temperature": 0.0, "num_samples": 1, "seed": None}]
    same, greedy = evaluations(read_experiment(write(base=base, evals=entries)), tmp_path)
    assert {key: getattr(same, key) for key in EVAL} == EVAL
    assert same.every is None
    assert greedy == dataclasses.replace(same, name="greedy", temperature=0.0, num_samples=1)
    # Where `set` takes eval from the runs, and where it changes it.
    gone = read_experiment(write(base=base, evals=entries, set={"eval": None}))
    assert evaluations(gone, tmp_path) == (same, greedy)
    shorter = read_experiment(write(base=base, evals=entries, set={"eval.limit": 2}))
    assert [evaluation.limit for evaluation in evaluations(shorter, tmp_path)] == [2, 2]


def test_an_evaluation_takes_the_bases_eval_of_its_task(tmp_path):
    base = {"student": "s", "teacher": "t", "data": {"path": "d"}}
    base["eval"] = [EVAL, {"task": "gsm8k", "data": "g.jsonl", "few_shot": 4}]
    entries = [{"name": "sums", "task": "gsm8k", "limit": 3}, {"name": "other", "task": "my_module:Task"}]
    sums, other = evaluations(read_experiment(write(base=base, evals=entries)), tmp_path)
    assert (sums.data, sums.few_shot, sums.limit, sums.temperature) == ("g.jsonl", 4, 3, None)
    assert (other.data, other.limit, other.max_new_tokens, other.few_shot) == ("problems.jsonl", 7, 9, 0)
    # A recipe by its path is the same base.
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    from_path = read_experiment(write(base=str(tmp_path / "base.yaml"), evals=entries))
    assert evaluations(from_path, tmp_path) == (sums, other)
    with pytest.raises(ValueError, match=r"'eval\.limit': eval is a list in the recipe"):
        expand(read_experiment(write(base=base, set={"eval.limit": 2})), tmp_path)


def test_set_reaches_the_eval_of_a_recipe_by_its_path(tmp_path):
    tree = {"student": "s", "teacher": "t", "data": {"path": "d"}, "eval": EVAL}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    cells = expand(read_experiment(write(base=str(tmp_path / "base.yaml"), set={"eval.limit": 2})), tmp_path)
    assert [(entry.data, entry.limit) for entry in cells[0].recipe.eval] == [("problems.jsonl", 2)]


@pytest.mark.parametrize(
    ("evals", "message"),
    [
        ([{"name": "a", "limt": 3}], "unknown key 'evals.limt'; Did you mean 'limit'"),
        ([{"limit": 3}], "'evals.name' is missing"),
        ([{"name": "a", "limit": "many"}], "'evals.limit'"),
        ([{"name": "a", "every": 3}], "every has no effect here"),
        ([{"name": "a"}, {"name": "a"}], "two are called the same"),
    ],
)
def test_mistakes_in_evals(evals, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read_experiment(write(evals=evals))


def test_the_grid_of_a_base_with_eval_runs(tmp_path):
    path = tiny_experiment(
        tmp_path, tune=None, evals=[], own_samples=0, axes={"method": ["hpd"], "seed": [0]}, baseline=None
    )
    tree = yaml.safe_load(path.read_text())
    problems = str(tmp_path / "problems.jsonl")
    tree["base"]["eval"] = {
        "data": problems,
        "limit": 4,
        "max_new_tokens": 5,
        "num_samples": 2,
        "temperature": 1.0,
    }
    tree |= {"evals": [{"name": "again"}, {"name": "greedy", "temperature": 0.0, "num_samples": 1}]}
    tree |= {"own_samples": 3, "metrics": ["again"], "budget": {"type": "steps", "value": 2}}
    path.write_text(yaml.safe_dump(tree))
    done = command("compare", path)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "grid" / "manifest.json").read_text())
    assert f"eval.0.data: {problems}" in manifest["fingerprints"]
    run = tmp_path / "grid" / "runs" / "hpd__seed-0"
    figures = json.loads((run / "experiment.json").read_text())["figures"]
    assert {"again", "greedy", "own_entropy"} <= set(figures)
    asked = {entry["model"]: entry for entry in json.loads((run / "evals.json").read_text())}
    again, greedy = asked["student after: again"], asked["student after: greedy"]
    assert again["settings"] == asked["student after"]["settings"]
    assert (again["settings"]["num_samples"], again["settings"]["temperature"]) == (2, 1.0)
    assert (greedy["settings"]["num_samples"], greedy["settings"]["temperature"]) == (1, 0.0)
    assert again["num_examples"] == greedy["num_examples"] == 4


@pytest.mark.slow
def test_the_experiment_of_the_documentation_runs_as_it_is_typed(tmp_path):
    """docs/guides/compare.md's own file (`base: demo`), cut to one run of two steps by overrides."""
    page = (ROOT / "docs/guides/compare.md").read_text()
    path = tmp_path / "experiment.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    assert len(all_tuning(load_experiment(path), tmp_path)) == 3 * 4 * 2
    fewer = ["tune=null", "axes.method=[hpd]", "axes.seed=[0]", "baseline=null", "own_samples=3"]
    fewer += ["budget.value=2", "set.eval.limit=3", "set.data.limit=128", f"output_dir={tmp_path / 'grid'}"]
    done = command("compare", path, *fewer)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "grid" / "runs" / "hpd__seed-0" / "experiment.json").read_text())
    assert {"accuracy", "sampled_accuracy", "own_entropy"} <= set(record["figures"])
    assert json.loads((tmp_path / "grid" / "teacher" / "figures.json").read_text())["accuracy"] > 0


def test_the_figures_of_several_teachers_are_their_means(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from hpd.experiments.worker import Job
    from hpd.files import write_json

    def job(teacher):
        recipe: Any = SimpleNamespace(teacher=SimpleNamespace(type="model", model=teacher))
        asked: Any = ("accuracy",)
        return Job(recipe, {}, evals=asked)

    def evaluate(job, target, log, waiting):
        waiting()
        target.mkdir(parents=True)
        write_json(target / "figures.json", {"accuracy": {"one": 0.5, "two": 1.0}[job.recipe.teacher.model]})

    shown = []

    class Bars(Progress):
        def bar(self, name):
            return lambda done, total, note="": shown.append((name, done, total))

    module = __import__("sys").modules["hpd.experiments.compare"]
    monkeypatch.setattr(module, "_evaluate_teacher", evaluate)
    for name in ("e", "alone"):
        (tmp_path / name).mkdir()
    module._evaluate_teachers([job("one"), job("two"), job("one")], tmp_path / "e", Bars())
    assert json.loads((tmp_path / "e" / "teacher" / "figures.json").read_text()) == {"accuracy": 0.75}
    assert shown == [("teachers evaluated", done, 2) for done in range(3)]
    assert sorted(path.name for path in (tmp_path / "e" / "teacher").iterdir()) == ["0", "1", "figures.json"]
    module._evaluate_teachers([job("one")], tmp_path / "alone", Bars())
    assert json.loads((tmp_path / "alone" / "teacher" / "figures.json").read_text()) == {"accuracy": 0.5}


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("", 8), ("0", 8), ("all", 8)])
def test_threads_are_those_that_the_environment_gives(monkeypatch, given, threads):
    module = __import__("sys").modules["hpd.experiments.compare"]
    monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert module._threads() == threads
