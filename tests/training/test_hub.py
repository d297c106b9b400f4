"""A finished student on the Hub: its files and card and nothing else; what is wrong is said before training,
and a push that fails loses nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers.hub_server import HubServer
from helpers.trainers import make_trainer, rows
from huggingface_hub import constants, hf_api
from peft import PeftConfig
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub as transformers_hub
from typer.testing import CliRunner

from hpd.cli import app
from hpd.config import load_recipe
from hpd.training.plan import plan

OURS = {
    "recipe.yaml",
    "metrics.jsonl",
    "summary.json",
    "environment.json",
    "inputs.json",
    "training_args.bin",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = HubServer(tmp_path / "hub")
    with server.running() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hf_api.api, "endpoint", address)  # what transformers imported
        # transformers keeps an API of its own from its first use, with the address of that moment
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def recipe(pair, tmp_path, **train):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    return {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": str(tmp_path / "rows.jsonl"), "validation": 0.25},
        "method": "forward_kl",
        "output_dir": str(tmp_path / "run"),
        "train": {
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            **train,
        },
    }


def train(tmp_path, tree, *words):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), *words])
    return done.exit_code, " ".join(done.output.split())


def pushed(hub, repo="me/mine"):
    folder = hub.folder / repo
    return folder, {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_pushed_when_it_is_finished_with_its_card(hub, pair, tmp_path):
    code, said = train(
        tmp_path, recipe(pair, tmp_path, push_to_hub=True, hub_model_id="me/mine", hub_private_repo=True)
    )
    assert code == 0, said
    assert "pushed to http://127.0.0.1" in said
    folder, names = pushed(hub)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not names & OURS
    assert hub.private == {"me/mine": True}
    run = tmp_path / "run"
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    card = (folder / "README.md").read_text()
    assert 'name = "me/mine"' in card
    assert "`forward_kl`" in card
    assert "forward_kl after" in card
    for name in names - {"model.safetensors"}:
        assert str(tmp_path) not in (folder / name).read_text(), name
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    # One commit, of the finished model.
    assert sum("/commit/" in request for request in hub.requests) == 1


@pytest.mark.parametrize(
    ("train_with", "said"),
    [
        ({"hub_model_id": "me/mine"}, "train.hub_model_id has an effect with train.push_to_hub: true only"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "train.hub_strategy has no effect"),
        ({"push_to_hub": True, "hub_always_push": True}, "train.hub_always_push has no effect"),
        ({"push_to_hub": True, "hub_model_id": "me/mine/deep"}, "is not a name for a model on the Hub"),
        ({"push_to_hub": True, "hub_model_id": "them/mine"}, "403: You don't have the rights to create"),
        ({"push_to_hub": True, "hub_model_id": "them/theirs"}, "403: You don't have the rights to write"),
    ],
    ids=["idle", "strategy", "always", "name", "create", "write"],
)
def test_what_cannot_be_pushed_is_refused_before_training(hub, pair, tmp_path, train_with, said):
    hub.foreign.add("them/theirs")
    code, text = train(tmp_path, recipe(pair, tmp_path, **train_with))
    assert (code, said in text) == (2, True), text
    assert not (tmp_path / "run").exists()


def test_a_token_that_is_missing_wrong_or_not_asked(hub, pair, tmp_path, monkeypatch):
    tree = recipe(pair, tmp_path, push_to_hub=True, hub_model_id="me/mine")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    code, said = train(tmp_path, tree)
    assert (code, "401: Invalid username or password" in said, "bbbb" in said) == (2, True, False), said
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for words in ((), ("--dry-run",)):
        code, said = train(tmp_path, tree, *words)
        assert (code, "there is no token for the Hub: put a token" in said) == (2, True), said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in train(tmp_path, tree)[1]
    assert not (tmp_path / "run").exists()


def test_a_hub_that_is_away_before_training(hub, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, said = train(tmp_path, recipe(pair, tmp_path, push_to_hub=True))
    assert (code, "cannot be written on the Hub" in said) == (2, True), said


def test_a_push_that_fails_leaves_a_finished_run_and_says_how_it_is_pushed(hub, pair, tmp_path):
    hub.refuses["/upload/"] = (403, {"error": "Quota exceeded"})
    code, said = train(tmp_path, recipe(pair, tmp_path, push_to_hub=True, hub_model_id="me/mine"))
    run = tmp_path / "run"
    assert code == 2, said
    assert "forward_kl: 1 steps" in said, "the run's figures"
    assert "The run is finished" in said
    assert f"hpd export {run} --push-to-hub me/mine" in said
    AutoModelForCausalLM.from_pretrained(run)
    assert not (hub.folder / "me/mine").exists()
    hub.refuses.clear()
    done = CliRunner().invoke(app, ["export", str(run), "--push-to-hub", "me/mine"])
    assert done.exit_code == 0, done.output
    assert {"model.safetensors", "README.md"} <= pushed(hub)[1]


def test_an_adapter_of_a_local_base_is_refused_and_goes_merged(hub, pair, tmp_path):
    tree = recipe(pair, tmp_path, push_to_hub=True, hub_model_id="me/mine")
    code, said = train(tmp_path, {**tree, "lora": {"r": 2}})
    assert (code, "base" in said, "--merge --output DIR --push-to-hub me/mine" in said) == (2, True, True)
    code, said = train(tmp_path, {**recipe(pair, tmp_path), "lora": {"r": 2}})
    assert code == 0, said
    run, merged = tmp_path / "run", tmp_path / "merged"
    done = CliRunner().invoke(app, ["export", str(run), "--push-to-hub", "me/mine"])
    assert (done.exit_code, "push a merged model" in " ".join(done.output.split())) == (2, True), done.output
    words = ["export", str(run), "--merge", "--output", str(merged), "--push-to-hub", "me/mine", "--private"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    folder, names = pushed(hub)
    assert "adapter_config.json" not in names
    assert "library_name: transformers" in (folder / "README.md").read_text()
    assert 'name = "merged"' in (merged / "README.md").read_text()
    assert hub.private["me/mine"]
    AutoModelForCausalLM.from_pretrained(folder)
    hub.private["me/public"] = False
    done = CliRunner().invoke(
        app, [*words[:3], "--output", str(tmp_path / "m"), *words[5:6], "me/public", "--private"]
    )
    assert (done.exit_code, "is public" in " ".join(done.output.split())) == (2, True), done.output
    # An adapter whose base the Hub has goes there as it is.
    config = PeftConfig.from_pretrained(str(run))
    config.base_model_name_or_path = "org/base"
    config.save_pretrained(str(run))
    done = CliRunner().invoke(app, ["export", str(run), "--push-to-hub", "me/adapter"])
    assert done.exit_code == 0, done.output
    assert {"adapter_model.safetensors", "adapter_config.json"} <= pushed(hub, "me/adapter")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one of them"),
        (["--merge"], "--merge and --output go together"),
        (["--push-to-hub", "me/x", "--dtype", "float16"], "--dtype has an effect with --merge only"),
        (["--merge", "--output", "m", "--private"], "--private has an effect with --push-to-hub only"),
        (["--push-to-hub", "me/x"], "is not the folder of a finished run"),
    ],
    ids=["nothing", "output", "dtype", "private", "no-run"],
)
def test_export_refuses_options_without_effect(hub, pair, words, said):
    done = CliRunner().invoke(app, ["export", str(pair[0]), *words])
    assert (done.exit_code, said in " ".join(done.output.split())) == (2, True), done.output
    assert not hub.requests


def test_of_stages_the_last_ones_student_is_pushed(hub, pair, tmp_path):
    tree = recipe(pair, tmp_path, push_to_hub=True, hub_model_id="me/mine")
    stages = [{"name": "first"}, {"name": "second", "method": "reverse_kl"}]
    code, said = train(tmp_path, {**tree, "stages": stages})
    assert code == 0, said
    folder, _ = pushed(hub)
    last = tmp_path / "run" / "second" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == last.read_bytes()
    assert "`reverse_kl`" in (folder / "README.md").read_text()
    assert sum("/commit/" in request for request in hub.requests) == 1
    stages[1]["train"] = {"push_to_hub": True}
    with pytest.raises(ValueError, match="belongs in the recipe's own train"):
        load_recipe({**tree, "stages": stages})


def test_a_trainer_of_python_pushes_its_card_too(hub, pair, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "me/mine", "train": rows(8)}
    trainer = make_trainer(pair, tmp_path / "out", method="reverse_kl", **options)
    trainer.train()
    trainer.push_to_hub()
    folder, names = pushed(hub)
    assert {"model.safetensors", "README.md"} <= names
    assert "`reverse_kl`" in (folder / "README.md").read_text()
    assert 'name = "me/mine"' in (folder / "README.md").read_text()
    hub.foreign.add("them/theirs")
    with pytest.raises(ValueError, match="push_to_hub: them/theirs cannot be written"):
        make_trainer(pair, tmp_path / "out", **{**options, "hub_model_id": "them/theirs"})


def test_the_plan_says_where_the_student_goes_and_the_trainer_does_not_push(hub, pair, tmp_path):
    planned = plan(load_recipe(recipe(pair, tmp_path, push_to_hub=True)))
    planned.close()
    assert any(v.topic == "hub" and "as run" in v.text for v in planned.verdicts)
    assert planned.args.push_to_hub is False
    assert not hub.requests


@pytest.mark.slow
def test_the_command_itself(pair, tmp_path):
    tree = recipe(pair, tmp_path, push_to_hub=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    server = HubServer(tmp_path / "hub")
    with server.running() as address:
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {"HF_ENDPOINT": address, "HF_TOKEN": server.token, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "hpd", "train", str(tmp_path / "recipe.yaml")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"pushed to {address}/me/run" in " ".join(done.stdout.split())
    assert (tmp_path / "hub/me/run/README.md").is_file()
    shutil.rmtree(tmp_path / "run")
