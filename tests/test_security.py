"""Code, pickles and secrets: what a stranger's model, recipe or run folder must not be able to do."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_pair
from typer.testing import CliRunner

import hpd
from hpd.cli import app
from hpd.config import ModelConfig, TeacherConfig, load_recipe, resolve
from hpd.config.secrets import redact
from hpd.models import load_config, load_model, load_tokenizer
from hpd.training.run import train

SECRETS = {
    "HF_TOKEN": "hf_" + "canaryA" * 5,
    "OPENAI_API_KEY": "sk-" + "canaryB" * 5,
    "WANDB_API_KEY": "canaryc0" * 5,
    "TEACHER_API_KEY": "canary-of-the-teacher",
    "HPD_SERVE_TOKEN": "canary-of-the-server",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("security")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_of(pair: Path, output: Path, **changes) -> dict:
    return {
        "student": str(pair / "student"),
        "teacher": str(pair / "teacher"),
        "data": {"path": str(pair / "rows.jsonl")},
        "train": {
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "max_length": 64,
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
        "output_dir": str(output),
        **changes,
    }


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_code_in_a_model_folder_does_not_run(pair, tmp_path):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(pair / "student", folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    for source in (ModelConfig(model=str(folder)), TeacherConfig(model=str(folder))):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_model(source, "student")
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_tokenizer(source, "student")
    assert not canary.exists()
    with pytest.raises(ValueError, match="cannot be loaded"):  # the code runs, and then has no such class
        load_config(ModelConfig(model=str(folder), trust_remote_code=True), "student")
    assert canary.exists(), "the canary must be able to fail"


@pytest.mark.parametrize("how", ["file", "named by the config"])
def test_pickled_weights_are_refused_and_do_not_run(pair, tmp_path, how):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(pair / "student", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    if how != "file":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "transformers_weights": "pytorch_model.bin"})
        )
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle"):
        load_model(ModelConfig(model=str(folder)), "student")
    # Even when asked for: torch reads tensors and nothing else.
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(ModelConfig(model=str(folder), allow_pickle=True), "student")
    assert not canary.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert canary.exists(), "the canary must be able to fail"


def test_pickles_are_taken_where_they_are_asked_for(pair, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pair / "student", folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = load_model(ModelConfig(model=str(folder), allow_pickle=True), "student")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_changed_checkpoints_do_not_run_code_on_resume(pair, tmp_path, name):
    recipe = load_recipe(recipe_of(pair, tmp_path / "run"))
    train(recipe)
    run, canary = tmp_path / "run", tmp_path / "canary"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint-2")
    torch.save(Payload(canary), run / "checkpoint-1" / name)
    mark = json.loads((run / "checkpoint-1" / "complete.json").read_text())
    mark["bytes"][name] = (
        (run / "checkpoint-1" / name).stat().st_size
    )  # as an attacker would: the mark is no signature
    (run / "checkpoint-1" / "complete.json").write_text(json.dumps(mark))
    with pytest.raises((ValueError, pickle.UnpicklingError, RuntimeError)):
        train(recipe)
    assert not canary.exists()


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir [{canary}]", "!!python/name:os.system ''", "!!python/module:os ''"],
)
@pytest.mark.parametrize("where", ["recipe", "override", "experiment"])
def test_yaml_builds_plain_data_only(tag, where, tmp_path):
    tag = tag.format(canary=tmp_path / "canary")
    file = tmp_path / "file.yaml"
    file.write_text(
        f"student: a\nteacher: b\ndata: {{path: c}}\nmethod: {tag if where != 'override' else 'hpd'}\n"
    )
    command = [
        "compare" if where == "experiment" else "train",
        str(file),
        *([f"method={tag}"] if where == "override" else []),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert not (tmp_path / "canary").exists()


def test_no_shell_and_no_unsafe_loader():
    root = Path(hpd.__file__).parent
    forbidden = {
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "pickle.load",
        "pickle.loads",
        "yaml.unsafe_load",
        "yaml.full_load",
        "joblib.load",
    }
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            place = f"{file.relative_to(root)}:{node.lineno}"
            assert name not in forbidden, place
            assert keywords.get("shell", "False") == "False", place
            assert name != "torch.load" or keywords.get("weights_only") == "True", place
            assert name != "yaml.load" or ast.unparse(node.args[1]) == "_Loader", place
            assert name != "eval", place
            assert keywords.get("trust_remote_code", "") != "True", place


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"hub_token": "abc"}},
        {"train": {"push_to_hub_token": "hf_" + "x" * 30}},
        {"teacher": {"type": "server", "model": "a", "url": "http://user:canary@host:1"}},
        {"data": {"path": "https://user:canary@host/rows.jsonl"}},
        {"student": {"model": "hf_" + "canary" * 6}},
        {"eval": {"task": "alpaca_eval", "options": {"judge.api_key": "canary"}}},
        {"method_kwargs": {"note": "sk-" + "canary" * 6}},
        {"data": {"path": SECRETS["WANDB_API_KEY"]}},
    ],
)
def test_recipes_with_secrets_are_refused_and_the_secret_is_not_shown(changes, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    base = {"student": "a", "teacher": "b", "data": {"path": "c"}, "output_dir": str(tmp_path / "run")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**base, **changes}))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml")])
    assert done.exit_code == 2, done.output
    assert "canary" not in done.output
    assert "x" * 30 not in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["eos_token: <end>", "max_new_tokens: 7", "bos_token: a", "chat_template: token"]
)
def test_ordinary_values_are_no_secrets(name):
    from hpd.config.secrets import check_no_secrets

    check_no_secrets({"train": yaml.safe_load(name), "teacher": {"api_key_env": "TEACHER_API_KEY"}})


def test_run_folders_hold_no_secrets(pair, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(recipe_of(pair, tmp_path / "run"))
    train(recipe)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    files = [
        path for folder in ("run", "report") for path in (tmp_path / folder).rglob("*") if path.is_file()
    ]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_recipes_made_in_python_are_written_without_their_secrets():
    from dataclasses import replace

    recipe = load_recipe({"student": "a", "teacher": "b", "data": {"path": "c"}})
    recipe = replace(
        recipe, train={"hub_token": "canary"}, data=replace(recipe.data, path="https://u:canary@host/x.jsonl")
    )
    assert "canary" not in json.dumps(resolve(recipe))


def test_errors_are_redacted_and_printable(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["OPENAI_API_KEY"])
    assert SECRETS["OPENAI_API_KEY"] not in redact(f"401 for key {SECRETS['OPENAI_API_KEY']}")
    done = CliRunner().invoke(app, ["train", str(tmp_path / f"{SECRETS['OPENAI_API_KEY']}\x1b[2J.yaml")])
    assert done.exit_code == 2
    assert SECRETS["OPENAI_API_KEY"] not in done.output
    assert "\x1b[2J" not in done.output
