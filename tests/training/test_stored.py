"""Offline on-policy: rollouts written by `hpd generate`, scored by `hpd cache`, trained on with ratios."""

import json
import math

import pytest
from tiny_models import tiny_pair

from hpd import train
from hpd.config import load_recipe
from hpd.generate import generate
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.regime import choose_regime
from hpd.methods.table import choose_terms, name_terms
from hpd.training.caching import write_cache
from hpd.training.plan import plan

STORED = Prefixes(student=1.0, stored=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pair, prompts, and what the student wrote for them."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_pair("llama", folder)
    prompts = [{"prompt": f"say {word}:"} for word in ("one", "two", "three", "four")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    settings = {"max_new_tokens": 6, "logprobs": True, "truncated": "keep", "model": str(folder / "student")}
    tree = recipe_of(folder, folder / "prompts.jsonl") | {
        "generate": {**settings, "output": str(folder / "written.jsonl")}
    }
    generate(load_recipe({key: tree[key] for key in ("student", "teacher", "data", "generate")}))
    return folder


def recipe_of(folder, data, **changes):
    train = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": 64,
        "use_cpu": True,
        "save_strategy": "no",
        "metric_stride": 1,
        "logging_steps": 1,
    }
    return {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(data)},
        "method": "opd",
        "prefixes": {"student": 1, "stored": True},
        "train": train,
        "output_dir": str(folder / "run"),
        **changes,
    }


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def first_log(run):
    return next(log for log in lines(run / "metrics.jsonl") if "loss" in log)


def test_rows_are_what_was_drawn(place):
    rows = lines(place / "written.jsonl")
    assert len(rows) == 4
    for row in rows:
        learned = [label != -100 for label in row["labels"]]
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["behavior_logprobs"])
        assert sum(learned) == row["num_tokens"] <= 6
        for bit, token, label, value in zip(
            learned, row["input_ids"], row["labels"], row["behavior_logprobs"], strict=True
        ):
            assert (label == token and value <= 0) if bit else value is None


def test_the_writer_itself_has_ratio_one_and_another_one_does_not(place, tmp_path):
    train(load_recipe(recipe_of(place, place / "written.jsonl", output_dir=str(tmp_path / "same"))))
    same = first_log(tmp_path / "same")
    assert same["policy/clipped"] == 0.0
    assert same["policy/kl_old"] == pytest.approx(0.0, abs=1e-5)
    moved = [
        {**row, "behavior_logprobs": [v and min(v + 1.0, 0.0) for v in row["behavior_logprobs"]]}
        for row in lines(place / "written.jsonl")
    ]
    (tmp_path / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))
    train(load_recipe(recipe_of(place, tmp_path / "moved.jsonl", output_dir=str(tmp_path / "moved"))))
    assert first_log(tmp_path / "moved")["policy/clipped"] > 0.0  # tokens to be punished, at ratios of 1 / e
    assert first_log(tmp_path / "moved")["policy/kl_old"] > 0.1


def test_a_cache_of_the_stored_rows_trains_alike(place, tmp_path):
    whole = recipe_of(place, place / "written.jsonl", output_dir=str(tmp_path / "live"))
    train(load_recipe(whole))
    cache = str(tmp_path / "cache")
    write_cache(load_recipe({**whole, "cache": {"path": cache}}))
    cached = {"type": "cached", "path": cache}
    train(load_recipe({**whole, "teacher": cached, "output_dir": str(tmp_path / "cached")}))
    live, stored = (first_log(tmp_path / name) for name in ("live", "cached"))
    assert stored["loss"] == pytest.approx(live["loss"], rel=1e-5)
    assert stored["grad_norm"] == pytest.approx(live["grad_norm"], rel=1e-5)
    assert math.isfinite(live["loss"])


def test_a_stream_of_stored_rows_trains_alike(place, tmp_path):
    found = []
    for name in ("rows", "stream"):
        data = {"path": str(place / "written.jsonl"), "streaming": name == "stream"}
        tree = recipe_of(place, "", output_dir=str(tmp_path / name)) | {"data": data}
        train(load_recipe(tree))
        found.append(first_log(tmp_path / name))
    for metric in ("loss", "grad_norm", "policy/kl_old"):
        assert found[1][metric] == pytest.approx(found[0][metric], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "hpd"}, "it needs strategy: policy_gradient"),
        ({"method": "minillm"}, "a mixture with the teacher"),
        ({"rollouts": {"max_new_tokens": 4}}, "rollouts has no effect"),
        ({"prefixes": {"dataset": 1}, "method": "hpd"}, "column behavior_logprobs, which changes what is"),
        ({"prefixes": {"student": 0.5, "stored": True}}, "takes every row as one that the student wrote"),
        ({"data": {"path": "{place}/prompts.jsonl"}}, "needs the column behavior_logprobs"),
    ],
)
def test_what_has_no_ratio_refuses_the_column(place, changes, said):
    def at_home(value):
        return json.loads(json.dumps(value).replace("{place}", str(place)))

    tree = recipe_of(place, place / "written.jsonl") | at_home(changes)
    with pytest.raises(ValueError, match=said):
        train(load_recipe(tree))


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"truncated": "drop"}, {"filter": "correct"}],
)
def test_draws_that_are_cut_reshaped_or_chosen_give_no_ratio(place, changes):
    settings = {"logprobs": True, "truncated": "keep", **changes}
    with pytest.raises(ValueError, match="generate.logprobs is for likelihood ratios"):
        load_recipe(recipe_of(place, place / "prompts.jsonl", generate=settings))


def test_the_doctor_says_where_rows_and_teacher_are_of_two_models(place, tmp_path):
    settings = {"max_new_tokens": 6, "truncated": "keep", "output": str(tmp_path / "texts.jsonl")}
    tree = recipe_of(place, place / "prompts.jsonl", generate={**settings, "model": str(place / "student")})
    del tree["prefixes"], tree["method"]
    generate(load_recipe(tree))
    found = {}
    for teacher in ("teacher", "student"):
        changed = {**tree, "data": settings["output"], "teacher": str(place / teacher), "generate": None}
        verdicts = plan(load_recipe(changed)).verdicts
        found[teacher] = [verdict.text for verdict in verdicts if verdict.topic == "writer"]
    assert "rows were written by" in found["teacher"][0]
    assert found["student"] == []


def test_nothing_is_generated_in_training():
    regime = choose_regime("opd", name_terms(choose_terms("opd", {}, ())), STORED)
    assert not regime.prefixes.on_policy
    assert not regime.needs_prompts_only
    assert regime.rollouts == RolloutConfig()
