"""Every command ends as if nothing had happened, whatever disturbed it on the way: `make test-faults`.

Training itself, with replay, is in tests/training/test_faults.py.
"""

import json
import os
import re
import signal
import time

import pytest
import yaml
from helpers.command_faults import (
    COMMAND_KINDS,
    Command,
    disturb,
    files_of,
    require_no_survivors,
    results_of,
    start_command,
)
from helpers.faults import disk, left_behind
from helpers.tiny_grid import tiny_experiment
from tiny_models import tiny_pair


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Models, data and recipes for all commands."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i + 1}"} for i in range(40)]
    problems = [{"prompt": f"what is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    for name, content in (("rows", rows), ("problems", problems)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    recipe = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows.jsonl")},
        "generate": {"samples": 6, "max_new_tokens": 12, "batch_size": 8, "truncated": "keep"},
        "train": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "save_strategy": "steps",
            "save_steps": 2,
            "use_cpu": True,
        },
    }
    stages = [
        {"name": "first", "method": "hpd"},
        {
            "name": "second",
            "method": "opd",
            "prefixes": {"student": 0.5},
            "rollouts": {"max_new_tokens": 4, "replay": {"capacity": 8, "fresh": 0.5}},
        },
    ]
    lora = {"r": 2, "lora_dropout": 0.1}  # merged between the stages
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "stages.yaml").write_text(yaml.safe_dump({**recipe, "stages": stages, "lora": lora}))
    return folder


def eval_command(base):
    def words(place):
        models = [base / "student", base / "teacher"]
        options = ["--data", base / "problems.jsonl", "--output", place, "--chat-template", "never"]
        drawing = ["--samples", 2, "--temperature", 1, "--max-new-tokens", 16, "--batch-size", 4]
        return list(map(str, ["eval", *models, "--tasks", "exact-match,math500", *options, *drawing]))

    def left(place):
        return {**files_of(place), "evals.json": results_of(place)["evals.json"]}

    return Command(words, left)


def generate_command(base):
    return Command(
        lambda place: ["generate", str(base / "recipe.yaml"), f"generate.output={place}/made.jsonl"], files_of
    )


def cache_command(base):
    small = ["cache.dtype=float32", "cache.shard_bytes=4096"]
    return Command(
        lambda place: ["cache", str(base / "recipe.yaml"), f"cache.path={place}", *small], files_of
    )


def stages_command(base):
    def left(place):
        stages = {name: left_behind(place / name) for name in ("first", "second")}
        return {**stages, "files": results_of(place)}

    return Command(lambda place: ["train", str(base / "stages.yaml"), f"output_dir={place}"], left)


def compare_command(base):
    """Tuning, then 2 methods, with an evaluation of teacher and students; a failed run is exit code 1."""
    folder = base / "grid"
    folder.mkdir(exist_ok=True)
    experiment = tiny_experiment(
        folder,
        axes={"method": ["hpd", "forward_kl"], "seed": [0]},
        budget={"type": "label_tokens", "value": 300},
        set={"train.max_steps": 40, "train.save_strategy": "steps", "train.save_steps": 4},
        tune={"train.weight_decay": [0.0, 0.1], "seeds": [7], "metric": "forward_kl", "per": []},
    )

    def words(place):
        return ["compare", str(experiment), f"output_dir={place}", "--jobs", "2", "--allow", "git_commit"]

    def left(place):
        found = results_of(place)
        # Logs say what was disturbed; the report shows seconds.
        return {name: None if name.split("/")[0] in ("logs", "report") else found[name] for name in found}

    return Command(words, left, failed=1)


COMMANDS = {
    "eval": (eval_command, 60),
    "generate": (generate_command, 60),
    "cache": (cache_command, 60),
    "stages": (stages_command, 40),
    "compare": (compare_command, 15),
}


@pytest.mark.parametrize("name", ["generate", "cache"])
def test_a_few_faults(base, tmp_path, name):
    kinds = ("SIGKILL", "SIGTERM", "SIGINT", "two at once", "file limit")
    account, ends = disturb(COMMANDS[name][0](base), tmp_path / "runs", tmp_path / "log.txt", 2, 1, kinds)
    assert account.survived >= 2
    assert ends


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_faults_of_every_kind(base, tmp_path, capsys, name):
    """HPD_FAULTS says how many, of each command."""
    make, default = COMMANDS[name]
    faults = int(os.environ.get("HPD_FAULTS", default))
    with disk(tmp_path / "disk") as mounted:
        kinds = [kind for kind in COMMAND_KINDS if mounted or kind not in ("disk full", "read-only")]
        account, ends = disturb(
            make(base), tmp_path / "disk", tmp_path / "log.txt", faults, int(time.time()), kinds
        )
    with capsys.disabled():
        print(
            f"\n{name}: faults survived: {account.survived} in {account.lives} lives; ends equal to the "
            f"undisturbed one: {ends}\nby kind: {dict(account.kills)}\nexit codes: {dict(account.exits)}"
        )
    assert account.survived >= faults


@pytest.mark.parametrize(
    ("name", "number"), [("eval", signal.SIGTERM), ("generate", signal.SIGINT), ("cache", signal.SIGHUP)]
)
def test_a_signal_says_what_is_kept_and_what_goes_on(base, tmp_path, name, number):
    command, log = COMMANDS[name][0](base), tmp_path / "log.txt"
    place = tmp_path / "place"
    process = start_command(command.words(place), log)
    kept = {"eval": "partial-*.jsonl", "generate": "*.part", "cache": "shard-*.json"}[name]
    deadline = time.monotonic() + 120
    while not any(path.read_text().count("\n") > 1 or name == "cache" for path in place.glob(kept)):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, number)
    process.join(60)
    said = " ".join(log.read_text().split())
    assert process.exitcode == 75, said
    why = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C", "SIGHUP": r"SIGHUP \(the terminal was closed\)"}
    kept = rf"{why[number.name]}\. [^.]* stopped: .* in {re.escape(str(place))}"
    assert re.search(kept + rf".* the same command resumes from there\. Resume with: hpd {name}", said), said
    require_no_survivors([process.pid])
