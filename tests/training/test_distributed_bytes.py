"""Teachers with another tokenizer (vocabulary: bytes) on two gloo processes against one: served, mixed,
routed and cached ones, and rows that the student writes, under DDP and FSDP2.

The figures come from two launches of tests/helpers/byte_checks.py. `make test-distributed` prints them.
"""

import json

import pytest
import yaml
from helpers.byte_checks import DDP, FSDP2, named
from helpers.launches import ROOT, Differences, launch, logs_of, read, run_checks_on
from helpers.servers import load_backend, served
from helpers.two_tokenizers import bytes_recipe, mixed_pairs

from hpd.config import load_recipe
from hpd.training.run import train

pytestmark = pytest.mark.slow
CPUS = ROOT / "recipes/accelerate/cpu.yaml"
ACCELERATE = ("accelerate.commands.launch", "--config_file", CPUS, "-m", "hpd")
TWO = (*DDP, "accumulated", "resumed", *FSDP2)
# What another run of one process found: the same rows in more micro-batches or trainers, the same teacher.
REFERENCE = {"accumulated": "written", "resumed": "written", "served": "live", "cached": "live"}
DIFFERENCES = Differences()


@pytest.fixture(scope="module", autouse=True)
def printed_table(request):
    yield
    DIFFERENCES.print(request)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pairs, a cache that two processes wrote, and a server; which stands as long as the tests run."""
    folder = tmp_path_factory.mktemp("bytes")
    pair, _ = mixed_pairs(folder)
    (folder / "out").mkdir()
    cache = {"path": str(folder / "cache"), "dtype": "float32", "shard_bytes": 2000}
    bytes_recipe(pair, folder, list(named(11)), cache=cache)
    written = launch(*ACCELERATE, "cache", folder / "recipe.yaml")
    assert written.returncode == 0, written.stderr[-3000:]
    with served(load_backend(pair[1])) as url:
        (folder / "url").write_text(url)
        yield folder


@pytest.fixture(scope="module")
def figures(folder):
    for processes, names in ((1, (*DDP, *FSDP2)), (2, TWO)):
        run_checks_on(processes, "byte_checks.py", folder, folder / "out", *names)
    return folder / "out"


@pytest.mark.parametrize("name", [name for name in TWO if name != "live"])
def test_two_processes_equal_one(figures, name):
    found, weights = read(figures, name, 2)
    expected, expected_weights = read(figures, REFERENCE.get(name, name), 1)
    logs, expected_logs = found["logs"], expected["logs"]
    if name == "resumed":  # the last log averages over the second trainer's one step
        logs, expected_logs = logs[:-1], expected_logs[:-1]
    DIFFERENCES.check(name, 2, (logs, expected_logs), (weights, expected_weights))
    assert found["spread"] == 0.0
    if name != "resumed":
        assert found["engine"] == ("FSDP" if name in FSDP2 else "MULTI_CPU")


def test_a_launch_of_a_recipe_equals_one_process(folder):
    """A served teacher, rows that the student writes, validation, tasks, one writer of every file."""
    runs = {}
    problems = [{"prompt": "say one:", "answer": " one"}, {"prompt": "say two:", "answer": " two"}]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    for name, batch in (("two", 2), ("one", 4)):
        runs[name] = folder / name
        bytes_recipe(
            (folder / "a" / "student", folder / "a" / "teacher"),
            folder,
            list(named(11)),
            teacher={"type": "server", "protocol": "hpd", "url": (folder / "url").read_text()},
            method="reverse_kl",
            prefixes={"student": 0.5},
            rollouts={"max_new_tokens": 5},
            data={"validation": 0.3},
            train={
                "per_device_train_batch_size": batch,
                "per_device_eval_batch_size": 2,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "metric_stride": 1,
                "optim": "sgd",
                "learning_rate": 0.3,
                "bf16": False,
            },
            eval={"data": str(folder / "problems.jsonl"), "max_new_tokens": 4},
            output_dir=str(runs[name]),
        )
        if name == "two":
            done = launch(*ACCELERATE, "train", folder / "recipe.yaml")
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            train(load_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())))
    DIFFERENCES.check_launch(runs["two"], runs["one"])
    assert any("rollouts/unread" in log for log in logs_of(runs["two"]))
