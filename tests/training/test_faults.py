"""Nothing is lost: 20 steps straight equal 10, a kill, and 10 more, bit for bit; and so after faults of every
kind."""

import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.faults import KINDS, disk, harass, left_behind, same, start
from helpers.forked import context
from tiny_models import tiny_pair

# What each group of features keeps beside weights and optimizer.
FEATURES = {
    "hpd": {"method": "hpd"},
    "taid": {"method": "taid"},
    "replay": {
        "method": "opd",
        "prefixes": {"student": 0.5},
        "rollouts": {"max_new_tokens": 4, "replay": {"capacity": 8, "fresh": 0.5}},
    },
    "repeated updates": {
        "method": "opd",
        "rollouts": {"max_new_tokens": 4},
        "strategy": {"type": "policy_gradient", "updates": 2},
    },
    "lora": {"method": "hpd", "lora": {"r": 2, "lora_dropout": 0.1}},
    "best": {
        "method": "forward_kl",
        "data": {"validation": 0.25},
        "train": {
            "eval_strategy": "steps",
            "eval_steps": 5,
            "load_best_model_at_end": True,
            "save_total_limit": 2,
        },
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    student, teacher = tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i + 1}"} for i in range(28)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 20,
            "per_device_train_batch_size": 2,
            "logging_steps": 2,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "save_strategy": "steps",
            "save_steps": 5,
            "use_cpu": True,
        },
    }


def recipe(base, folder, **parts):
    tree = {**base, **parts, "output_dir": str(folder)}
    for name in ("data", "train"):
        tree[name] = {**base[name], **parts.get(name, {})}
    return tree


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), process.exitcode
        assert time.monotonic() < end
        time.sleep(0.002)


def ended(process):
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "replay" else pytest.mark.slow) for n in FEATURES]
)
def test_straight_equals_killed_and_resumed_bit_for_bit(base, tmp_path, name):
    straight, killed = (recipe(base, tmp_path / which, **FEATURES[name]) for which in ("straight", "killed"))
    log = tmp_path / "log.txt"
    assert ended(start(straight, log)) == 0, log.read_text()
    process = start(killed, log)
    wait_for((tmp_path / "killed" / "checkpoint-10" / "complete.json").is_file, process)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert ended(start(killed, log)) == 0, log.read_text()
    same(left_behind(tmp_path / "straight"), left_behind(tmp_path / "killed"))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    log = folder / "log.txt"
    assert ended(start(recipe(base, folder / "run", train={"save_steps": 20}), log)) == 0, log.read_text()
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_between_two_logs_and_the_run_goes_on_unchanged(base, undisturbed, tmp_path, number):
    stopped = recipe(base, tmp_path / "stopped", train={"save_steps": 20})
    log = tmp_path / "log.txt"
    process = start(stopped, log)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and '"loss"' in metrics.read_text(), process)
    os.kill(process.pid, number)
    assert ended(process) == 75, log.read_text()
    assert re.search(rf"{number.name}.*\. Training stopped: the checkpoint of step", log.read_text())
    assert ended(start(stopped, log)) == 0, log.read_text()
    same(left_behind(undisturbed), left_behind(tmp_path / "stopped"))


def in_terminal(name, words):
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    os.environ.update(TERM="xterm")
    sys.argv = ["hpd", *words]
    from hpd.cli import main

    main()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_and_stops_or_is_not_missed(base, undisturbed, tmp_path, ignored):
    """With bars on it; under nohup the run goes on without."""
    tree = recipe(base, tmp_path / "run", train={"save_steps": 20})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    ours, theirs = pty.openpty()
    words = ["train", str(tmp_path / "recipe.yaml")]
    target = ignoring_hangup if ignored else in_terminal
    process = context().Process(target=target, args=(os.ttyname(theirs), words))
    process.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    shown = bytearray()
    while not (metrics.is_file() and '"loss"' in metrics.read_text()):
        assert process.is_alive()
        if select.select([ours], [], [], 0.01)[0]:
            shown += os.read(ours, 2**16)
    assert b"student" in shown
    os.close(theirs)
    os.close(ours)
    if not ignored:
        assert ended(process) == 75
        assert any((tmp_path / "run").glob("checkpoint-*/complete.json"))
        assert not (tmp_path / "run" / "summary.json").exists()
        process = start(tree, tmp_path / "log.txt")
    assert ended(process) == 0
    same(left_behind(undisturbed), left_behind(tmp_path / "run"))


def ignoring_hangup(name, words):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    in_terminal(name, words)


def check_all(base, folder, log, kills, kinds, seed):
    tree = recipe(base, folder, **FEATURES["replay"])
    reference = {**tree, "output_dir": str(folder / "undisturbed")}
    assert ended(start(reference, log)) == 0, log.read_text()
    account = harass(tree, folder, log, kills, seed, kinds)
    expected = left_behind(folder / "undisturbed")
    runs = sorted(path for path in Path(folder).glob("run-*") if (path / "summary.json").is_file())
    for run in runs:
        same(expected, left_behind(run))
    return account, len(runs)


def test_three_kills(base, tmp_path):
    account, _ = check_all(
        base, tmp_path / "runs", tmp_path / "log.txt", 3, ("SIGKILL", "SIGTERM", "ENOSPC in a shard"), seed=1
    )
    assert account.survived >= 3


@pytest.mark.slow
def test_faults_of_every_kind(base, tmp_path, capsys):
    """`make test-faults`: HPD_FAULTS says how many, 120 if it does not; most are kills proper."""
    kills = int(os.environ.get("HPD_FAULTS", "120"))
    with disk(tmp_path / "disk") as mounted:
        kinds = KINDS if mounted else tuple(kind for kind in KINDS if kind not in ("disk full", "read-only"))
        account, runs = check_all(
            base, tmp_path / "disk", tmp_path / "log.txt", kills, (*kinds, *KINDS[:2] * 3), int(time.time())
        )
    with capsys.disabled():
        print(
            f"\nfaults survived: {account.survived} in {account.lives} lives; runs compared bit for bit: "
            f"{runs}"
        )
        print(
            "by kind:",
            dict(account.kills),
            "\nat moments:",
            dict(account.moments),
            "\nexit codes:",
            dict(account.exits),
        )
    assert set(account.kills) == set(kinds)
