"""Runs in stages: each in its folder, each resumed by itself, each starting from what the one before left."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, TrainerCallback

from hpd.config import load_recipe
from hpd.config.load import stage_recipes
from hpd.methods.prefixes import RolloutConfig
from hpd.progress import Progress
from hpd.training.run import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    student, teacher = tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"say {i}:", "chosen": f" {i}", "rejected": " no"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    }


FOLLOWS_LABELS = [{"objective": "nll"}, {"objective": "forward_kl", "weight": 0.5}]
OPD = {"name": "opd", "method": "opd", "rollouts": {"max_new_tokens": 6}}


def weights(folder):
    return torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()])


def logs(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_hpd_then_opd_hands_its_checkpoint_on(base, tmp_path):
    run = tmp_path / "run"
    summary = train(
        load_recipe(
            {**base, "stages": [{"name": "hpd", "train": {"max_steps": 3}}, OPD], "output_dir": str(run)}
        )
    )
    assert list(summary["stages"]) == ["hpd", "opd"]
    assert [s["steps"] for s in summary["stages"].values()] == [3, 4]
    assert yaml.safe_load((run / "opd" / "recipe.yaml").read_text())["student"]["model"] == str(run / "hpd")
    assert not torch.equal(weights(run / "hpd"), weights(run / "opd"))
    assert summary["stages"]["opd"]["generated tokens"] > 0
    assert "generated tokens" not in summary["stages"]["hpd"]
    assert any("rollouts/length" in log for log in logs(run / "opd"))
    with pytest.raises(ValueError, match="finished"):
        train(
            load_recipe(
                {**base, "stages": [{"name": "hpd", "train": {"max_steps": 3}}, OPD], "output_dir": str(run)}
            )
        )


class _Killed(Exception):
    pass


class _KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.output_dir.endswith("opd"):
            raise _Killed


class _Kill(Progress):
    def callbacks(self):
        return (_KillAt(3),)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_stage_goes_on_there(base, tmp_path):
    tree = {**base, "stages": [{"name": "hpd"}, OPD]}
    straight = train(load_recipe({**tree, "output_dir": str(tmp_path / "a")}))
    killed = load_recipe({**tree, "output_dir": str(tmp_path / "b")})
    with pytest.raises(_Killed):
        train(killed, progress=_Kill())
    said = []

    class Listen(Progress):
        def say(self, text):
            said.append(text)

    before = (tmp_path / "b" / "hpd" / "model.safetensors").stat().st_mtime_ns
    resumed = train(killed, progress=Listen())
    assert "stage hpd: finished already" in said
    assert (tmp_path / "b" / "hpd" / "model.safetensors").stat().st_mtime_ns == before
    assert torch.equal(weights(tmp_path / "a" / "opd"), weights(tmp_path / "b" / "opd"))
    assert [log["step"] for log in logs(tmp_path / "b" / "opd") if "loss" in log] == [1, 2, 3, 4]
    assert resumed["steps"] == straight["steps"]


@pytest.mark.parametrize("pairs", ["rollouts", "data"])
def test_hpd_then_dpo_from_one_recipe(base, tmp_path, pairs):
    stage = {
        "name": "dpo",
        "dpo": {"pairs": pairs, "args": {"beta": 0.2}},
        "train": {"learning_rate": 1e-4, "max_steps": 2},
    }
    if pairs == "data":
        stage["data"] = {"path": base["data"]["path"].replace("rows", "pairs")}
    summary = train(
        load_recipe({**base, "stages": [{"name": "hpd"}, stage], "output_dir": str(tmp_path / "run")})
    )
    assert summary["stages"]["dpo"]["steps"] == 2
    assert any("rewards/margins" in log for log in logs(tmp_path / "run" / "dpo"))
    assert not torch.equal(weights(tmp_path / "run" / "hpd"), weights(tmp_path / "run" / "dpo"))


def test_a_rollout_that_was_cut_makes_no_pair(base, tmp_path, caplog):
    """One token of a student that has learned nothing is the end of few answers."""
    stage = {"name": "dpo", "dpo": {"pairs": "rollouts"}, "rollouts": {"max_new_tokens": 1}}
    recipe = load_recipe({**base, "stages": [{"name": "hpd"}, stage], "output_dir": str(tmp_path / "run")})
    train(recipe)
    (cut,) = re.findall(r"dpo: (\d+) of 16 rollouts were cut at rollouts.max_new_tokens", caplog.text)
    assert 8 < int(cut) < 16


def test_a_preference_stage_takes_what_it_reads_of_the_rollouts_around_it(base):
    """From on-policy stages: how the student writes, not what is done with its rows."""
    around = {"max_new_tokens": 6, "temperature": 0.5, "num_rollouts": 2, "truncated": "mask"}
    stages = [{"name": "a"}, {"name": "b", "dpo": {}, "rollouts": {"max_new_tokens": 9}}]
    recipe = load_recipe({**base, "method": "opd", "rollouts": around, "stages": stages})
    first, second = stage_recipes(recipe)
    assert first.recipe.rollouts.num_rollouts == 2
    assert second.rollouts == RolloutConfig(max_new_tokens=9, temperature=0.5)


def test_a_round_that_follows_labels_keeps_to_its_last_student(base, tmp_path):
    rounds = {"name": "round", "teacher": "previous", "terms": FOLLOWS_LABELS, "train": {"max_steps": 1}}
    run = tmp_path / "run"
    tree = {**base, "train": {**base["train"], "max_steps": 1}, "output_dir": str(run)}
    train(load_recipe({**tree, "stages": [{"name": "first"}, rounds]}))
    (step,) = [log for log in logs(run / "round") if "forward_kl" in log and log["step"] == 1]
    assert step["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert not torch.equal(weights(run / "first"), weights(run / "round"))


def test_self_distillation_in_rounds_makes_the_student_the_next_teacher(base, tmp_path):
    rounds = {"name": "round", "repeat": 2, "teacher": "previous", "terms": FOLLOWS_LABELS}
    run = tmp_path / "run"
    stages = stage_recipes(
        load_recipe({**base, "stages": [{"name": "first"}, rounds], "output_dir": str(run)})
    )
    assert [stage.name for stage in stages] == ["first", "round-1", "round-2"]
    assert [stage.recipe.teacher.model for stage in stages] == [
        base["teacher"],
        str(run / "first"),
        str(run / "round-1"),
    ]
    assert [stage.recipe.student.model for stage in stages] == [
        base["student"],
        str(run / "first"),
        str(run / "round-1"),
    ]


def test_an_adapter_is_merged_for_the_next_stage(base, tmp_path):
    run = tmp_path / "run"
    train(
        load_recipe(
            {
                **base,
                "lora": {"r": 2},
                "stages": [{"name": "hpd"}, {"name": "sft", "method": "sft"}],
                "output_dir": str(run),
            }
        )
    )
    assert (run / "hpd" / "merged" / "config.json").is_file()
    assert not torch.equal(weights(run / "hpd" / "merged"), weights(base["student"]))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "a"}, {"name": "a"}], "named twice"),
        ([{"name": "a", "method": "hdp"}], "stages: a: Unknown method 'hdp'"),
        ([{"name": "a", "teacher": "previous"}], "no stage before the first"),
        ([{"name": "a", "repeat": 0}], "repeat must be >= 1"),
        ([{"name": "a", "trian": {}}], "did you mean 'train'"),
        ([{"name": "a", "rollouts": {"max_new_tokens": 4}}], "stages: a: rollouts has no effect"),
        *(
            (
                [{"name": "a"}, {"name": "b", "teacher": "previous", **change}],
                "stages: b: teacher: previous teach",
            )
            for change in (
                {},
                {"method": "forward_kl"},
                {"method": "opd"},
                {"method": "minillm"},
                {"method": "taid"},
                {"terms": [{"objective": "reverse_kl"}, {"objective": "nll", "weight": 0}]},
            )
        ),
        ([{"name": "a"}, {"name": "b", "teacher": "previous", "dpo": {}}], "stages: b: .*not read teacher"),
        ([{"name": "a"}, {"name": "b", "method": "opd", "dpo": {}}], "stages: b: .*not read method"),
        (
            [{"name": "a"}, {"name": "b", "dpo": {}, "rollouts": {"num_rollouts": 2}}],
            "stages: b: .*not read rollouts.num_rollouts",
        ),
        (
            [{"name": "a"}, {"name": "b", "dpo": {}, "rollouts": {"max_new_tokens": 0}}],
            "stages: b: rollouts.max_new_tokens must be >= 1",
        ),
        (
            [{"name": "a"}, {"name": "b", "dpo": {"pairs": "data"}, "rollouts": {"max_new_tokens": 4}}],
            "stages: b: .*pairs: data.*not read rollouts",
        ),
    ],
)
def test_stages_that_make_no_sense(base, stages, message):
    with pytest.raises(ValueError, match=message):
        load_recipe({**base, "stages": stages})


MISTAKES = {
    "first stage, no such data": (
        [{"name": "a", "data": {"path": "none.jsonl"}}, {"name": "b"}],
        "stages: a: No dataset at none.jsonl",
    ),
    "second stage, no such data": (
        [{"name": "a"}, {"name": "b", "data": {"path": "none.jsonl"}}],
        "stages: b: No dataset at none.jsonl",
    ),
    "second stage, wrong columns": (
        [{"name": "a"}, {"name": "b", "data": {"columns": {"prompt": "question"}}}],
        "stages: b: data.columns maps prompt",
    ),
    "no label left": (
        [{"name": "a"}, {"name": "b", "train": {"max_length": 2}}],
        "stages: b: Every label is masked",
    ),
    "next teacher, wrong data": (
        [
            {"name": "a"},
            {"name": "b", "teacher": "previous", "method": "sft", "data": {"path": "none.jsonl"}},
        ],
        "stages: b: No dataset",
    ),
    "no completions to prefer": (
        [{"name": "a", "method": "opd"}, {"name": "b", "dpo": {}, "data": {"columns": {"text": "prompt"}}}],
        "stages: b: dpo.pairs: rollouts needs rows with prompt and completion",
    ),
    "no pairs": (
        [{"name": "a"}, {"name": "b", "dpo": {"pairs": "data"}}],
        "stages: b: Preference pairs need",
    ),
    "unknown argument": (
        [{"name": "a"}, {"name": "b", "dpo": {"pairs": "rollouts", "args": {"no_such": 1}}}],
        "stages: b: dpo.args.*not a field",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_mistake_in_any_stage_is_found_before_anything_is_written(base, tmp_path, name, lora):
    stages, message = MISTAKES[name]
    run = tmp_path / "run"
    tree = {**base, "lora": lora, "stages": stages, "output_dir": str(run)}
    with pytest.raises(ValueError, match=message):
        train(load_recipe(tree))
    assert not run.exists()


def test_a_mistake_leaves_the_run_that_overwrite_would_delete(base, tmp_path):
    run = tmp_path / "run"
    good = {
        **base,
        "train": {**base["train"], "max_steps": 1},
        "stages": [{"name": "a"}],
        "output_dir": str(run),
    }
    train(load_recipe(good))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    bad = {**good, "stages": [{"name": "a", "data": {"path": "none.jsonl"}}]}
    with pytest.raises(ValueError, match="stages: a: No dataset"):
        train(load_recipe(bad), overwrite=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "regimes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_regimes_parse_and_are_short(path):
    recipe = load_recipe(path)
    assert len(path.read_text().splitlines()) <= 30
    steps = [stage.recipe.train["max_steps"] for stage in stage_recipes(recipe)] or [
        recipe.train["max_steps"]
    ]
    assert sum(steps) == 300
    assert path.read_text().startswith("# ")
