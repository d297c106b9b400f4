"""The command line as users run it: in a process of its own."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers.forked import hpd
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM

ROWS = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(24)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    student, teacher = tiny_pair("llama", folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({"prompt": r["prompt"], "answer": r["completion"]}) + "\n" for r in ROWS[:4])
    )
    recipe = {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.25},
        "train": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": 64,
        },
        "eval": {"data": str(folder / "problems.jsonl"), "max_new_tokens": 8},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_train_from_recipe_to_loadable_student(workspace):
    done = hpd("train", workspace / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "forward_kl" in done.stdout
    # Without a terminal: a line for each logging step, with its figures, and lines for every other wait.
    lines = [line for line in done.stdout.splitlines() if line.startswith("training ")]
    assert [line.split()[1] for line in lines] == ["0/3", "1/3", "2/3", "3/3"]
    assert all(word in line for line in lines[1:] for word in ("loss", "KL", "tok/s", "left"))
    for wait in ("answers of student before 4/4", "answers of teacher 4/4", "validation 1/1"):
        assert wait in done.stdout
    assert "it/s" not in done.stderr  # bars of libraries
    run = workspace / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3
    assert 0 < summary["train seconds"] < summary["seconds"]
    assert {"forward_kl before", "forward_kl after", "student after accuracy", "teacher accuracy"} <= set(
        summary
    )
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in steps if "loss" in log] == [1, 2, 3]
    assert AutoModelForCausalLM.from_pretrained(run).config.model_type == "llama"
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoint-3").config.model_type == "llama"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["max_steps"] == 3
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]
    assert "method" in (run / "README.md").read_text()
    again = hpd("train", workspace / "recipe.yaml")
    assert again.returncode == 2
    assert "finished" in again.stderr
    other = hpd("train", workspace / "recipe.yaml", "method=akl")
    assert other.returncode == 2
    assert "another recipe" in other.stderr


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(workspace):
    done = hpd(
        "train",
        workspace / "recipe.yaml",
        "output_dir=never",
        "method=forward_kl",
        "--dry-run",
        cwd=workspace,
    )
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)  # a recipe, and nothing beside it
    assert resolved["method"] == "forward_kl"
    assert "equal token maps" in done.stderr
    assert "a row as it will be learned" in done.stderr
    assert not (workspace / "never").exists()


def test_cache_then_doctor_and_train_without_the_teachers_weights(workspace):
    place = workspace / "cache"
    done = hpd("cache", workspace / "recipe.yaml", f"cache.path={place}")
    assert done.returncode == 0, done.stderr
    assert "bytes each" in done.stdout
    announced = re.search(r"; ([\d.,]+) kB to write", done.stdout)
    assert announced is not None
    written = sum(file.stat().st_size for file in place.iterdir() if file.suffix == ".safetensors")
    assert float(announced[1]) * 1000 == pytest.approx(written, rel=0.05)
    assert "positions written" in done.stdout
    assert (place / "cache.json").is_file()
    settings = [
        workspace / "recipe.yaml",
        f"cache.path={place}",
        "teacher.type=cached",
        f"output_dir={workspace / 'from-cache'}",
    ]
    done = hpd("train", *settings, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "equal token maps" in done.stderr
    done = hpd("train", *settings, "eval=null")
    assert done.returncode == 0, done.stderr
    assert json.loads((workspace / "from-cache" / "summary.json").read_text())["steps"] == 3
    done = hpd("cache", workspace / "recipe.yaml", f"cache.path={place}", "train.max_length=32")
    assert done.returncode == 2
    assert "another max_length" in done.stderr


def test_doctor_reports_pair_lengths_and_memory(workspace):
    done = hpd("doctor", workspace / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    for word in ("vocabulary", "end of sequence", "max_length", "teacher", "activations", "total", "18 rows"):
        assert word in done.stdout, word


def test_doctor_counts_the_run_s_arithmetic(workspace):
    from hpd.config import load_recipe
    from hpd.estimate.cost import flops_per_token
    from hpd.training.plan import plan

    done = hpd(
        "doctor", workspace / "recipe.yaml", "train.max_steps=10", "--devices", "2", "--tflops", "0.001"
    )
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(workspace / "recipe.yaml", ["train.max_steps=10"])
    price, planned = flops_per_token(recipe), plan(recipe)
    labels, rows = planned.lengths.label_tokens, 2 * planned.args.per_device_train_batch_size
    step = rows * (price.backbone * labels / planned.lengths.label_share + price.head * labels)
    said = " ".join(done.stdout.split())
    assert f"{step / 1e9:.3g} GFLOP in a step of {rows} rows" in said
    assert f"{step * 10 / 2e9 / 3600:,.3g} hours on 2 devices that reach 0.001 TFLOP/s each" in said
    elsewhere = hpd(
        "doctor", workspace / "recipe.yaml", "train.bf16=true"
    )  # a recipe for a GPU, looked at where there is none
    assert elsewhere.returncode == 0, elsewhere.stderr
    wrong = hpd("doctor", workspace / "recipe.yaml", "--tflops", "0")
    assert wrong.returncode == 2
    assert "--tflops > 0" in " ".join(wrong.stderr.split())


def test_doctor_states_what_fits_a_budget(workspace):
    done = hpd("doctor", workspace / "recipe.yaml", "--memory", "1GiB")
    assert done.returncode == 0, done.stderr
    assert "1.00 GiB: this recipe's step leaves" in done.stdout
    assert "Largest train.per_device_train_batch_size" in done.stdout
    assert "largest train.chunk_bytes on 4 rows" in done.stdout
    tight = hpd("doctor", workspace / "recipe.yaml", "--memory", "1MB")
    assert tight.returncode == 1
    assert "more. Largest train.per_device_train_batch_size none" in tight.stdout
    wrong = hpd("doctor", workspace / "recipe.yaml", "--memory", "much")
    assert wrong.returncode == 2
    assert "such as 24GiB; got 'much'" in wrong.stderr


def test_eval_prints_accuracy_and_writes_answers(workspace):
    student = yaml.safe_load((workspace / "recipe.yaml").read_text())["student"]
    done = hpd(
        "eval",
        student,
        "--data",
        workspace / "problems.jsonl",
        "--max-new-tokens",
        4,
        "--output",
        workspace / "ev",
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert len((workspace / "ev" / "records-exact-match.jsonl").read_text().splitlines()) == 4


def test_methods_lists_the_table():
    from hpd import METHODS

    done = subprocess.run([sys.executable, "-m", "hpd", "methods"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nope.yaml"], "No recipe at nope.yaml"),
        (["train", "recipe.yaml", "train.learningrate=1"], "did you mean 'learning_rate'"),
        (["train", "recipe.yaml", "method=hdp"], "Did you mean 'hpd'"),
        (["train", "recipe.yaml", "data.path=missing.jsonl"], "No dataset at missing.jsonl"),
        (["train", "recipe.yaml", "teacher=."], "has no config.json"),
        (["train", "recipe.yaml", "teacher=./nowhere"], "does not exist"),
        (
            ["train", "recipe.yaml", "teacher=no-such-org/no-such-model"],
            "is not a folder here, and not available from the Hub",
        ),
        (["train", "recipe.yaml", "data.path=empty.jsonl"], "is empty"),
        (["train", "recipe.yaml", "train.max_length=2"], "Every label is masked"),
        (["train", "recipe.yaml", "teacher=other"], "the two tokenizers are different"),
        (["train", "recipe.yaml", "output_dir=student"], "not a run of hpd"),
        (["eval", "./nowhere", "--data", "problems.jsonl"], "does not exist"),
        (["eval", "student", "--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_mistakes_end_with_one_paragraph_and_code_2(workspace, arguments, message):
    (workspace / "empty.jsonl").write_text("")
    if not (workspace / "other").exists():
        other, _ = tiny_pair("llama", workspace / "elsewhere")
        _shuffle_vocabulary(other, workspace / "other")
    if "output_dir=student" not in arguments and arguments[0] == "train" and arguments[1] == "recipe.yaml":
        arguments = [*arguments, "output_dir=bad"]
    done = hpd(*arguments, cwd=workspace)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (workspace / "bad").exists()


def _shuffle_vocabulary(source, target):
    import shutil

    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = [token for token, i in vocab.items() if i in (60, 61)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_help_and_import_are_quick():
    """In seconds of a processor, which other work on the machine does not lengthen as it does the clock's."""
    for command in ([sys.executable, "-c", "import hpd"], [sys.executable, "-m", "hpd", "--help"]):
        seconds = []
        for _ in range(3):
            before = os.times()
            subprocess.run(command, check=True, capture_output=True)
            after = os.times()
            seconds.append(
                after.children_user + after.children_system - before.children_user - before.children_system
            )
        assert min(seconds) < 0.5, command
    probe = (
        "import sys, hpd, hpd.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


@pytest.mark.parametrize("folder", ["", "hpd"])
def test_a_clone_of_the_same_name_beside_is_not_imported(tmp_path, folder):
    """`python -m` and launchers look in the current folder first, where a clone is called as the package
    is."""
    (tmp_path / "hpd" / "runs").mkdir(parents=True)
    (tmp_path / "hpd" / "docs").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "hpd", "--version"],
        cwd=tmp_path / folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hpd ")
