"""Rows that two processes share (context parallelism, FSDP2, gloo), against whole rows in one process.

The figures come from three launches of tests/helpers/context_checks.py; what is refused needs none.
"""

import json

import pytest
import torch
from accelerate.utils import ParallelismConfig
from helpers.distributed_checks import rows
from helpers.launches import METRICS, WEIGHTS, largest_difference, read, run_checks_on
from peft import PromptTuningConfig
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM

from hpd import DistillConfig, DistillTrainer
from hpd.config import load_recipe
from hpd.teachers import SelfTeacher
from hpd.training.caching import write_cache
from hpd.training.run import train

TRAINED = ("hpd", "forward_kl", "sft", "accumulated", "self_teacher", "cached", "adapter")
RECIPES = ("recipe", "recipe_of_adapter")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context") / "pair"
    tiny_pair("llama", folder)
    return folder


@pytest.fixture(scope="module")
def figures(pair):
    out = pair.parent / "out"
    out.mkdir()
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(11)))
    cache = {"path": str(pair / "cache"), "dtype": "float32"}
    write_cache(load_recipe(recipe_of(pair, out / "rows.jsonl", out / "unused", cache=cache)))
    # A recipe's engine stays in the environment, so it comes last.
    for processes, names in (
        (1, (*TRAINED, "low_precision", "memory", *RECIPES)),
        (2, (*TRAINED, "low_precision", "memory", "resumed", *RECIPES)),
        (4, ("hpd", "cached")),
    ):
        run_checks_on(processes, "context_checks.py", pair, out, *names)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [*((name, 2) for name in TRAINED), ("hpd", 4), ("cached", 4)])
def test_shared_rows_equal_whole_rows(figures, name, processes):
    found, weights = read(figures, name, processes)
    expected, expected_weights = read(figures, name, 1)
    assert found["spread"] == 0.0
    assert largest_difference(found["logs"], expected["logs"]) < METRICS
    assert float((weights - expected_weights).abs().max()) < WEIGHTS


@pytest.mark.slow
def test_a_run_goes_on_where_its_checkpoint_stands(figures):
    (found, weights), (expected, straight) = (read(figures, name, 2) for name in ("resumed", "straight"))
    # The last log averages over the steps since the start, of which the second trainer did one.
    assert largest_difference(found["logs"][:-1], expected["logs"][:-1]) == 0.0
    assert torch.equal(weights, straight)


@pytest.mark.slow
def test_shared_rows_in_bfloat16(figures):
    """Layers round to 3 digits, and the loss that leaves FSDP2's forward is bfloat16 itself."""
    found, weights = read(figures, "low_precision", 2)
    expected, expected_weights = read(figures, "low_precision", 1)
    for log, other in zip(found["logs"], expected["logs"], strict=True):
        assert log.get("forward_kl", 0) == pytest.approx(other.get("forward_kl", 0), abs=2e-2)
        assert log.get("loss", 0) == pytest.approx(other.get("loss", 0), abs=6e-2)
    assert float((weights - expected_weights).abs().max()) < 3e-2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_answers_its_tasks_and_writes_a_whole_student(figures, recipe):
    two, one = (figures / f"{recipe}-{processes}" for processes in (2, 1))
    logs = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in (two, one)]
    # FSDP2 measures the untrained student when training begins, one process before.
    assert largest_difference(*([log for log in run if log["step"]] for run in logs)) < METRICS
    students = [AutoModelForCausalLM.from_pretrained(run).requires_grad_(False) for run in (two, one)]
    weights = zip(*(student.parameters() for student in students), strict=True)
    assert max(float((a - b).abs().max()) for a, b in weights) < WEIGHTS
    evals = [json.loads((run / "evals.json").read_text()) for run in (two, one)]
    for name in ("model", "accuracy", "mean_tokens"):
        assert [entry[name] for entry in evals[0]] == [entry[name] for entry in evals[1]]
    assert not any("hpd_sliced" in path.read_text() for path in two.glob("*.json"))


@pytest.mark.slow
def test_a_long_row_leaves_half_of_its_activations_on_each_process(figures):
    (two, _), (one, _) = (read(figures, "memory", processes) for processes in (2, 1))
    assert two["recomputed"] / one["recomputed"] == pytest.approx(0.5, abs=0.01)
    # Each layer keeps keys and values of the whole row too and, on a CPU alone, its mask.
    assert 0.5 < two["kept"] / one["kept"] < 0.75


def recipe_of(pair, rows, output, **changes):
    return {
        "student": str(pair / "student"),
        "teacher": str(pair / "teacher"),
        "data": {"path": str(rows)},
        "train": {"use_cpu": True, "max_length": 64},
        "output_dir": str(output),
        **changes,
    }


def call(pair, **options):
    """A trainer that would be launched with rows shared by two."""
    settings = {
        name: options.pop(name) for name in list(options) if name in DistillConfig.__dataclass_fields__
    }
    args = DistillConfig(
        output_dir=str(pair / "unused"), use_cpu=True, report_to="none", max_length=64, **settings
    )
    # As `accelerate launch` sets it; given here, transformers would look for two processes at once.
    args.parallelism_config = ParallelismConfig(cp_size=2)
    given = {"teacher": str(pair / "teacher"), "train_dataset": rows(4), **options}
    return DistillTrainer(str(pair / "student"), args=args, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "opd"}, "text that the student writes"),
        ({"teacher": SelfTeacher(0.1)}, "a moving average"),
        ({"packing": True}, "train.packing"),
        ({"peft_config": PromptTuningConfig(num_virtual_tokens=2)}, "an adapter that is no LoRA"),
        ({"vocabulary": "bytes"}, "vocabulary: bytes"),
        ({"train_dataset": rows(4).to_iterable_dataset(), "max_steps": 2}, "a stream"),
        ({"include_num_input_tokens_seen": "all"}, "num_input_tokens_seen"),
        ({"train_dataset": rows(2).add_column("teacher_prompt", ["a", "b"])}, "a prompt of its own"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_is_not_exact_on_slices_is_refused_before_a_model_loads(pair, monkeypatch, options, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=rf"cp_size: 2\) does not go with .*{message}"):
        call(pair, **options)


def test_sizes_that_are_not_the_number_of_processes_are_refused_before_a_model_loads(pair, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match="asks for 2 processes .*, and there are 1: start as many"):
        call(pair)


def test_a_recipe_launched_so_is_checked_before_a_model_loads(pair, monkeypatch, tmp_path):
    """A launch of one process that `accelerate launch` has told of two."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    tree = recipe_of(pair, tmp_path / "rows.jsonl", tmp_path / "run")
    with pytest.raises(ValueError, match="does not go with text that the student writes"):
        train(load_recipe(tree | {"method": "opd"}))
    for lora in (None, {"r": 2}):
        with pytest.raises(ValueError, match="and there are 1"):
            train(load_recipe(tree | {"lora": lora}))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="does not go with a teacher that is neither a model here nor a cac"):
        write_cache(load_recipe(tree | {"cache": {"path": str(tmp_path / "cache")}}))
