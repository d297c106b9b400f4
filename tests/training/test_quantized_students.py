"""QLoRA: a student whose frozen weights are in 4 or 8 bits, from its recipe to what reads the run."""

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.forked import hpd, start
from helpers.sockets import free_port
from helpers.trainers import rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hpd import DistillConfig, DistillTrainer
from hpd.config import load_recipe
from hpd.config.models import ModelConfig
from hpd.models.load import load_model
from hpd.training.adapting import unfit_for_quantized
from hpd.training.plan import plan
from hpd.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(3, 40)[None]
LORA = {"r": 2, "lora_alpha": 8}
TRAIN = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 0.05,
    "max_length": 64,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory, bnb):
    """A pair, rows, a recipe, and a run with an adapter on 4-bit weights."""
    folder = tmp_path_factory.mktemp("qlora")
    student, teacher = tiny_pair("llama", folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    recipe = {
        "student": {"model": str(student), "quantization": "4bit"},
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl")},
        "lora": LORA,
        "train": TRAIN,
        "output_dir": str(folder / "mine"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = hpd("train", folder / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def said(done) -> str:
    return " ".join((done.stdout + done.stderr).split())


def recipe_with(place, *overrides):
    return load_recipe(place / "recipe.yaml", list(overrides))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def distance(found, expected) -> float:
    """Root mean square of the difference over that of the logits, without what a softmax ignores."""
    found, expected = (side - side.mean(-1, keepdim=True) for side in (found, expected))
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def on_four_bits(place, adapter):
    """What was trained: the adapter on the packed weights, by peft."""
    base = load_model(ModelConfig(model=str(place / "student"), quantization="4bit"), "student")
    return PeftModel.from_pretrained(base, str(adapter))


def test_a_run_leaves_a_float32_adapter_on_the_whole_base(place):
    run = place / "mine"
    tensors = load_file(run / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place / "student"
    )
    assert not (run / "config.json").exists()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["student"]["quantization"] == "4bit"


def test_the_export_is_the_adapter_on_the_whole_base(place, tmp_path):
    done = hpd("export", place / "mine", "--merge", "--output", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert "torch.float32" in said(done)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32))
    base = AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float32)
    before = logits_of(base)
    torch.testing.assert_close(
        merged, logits_of(PeftModel.from_pretrained(base, str(place / "mine"))), rtol=1e-5, atol=2e-5
    )
    # Not what was trained: the difference is of the size of the rounding, which is large in so small a model.
    trained = logits_of(on_four_bits(place, place / "mine"))
    packed = load_model(ModelConfig(model=str(place / "student"), quantization="4bit"), "student")
    rounding = distance(logits_of(packed), before)
    assert 0 < distance(merged, trained) < 2 * rounding


@pytest.mark.slow
def test_eval_reads_a_run(place, tmp_path):
    (tmp_path / "problems.jsonl").write_text(json.dumps({"prompt": "say one:", "answer": "one"}) + "\n")
    done = hpd(
        *("eval", place / "mine", "--tasks", "exact-match", "--data", tmp_path / "problems.jsonl"),
        *("--max-new-tokens", 4, "--output", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "evals.json").is_file()


@pytest.mark.slow
def test_a_run_is_served_as_the_teacher_that_its_folder_is(place, tmp_path):
    refused = hpd("serve-teacher", place / "mine", "--quantization", "4bit")
    assert refused.returncode == 2
    assert "would round it away" in said(refused)
    port, losses = free_port(), []
    server = start("serve-teacher", place / "mine", "--port", port)
    try:
        url = f"http://127.0.0.1:{port}"
        for teacher in (str(place / "mine"), f"{{type: server, protocol: hpd, url: '{url}'}}"):
            run = tmp_path / str(len(losses))
            train(recipe_with(place, f"teacher={teacher}", "method=forward_kl", f"output_dir={run}"))
            lines = (run / "metrics.jsonl").read_text().splitlines()
            losses.append([log["loss"] for log in map(json.loads, lines) if "loss" in log])
    finally:
        server.terminate()
        server.join(60)
    assert losses[0][0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_dry_run_says_what_is_quantized(place):
    verdicts = [v for v in plan(recipe_with(place)).verdicts if v.topic == "quantization"]
    assert [v.level for v in verdicts] == ["ok"]
    # Both layers' projections of the student; not embeddings (tied), norms.
    inside = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    share = inside / (inside + 300 * 32 + 5 * 32)
    assert f"{share:.0%} of the student's weights are held in 4bit" in verdicts[0].text


REFUSED = {
    "no adapter": (["lora=null"], "so nothing would be trained: add lora"),
    "random": (["student.init=random"], "init: random has none worth keeping"),
    "vllm": (
        ["method=opd", "rollouts={engine: vllm}"],
        "vLLM is sent whole weights before it writes",
    ),
    "whole evaluations": (["train.bf16_full_eval=true"], "train.bf16_full_eval casts the whole student"),
    "whole modules": (
        ["lora.modules_to_save=[up_proj]"],
        "lora.modules_to_save names up_proj, whose weights are held in 4bit",
    ),
    "another adapter": (
        ["student.model={run}", "lora.r=4"],
        "would round it away: write a whole model with hpd export",
    ),
    "an adapter and self": (["student.model={run}", "teacher=self"], "or a teacher of type self"),
    "an adapter teacher": (["teacher={{model: '{run}', quantization: 4bit}}"], "would round it away"),
    "bits": (
        ["student.quantization=3bit"],
        "input should be '4bit' or '8bit', got '3bit'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_loading(place, name):
    overrides, message = REFUSED[name]
    filled = [
        text.replace("{{", "{").replace("}}", "}").replace("{run}", str(place / "mine")) for text in overrides
    ]
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(recipe_with(place, *filled, "output_dir=" + str(place / "other"))).require_sound()


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_engines_that_shard_are_refused(place, monkeypatch, variable):
    made = plan(recipe_with(place))
    monkeypatch.setenv(variable, "true")
    assert "cannot shard packed weights" in (unfit_for_quantized(made.args) or "")


def test_mistakes_end_with_code_2(place):
    done = hpd("train", place / "recipe.yaml", "lora=null", f"output_dir={place / 'bad'}")
    assert done.returncode == 2
    assert "nothing would be trained" in said(done)
    assert "Traceback" not in done.stderr
    assert not (place / "bad").exists()


@pytest.mark.slow
def test_the_run_s_adapter_is_trained_further_from_its_own_numbers(place, tmp_path):
    still = recipe_with(
        place, f"student.model={place / 'mine'}", f"output_dir={tmp_path}", "train.learning_rate=0"
    )
    train(still)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (place / "mine", tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_is_the_same_to_the_bit(place, tmp_path):
    for name, steps in (("straight", [4]), ("resumed", [2, 4])):
        for count in steps:
            train(
                recipe_with(
                    place,
                    f"output_dir={tmp_path / name}",
                    f"train.max_steps={count}",
                    "train.save_steps=2",
                    "train.lr_scheduler_type=constant",
                    "lora.lora_dropout=0.1",
                )
            )
    found = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "resumed")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(
        found[0][next(iter(found[0]))],
        load_file(tmp_path / "straight" / "checkpoint-2" / "adapter_model.safetensors")[next(iter(found[0]))],
    )


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_itself_as_teacher_is_the_student_before_training(place, tmp_path, bits):
    train(
        recipe_with(
            place,
            "teacher=self",
            "method=forward_kl",
            f"student.quantization={bits}",
            f"output_dir={tmp_path / 'run'}",
        )
    )
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # In evaluation mode 8-bit layers round what they are given, too.
    assert logs[0]["loss"] == pytest.approx(0, abs=1e-6 if bits == "4bit" else 1e-4)


@pytest.mark.slow
def test_packed_rows_a_head_that_is_adapted_and_on_policy_rows(place, tmp_path):
    cases = {
        "packed": ["train.packing=true"],
        "head": ["lora.target_modules=[q_proj, lm_head]"],
        "whole head": ["lora.modules_to_save=[lm_head]"],
        "checkpointing": ["train.gradient_checkpointing=true"],
        "on-policy": ["method=opd", "rollouts={max_new_tokens: 8}"],
    }
    for name, overrides in cases.items():
        summary = train(recipe_with(place, *overrides, f"output_dir={tmp_path / name}"))
        assert summary["steps"] == 2, name
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert any(t.any() for key, t in tensors.items() if "lora_B" in key), name


@pytest.mark.slow
def test_stages_hand_on_the_whole_weights(place, tmp_path):
    tree = yaml.safe_load((place / "recipe.yaml").read_text())
    dpo = {"pairs": "rollouts"}
    tree["stages"] = [
        {"name": "first"},
        {"name": "second", "method": "forward_kl"},
        {"name": "last", "dpo": dpo},
    ]
    tree |= {"output_dir": str(tmp_path / "run"), "rollouts": None}
    summary = train(load_recipe(tree))
    assert set(summary["stages"]) == {"first", "second", "last"}
    config = json.loads((tmp_path / "run" / "first" / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    for name in ("second", "last"):
        tensors = load_file(tmp_path / "run" / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_a_cache_of_the_run_is_of_the_merged_model(place, tmp_path):
    shared = [
        f"teacher={place / 'mine'}",
        f"cache={{path: {tmp_path / 'cache'}}}",
        f"output_dir={tmp_path / 'a'}",
    ]
    done = hpd("cache", place / "recipe.yaml", *shared)
    assert done.returncode == 0, done.stderr
    losses = []
    for name, kind in (
        ("live", []),
        ("cached", ["teacher.type=cached", f"teacher.path={tmp_path / 'cache'}"]),
    ):
        teacher = [f"teacher.model={place / 'mine'}", *kind]
        train(recipe_with(place, *teacher, f"output_dir={tmp_path / name}"))
        losses.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def quantized(folder, **options):
    kind = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=kind, **options
    )


def python_trainer(place, folder, model, **options):
    args = DistillConfig(
        output_dir=str(folder), report_to="none", save_strategy="no", disable_tqdm=True, **TRAIN
    )
    train_rows = Dataset.from_list(rows())
    return DistillTrainer(
        model, str(place / "teacher"), method="forward_kl", args=args, train_dataset=train_rows, **options
    )


def test_from_python_adapters_stay_as_they_are(place, tmp_path):
    adapted = get_peft_model(quantized(place / "student"), LoraConfig(init_lora_weights=False))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    trainer = python_trainer(place, tmp_path, adapted)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name])
    trainer.evaluate(trainer.train_dataset)
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_from_python_a_fresh_adapter_is_float32(place, tmp_path):
    trainer = python_trainer(place, tmp_path, quantized(place / "student"), peft_config=LoraConfig())
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_from_python_a_quantized_student_needs_an_adapter(place, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give peft_config"):
        python_trainer(place, tmp_path, quantized(place / "student"))
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", None)
    with pytest.raises(ValueError, match="give peft_config"):
        python_trainer(
            place, tmp_path, str(place / "student"), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
