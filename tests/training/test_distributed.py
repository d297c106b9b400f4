"""Two and four gloo processes against one: losses, weights, draws, metrics, files. `make test-distributed`
prints the figures.

The first test runs by default; the others share three launches of tests/helpers/distributed_checks.py.
"""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, ParallelismConfig, TorchContextParallelConfig
from datasets import Dataset
from helpers.distributed_checks import rows as counting_rows
from helpers.launches import (
    METRICS,
    ROOT,
    WEIGHTS,
    Differences,
    largest_difference,
    launch,
    logs_of,
    read,
    run_checks_on,
    weights_of,
)
from helpers.two_tokenizers import piece_model
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM

from hpd.config import load_recipe
from hpd.data.samplers import FilledOrder, fill
from hpd.training.caching import write_cache
from hpd.training.checkpoints import newest_complete
from hpd.training.engines import check_engine, check_launched, check_sizes
from hpd.training.run import train

CONFIGS = ROOT / "recipes/accelerate"
DIFFERENCES = Differences()


@pytest.fixture(scope="module", autouse=True)
def printed_table(request):
    yield
    DIFFERENCES.print(request)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    tiny_pair("llama", folder / "pair")
    piece_model(folder / "pair" / "pieces")
    tiny_pair("mistral", folder / "untied")
    (folder / "out").mkdir()
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows[:3]]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return folder


def recipe_file(folder, name, batch, **train_settings):
    tree = {
        "student": str(folder / "pair/student"),
        "teacher": str(folder / "pair/teacher"),
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.3},
        "train": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
            "use_cpu": True,
            "bf16": False,
            "lr_scheduler_type": "constant",
            "metric_stride": 1,
            **train_settings,
        },
        "eval": {"data": str(folder / "problems.jsonl"), "max_new_tokens": 8, "every": 1},
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def cached_recipe(folder):
    """What `hpd cache` writes for the rows of tests/helpers/distributed_checks.py."""
    (folder / "counting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in counting_rows(11)))
    return {
        "student": str(folder / "pair/student"),
        "teacher": str(folder / "pair/teacher"),
        "data": {"path": str(folder / "counting.jsonl")},
        "train": {"max_length": 64, "use_cpu": True},
        "cache": {"path": str(folder / "pair/cache"), "dtype": "float32"},
        "output_dir": str(folder / "unused"),
    }


def test_accelerate_launch_of_a_recipe_equals_one_process(folder):
    """11 training rows and 5 of validation on two processes, tasks evaluated after each step, one writer of
    every file."""
    recipe = recipe_file(folder, "two", 4)
    done = launch(
        "accelerate.commands.launch", "--config_file", CONFIGS / "cpu.yaml", "-m", "hpd", "train", recipe
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(load_recipe(recipe_file(folder, "one", 8)))
    two, one = folder / "two", folder / "one"
    DIFFERENCES.check_launch(two, one)
    names = {path.name for path in one.iterdir()}
    assert {"recipe.yaml", "summary.json", "evals.json", "metrics.jsonl", "model.safetensors"} <= names
    evals = [json.loads((run / "evals.json").read_text()) for run in (two, one)]
    for name in ("model", "accuracy", "mean_tokens", "num_examples"):
        assert [entry[name] for entry in evals[0]] == [entry[name] for entry in evals[1]]
    assert len(evals[0]) == 5
    summaries = [json.loads((run / "summary.json").read_text()) for run in (two, one)]
    assert summaries[0].keys() == summaries[1].keys()
    assert summaries[0]["steps"] == summaries[1]["steps"] == 2


def test_processes_that_are_not_joined_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = SimpleNamespace(deepspeed=None)
    check_launched(asked, 2)
    with pytest.raises(ValueError, match="started 2 processes.*use_cpu"):
        check_launched(asked, 1)
    # use_cpu would switch DeepSpeed off.
    with pytest.raises(ValueError, match="accelerate launch.*ddp_backend: gloo and without train.deepspeed"):
        check_launched(SimpleNamespace(deepspeed={"zero_optimization": {}}), 1)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="with train.ddp_backend: gloo. Set it"):
        check_launched(asked, 1)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator joins the processes by itself")
def test_a_launch_on_cpus_without_use_cpu_leaves_nothing_behind(folder):
    recipe = recipe_file(folder, "apart", 4, use_cpu=False)
    done = launch(
        "accelerate.commands.launch", "--config_file", CONFIGS / "cpu.yaml", "-m", "hpd", "train", recipe
    )
    assert done.returncode != 0
    assert "each would train alone" in " ".join(done.stderr.split())
    assert not (folder / "apart").exists()


@pytest.mark.slow
def test_a_launch_that_asks_for_fsdp_and_would_get_ddp_is_refused(folder):
    recipe = recipe_file(folder, "refused", 4)
    launcher = ("accelerate.commands.launch", "--use_fsdp", "--fsdp_version", 2, "--num_processes", 2)
    done = launch(*launcher, "-m", "hpd", "train", recipe)
    assert done.returncode != 0
    assert "FSDP was asked for" in done.stderr
    assert "MULTI_CPU" in done.stderr


@pytest.mark.slow
def test_torchrun_resumes_where_a_checkpoint_stands(folder):
    """Two processes go on from their first step; the metrics have no line twice."""
    straight = recipe_file(folder, "straight", 4, max_steps=4, save_strategy="steps", save_steps=1)
    stopped = recipe_file(folder, "stopped", 4, max_steps=4, save_strategy="steps", save_steps=1)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "hpd", "train")
    assert launch(*torchrun, straight).returncode == 0
    assert launch(*torchrun, stopped).returncode == 0
    run = folder / "stopped"
    for step in (2, 3, 4):
        subprocess.run(["rm", "-r", str(run / f"checkpoint-{step}")], check=True)
    (run / "summary.json").unlink()
    again = launch(*torchrun, stopped)
    assert again.returncode == 0, again.stderr[-3000:]
    ours, theirs = (
        [log for log in logs_of(path) if "train_loss" not in log] for path in (run, folder / "straight")
    )
    assert largest_difference(ours, theirs) == 0.0
    assert torch.equal(weights_of(run), weights_of(folder / "straight"))
    # Another number of processes would be another run: told, and nothing changed.
    (run / "summary.json").unlink()
    with pytest.raises(ValueError, match="written by a launch of 2 processes, and this one has 1"):
        train(load_recipe(stopped))
    alone = recipe_file(folder, "alone", 4, max_steps=4, save_strategy="steps", save_steps=1)
    train(load_recipe(alone))
    (folder / "alone" / "summary.json").unlink()
    refused = launch(*torchrun, alone)
    assert refused.returncode != 0
    assert "written by a launch of 1 process, and this one has 2" in " ".join(refused.stderr.split())
    assert newest_complete(folder / "alone").name == "checkpoint-4"


DDP = (
    "plain", "uneven", "rollouts", "own_rows", "two_tokenizers", "written_in_bytes", "low_precision",
    "self_teacher", "averaged",
    "cached", "straight",
)  # fmt: skip
FSDP2 = ("fsdp2", "fsdp2_averaged", "fsdp2_two_tokenizers")
ONE = (*DDP, *FSDP2)
# A recipe's FSDP stays in the environment, so what asks for it comes last.
TWO = (*DDP, "accumulated", "resumed", "refusals", *FSDP2, "fully_shard")
FOUR = ("plain", "uneven", "rollouts", "cached", "fsdp2", "fully_shard")
REFERENCE = {"accumulated": "plain", "resumed": "straight"}


@pytest.fixture(scope="module")
def figures(folder):
    write_cache(load_recipe(cached_recipe(folder)))
    for processes, names in ((1, ONE), (2, TWO), (4, FOUR)):
        run_checks_on(processes, "distributed_checks.py", folder / "pair", folder / "out", *names)
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes"),
    [(name, 2) for name in TWO if name not in ("fully_shard", "refusals")]
    + [(name, 4) for name in FOUR if name != "fully_shard"],
)
def test_several_processes_equal_one(figures, name, processes):
    found, weights = read(figures, name, processes)
    expected, expected_weights = read(figures, REFERENCE.get(name, name), 1)
    logs, expected_logs = found["logs"], expected["logs"]
    if (
        name == "resumed"
    ):  # the last log averages over the steps since the start, of which the second trainer did one
        logs, expected_logs = logs[:-1], expected_logs[:-1]
    # bfloat16 rounds to 3 digits, and Adam's first step moves a weight by the learning rate whatever the
    # gradient's size.
    bounds = (2e-3, 3e-2) if name == "low_precision" else (METRICS, WEIGHTS)
    DIFFERENCES.check(name, processes, (logs, expected_logs), (weights, expected_weights), bounds)
    assert found["spread"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_fsdp2_shards_student_and_teacher_and_exports_the_whole_student(figures, processes):
    found, weights = read(figures, "fsdp2", processes)
    assert found["engine"] == "FSDP"
    assert found["teacher_in_optimizer"] == 0
    for share in found["local_share"].values():
        assert share == pytest.approx(1 / processes, abs=0.01)
    assert torch.equal(weights_of(figures / f"fsdp2-{processes}"), weights)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("head", ["pair", "untied"])
def test_torchs_fully_shard_equals_one_process(figures, head, processes):
    found, _ = read(figures, f"fully_shard_{head}", processes)
    tied = "tied" if head == "pair" else "untied"
    DIFFERENCES.add(f"fully_shard, {tied} head", processes, found["losses"], found["final"])
    assert found["spread"] == 0.0
    assert found["losses"] < 2e-6
    assert found["gradients"] < 2e-6
    assert found["final"] < 2e-6
    assert found["teacher_share"] == pytest.approx(1 / processes, abs=0.1)


@pytest.mark.slow
def test_a_recipe_that_asks_for_fsdp_and_would_get_ddp_is_refused(figures):
    assert "FSDP was asked for" in read(figures, "refusals", 2)[0]["message"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_configuration_is_one(path):
    """Accelerate's own reader refuses unknown keys; its engine is the one that the file's name says."""
    config = load_config_from_file(str(path))
    engine = {
        "ddp": "MULTI_GPU",
        "cpu": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert config.distributed_type == DistributedType(engine[path.stem.split("_")[0]])
    assert config.num_processes % config.num_machines == 0
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
    if config.deepspeed_config:
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def accelerator(engine, **state):
    """What `check_engine` reads of an Accelerator, for engines that need GPUs to start."""
    layout = state.pop("layout", None)
    return SimpleNamespace(
        distributed_type=engine,
        num_processes=2,
        device=torch.device("cpu"),
        state=SimpleNamespace(**state),
        parallelism_config=layout,
    )


def sharded(**layout):
    plugin = SimpleNamespace(fsdp_version=2)
    return accelerator(DistributedType.FSDP, fsdp_plugin=plugin, layout=ParallelismConfig(**layout))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (accelerator(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=1)), "fsdp_version: 2"),
        (accelerator(DistributedType.MEGATRON_LM), "Megatron-LM"),
        (
            sharded(cp_size=2, cp_handler=TorchContextParallelConfig(cp_comm_strategy="alltoall")),
            "cp_comm_strategy: alltoall has no effect",
        ),
        (sharded(cp_size=2, dp_replicate_size=2, dp_shard_size=2), "dp_replicate_size above 1"),
        (sharded(sp_size=2), "Sequence parallelism.*cp_size"),
        (sharded(tp_size=2), "Tensor parallelism"),
        (
            accelerator(
                DistributedType.DEEPSPEED,
                deepspeed_plugin=SimpleNamespace(
                    zero_stage=3, deepspeed_config={"zero_optimization": {"stage": 3}}
                ),
            ),
            "zero3_save_16bit_model",
        ),
    ],
)
def test_engines_under_which_the_loss_would_be_wrong_are_refused(engine, message):
    with pytest.raises(ValueError, match=message):
        check_engine(SimpleNamespace(fsdp=None, deepspeed=None), engine)


def test_asking_for_deepspeed_and_getting_ddp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DEEPSPEED was asked for"):
        check_engine(SimpleNamespace(fsdp=None, deepspeed=None), accelerator(DistributedType.MULTI_CPU))


def recipe_in(folder, pair, **settings):
    (folder / "rows.jsonl").write_text('{"prompt": "say one:", "completion": " one"}\n')
    return load_recipe(
        {
            "student": str(pair / "student"),
            "teacher": str(pair / "teacher"),
            "data": {"path": str(folder / "rows.jsonl")},
            "train": {"use_cpu": True, "max_length": 64, **settings},
            "output_dir": str(folder / "run"),
        }
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"fsdp": True}, "FSDP was asked for.*recipes/accelerate/fsdp2.yaml"),
        ({"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": True}}, "FSDP was asked for"),
        ({"fsdp_config": {"version": 2}}, "has an effect with train.fsdp: true only"),
        (
            {"fsdp": True, "fsdp_config": {"reshard_after": True}},
            "no key 'reshard_after'. Did you mean 'reshard_after_",
        ),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "version 1 is not supported: set version: 2"),
    ],
    ids=["switch", "settings", "settings alone", "slip", "version 1"],
)
def test_fsdp_in_a_recipe_is_read_as_transformers_documents_it(folder, tmp_path, monkeypatch, asked, said):
    """On one CPU process it is refused, before a model loads."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=said):
        train(recipe_in(tmp_path, folder / "pair", **asked))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"CP": 2}, "asks for 2 processes .* there are 1"),
        ({"DP_SHARD": 2}, "asks for 2 processes .* there are 1"),
        ({"TP": 2}, "Tensor parallelism"),
    ],
)
def test_a_layout_of_processes_is_checked_before_a_model_loads(folder, tmp_path, monkeypatch, sizes, said):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
    with pytest.raises(ValueError, match=said):
        train(recipe_in(tmp_path, folder / "pair"))


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"dp_shard_size": 2}], ids="-".join)
def test_rows_or_weights_to_be_shared_without_fsdp_are_refused(sizes):
    args = SimpleNamespace(
        parallelism_config=ParallelismConfig(**sizes), world_size=2, fsdp=None, deepspeed=None
    )
    with pytest.raises(ValueError, match="under FSDP2 only"):
        check_sizes(args)


def test_filling_has_no_labels_and_comes_last():
    rows = Dataset.from_list([{"input_ids": [i, i, i], "labels": [-100, i, i]} for i in range(1, 6)])
    filled = fill(rows, 4)
    assert len(filled) == 8
    assert filled[:5] == rows[:]
    assert all(set(row["labels"]) == {-100} for row in filled.select(range(5, 8)))
    assert fill(rows, 5) is rows
    for shuffled in (False, True):
        order = FilledOrder(5, 8, shuffled, seed=3)
        first = list(order)
        assert sorted(first[:5]) == [0, 1, 2, 3, 4]
        assert first[5:] == [5, 6, 7]
        order.set_epoch(0)
        assert list(order) == first
