"""Adapters are models: a run with `lora` is evaluated, served, cached, taught, taken further and exported."""

import contextlib
import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.forked import hpd, start
from helpers.sockets import free_port
from peft import PeftModel
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.teachers.cache import read_about

IDS = torch.arange(3, 40)[None]
LORA = {"r": 2, "lora_alpha": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pair, whose heads are padded, rows, a recipe, and a run with an adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    student, teacher = tiny_pair("llama", folder, student_vocab=320, teacher_vocab=320)
    rows = [{"prompt": f"say {i}:", "completion": f" {i} and {i}", "answer": str(i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl")},
        "lora": LORA,
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 0.05,
            "max_length": 64,
        },
        "output_dir": str(folder / "mine"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = hpd("train", folder / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert (folder / "mine" / "adapter_config.json").is_file()
    assert not (folder / "mine" / "config.json").is_file()
    return folder


def said(done) -> str:
    return " ".join((done.stdout + done.stderr).split())


def train(place, *overrides):
    return hpd("train", place / "recipe.yaml", *overrides)


def logits_of(folder, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(IDS).logits


def adapter_logits(place, folder) -> torch.Tensor:
    """By peft alone."""
    base = AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        return model(IDS).logits


def test_export_merges_what_peft_computes(place, tmp_path):
    out = tmp_path / "whole"
    done = hpd("export", place / "mine", "--merge", "--output", out)
    assert done.returncode == 0, done.stderr
    assert f"next: hpd chat {out}" in done.stdout
    expected = adapter_logits(place, place / "mine")
    assert (logits_of(place / "student") - expected).abs().max() > 0.05
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-5, atol=2e-5)
    assert AutoTokenizer.from_pretrained(out)("say 3:")["input_ids"]
    assert not list(tmp_path.glob(".*"))
    again = hpd("export", place / "mine", "--merge", "--output", out)
    assert again.returncode == 2
    assert "not an empty folder" in said(again)


def test_export_rounds_once(place, tmp_path):
    done = hpd("export", place / "mine", "--merge", "--output", tmp_path / "low", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert hpd("export", place / "mine", "--merge", "--output", tmp_path / "full").returncode == 0
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "low", dtype="auto").state_dict()
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto").state_dict()
    assert {tensor.dtype for tensor in low.values()} == {torch.bfloat16}
    assert all(torch.equal(low[name], full[name].bfloat16()) for name in full)


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(place, tmp_path, changes):
    run, out = tmp_path / "run", tmp_path / "whole"
    settings = yaml.safe_dump({**LORA, **changes}, default_flow_style=True).strip()
    done = train(place, f"lora={settings}", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    assert hpd("export", run, "--merge", "--output", out).returncode == 0
    torch.testing.assert_close(logits_of(out), adapter_logits(place, run), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{place}/mine", "--output", "{tmp}/x"], "give one of them"),
        (["{place}/student", "--merge", "--output", "{tmp}/x"], "nothing to merge"),
        (["{place}/nothing", "--merge", "--output", "{tmp}/x"], "does not exist"),
        (["{place}/mine", "--merge", "--output", "{tmp}/x", "--dtype", "int8"], "dtype must be"),
        (["{place}/mine", "--merge", "--output", "{place}/student"], "not an empty folder"),
    ],
)
def test_export_refuses(place, tmp_path, arguments, message):
    done = hpd("export", *(a.format(place=place, tmp=tmp_path) for a in arguments))
    assert done.returncode == 2
    assert message in said(done)
    assert not (tmp_path / "x").exists()


def test_eval_answers_as_the_merged_model(place, tmp_path):
    assert hpd("export", place / "mine", "--merge", "--output", tmp_path / "whole").returncode == 0
    answers = {}
    for name, model in (("adapter", place / "mine"), ("whole", tmp_path / "whole")):
        done = hpd(
            *("eval", model, "--tasks", "exact-match", "--data", place / "rows.jsonl"),
            *("--max-new-tokens", 8, "--output", tmp_path / name),
        )
        assert done.returncode == 0, done.stderr
        records = (tmp_path / name / "records-exact-match.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line)["text"] for line in records]
    assert answers["adapter"] == answers["whole"]


def first_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_the_next_student_and_its_shape(place, tmp_path):
    assert hpd("export", place / "mine", "--merge", "--output", tmp_path / "whole").returncode == 0
    cases = {
        "full": (place / "mine", ["lora=null"], "all weights are trained"),
        "further": (place / "mine", [], "trained further"),
        "new": (place / "mine", ["lora={r: 4}"], "a new one is trained on the result"),
        "whole": (tmp_path / "whole", [], None),
    }
    for name, (student, changes, verdict) in cases.items():
        changes = [f"student={student}", f"output_dir={tmp_path / 'runs' / name}", *changes]
        if verdict is not None:
            assert verdict in said(train(place, *changes, "--dry-run"))
        done = train(place, *changes)
        assert done.returncode == 0, done.stderr
    losses = {name: first_loss(tmp_path / "runs" / name) for name in cases}
    assert losses == pytest.approx(dict.fromkeys(cases, losses["whole"]), abs=2e-6)
    bases = {
        name: json.loads((tmp_path / "runs" / name / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        for name in ("further", "new")
    }
    assert bases == {"further": str(place / "student"), "new": str(place / "mine")}
    # The adapter that went on is another one now, on the base of the first.
    assert (
        adapter_logits(place, tmp_path / "runs" / "further") - adapter_logits(place, place / "mine")
    ).abs().max() > 1e-3
    # The one on top counts from the merged model.
    assert hpd("export", tmp_path / "runs" / "new", "--merge", "--output", tmp_path / "both").returncode == 0
    on_top = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32),
        str(tmp_path / "runs" / "new"),
    )
    with torch.no_grad():
        expected = on_top.eval()(IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "both"), expected, rtol=1e-5, atol=2e-5)


def test_self_is_the_student_before_training(place, tmp_path):
    """With the adapter switched off, the base would be the teacher, and the first KL would not be zero."""
    done = train(
        place,
        f"student={place / 'mine'}",
        "teacher=self",
        "method=forward_kl",
        "train.metric_stride=1",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["forward_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_as_teacher_live_cached_and_writing(place, tmp_path):
    assert hpd("export", place / "mine", "--merge", "--output", tmp_path / "whole").returncode == 0
    for name, teacher in (("adapter", place / "mine"), ("whole", tmp_path / "whole")):
        done = train(place, f"teacher={teacher}", f"output_dir={tmp_path / 'runs' / name}")
        assert done.returncode == 0, done.stderr
    losses = [first_loss(tmp_path / "runs" / name) for name in ("adapter", "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)

    cached = [f"teacher={place / 'mine'}", f"cache={{path: {tmp_path / 'cache'}}}"]
    done = hpd("cache", place / "recipe.yaml", *cached)
    assert done.returncode == 0, done.stderr
    about = read_about(str(tmp_path / "cache"))
    assert about["fingerprint"]["teacher"]["adapter"]
    done = train(
        place,
        f"teacher={{type: cached, path: {tmp_path / 'cache'}, model: {place / 'mine'}}}",
        f"output_dir={tmp_path / 'cached'}",
    )
    assert done.returncode == 0, done.stderr
    assert first_loss(tmp_path / "cached") == pytest.approx(losses[1], abs=2e-6)
    base = train(
        place,
        f"teacher={{type: cached, path: {tmp_path / 'cache'}, model: {place / 'student'}}}",
        f"output_dir={tmp_path / 'other'}",
    )
    assert base.returncode == 2
    assert "another teacher" in said(base)

    done = hpd(
        "generate",
        place / "recipe.yaml",
        f"generate={{model: {place / 'mine'}, output: {tmp_path / 'out.jsonl'}, max_new_tokens: 4, "
        "truncated: keep}",
    )
    assert done.returncode == 0, done.stderr
    assert hpd("doctor", place / "recipe.yaml", f"teacher={place / 'mine'}").returncode == 0


def broken(place, folder, **changes) -> Path:
    shutil.copytree(place / "mine", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, "'/nowhere/base', the base_model_name_or_path"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"peft_type": "PROMPT_TUNING"}, "cannot be merged"),
        ({"task_type": "SEQ_CLS"}, "not for a causal language model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "names code to import and is refused"),
        ({"target_modules": ["no_such_layer"]}, "cannot be put on that model"),
        ({"r": 3}, "size mismatch"),
        ({"target_modules": ["q_proj", "k_proj", "lm_head"]}, "lacks"),
    ],
)
def test_a_bad_adapter_is_one_sentence(place, tmp_path, changes, message):
    folder = broken(place, tmp_path / "bad", **changes)
    done = hpd("eval", folder, "--tasks", "exact-match", "--data", place / "rows.jsonl")
    assert done.returncode == 2
    assert message in said(done)
    assert "Traceback" not in done.stderr


def test_what_an_adapter_cannot_be(place, tmp_path):
    for changes, message in (
        ([f"student={{model: {place / 'mine'}, init: random}}", "lora=null"], "name the base model instead"),
        (["student.init=random"], "kept nowhere"),
    ):
        done = train(place, *changes, f"output_dir={tmp_path / 'no'}")
        assert done.returncode == 2
        assert message in said(done)
        assert not (tmp_path / "no").exists()
    shutil.copytree(place / "mine", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    done = hpd("eval", tmp_path / "empty", "--tasks", "exact-match", "--data", place / "rows.jsonl")
    assert "adapter without weights" in said(done)


def test_an_adapter_without_tokenizer_takes_that_of_its_base(place, tmp_path):
    shutil.copytree(place / "mine", tmp_path / "bare")
    for file in (tmp_path / "bare").iterdir():
        if not file.name.startswith("adapter_") and file.is_file():
            file.unlink()
    done = hpd("export", tmp_path / "bare", "--merge", "--output", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        logits_of(tmp_path / "whole"), adapter_logits(place, place / "mine"), rtol=1e-5, atol=2e-5
    )


def test_it_is_served(place, tmp_path):
    """Scores over HTTP are those of the adapter beside the student."""
    live = train(place, f"teacher={place / 'mine'}", f"output_dir={tmp_path / 'live'}")
    assert live.returncode == 0, live.stderr
    port = free_port()
    server = start("serve-teacher", place / "mine", "--port", port, "--dtype", "float32")
    try:
        wait_for_port(port)
        teacher = f"teacher={{type: server, protocol: hpd, url: 'http://127.0.0.1:{port}', dtype: float32}}"
        done = train(place, teacher, f"output_dir={tmp_path / 'served'}")
        assert done.returncode == 0, done.stderr
    finally:
        server.kill()
        server.join()
    assert first_loss(tmp_path / "served") == pytest.approx(first_loss(tmp_path / "live"), abs=2e-5)


def wait_for_port(port):
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on {port}")
