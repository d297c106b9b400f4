"""The cost model against measured peaks, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hpd import DistillConfig
from hpd.config import load_recipe
from hpd.estimate.cost import flops_per_token
from hpd.estimate.fake_models import backbone
from hpd.estimate.live_bytes import LiveBytes
from hpd.estimate.memory import StepMemory
from hpd.estimate.sizes import parse_bytes, tensor_bytes
from hpd.losses import Head, Scores, chunked, reweighted_nll
from hpd.losses.operator import default_chunk_bytes
from hpd.losses.products import chunk_rows
from hpd.methods import method_terms, name_terms
from hpd.models.load import load_model
from hpd.training.adapting import lora_of
from hpd.training.plan import plan

MIB = 2**20
IDS = [[5 + (7 * i + j) % 200 for j in range(320)] for i in range(24)]
ROWS = [{"input_ids": ids, "labels": [-100] * 80 + ids[80:]} for ids in IDS]

# Three owners of the peak: weights and states, activations, the operator's chunks.
SIZES = {
    "weights": (
        {"hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 4096},
        {"batch": 1},
    ),
    "activations": (
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1024},
        {"batch": 8},
    ),
    "logits": (
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 65536},
        {"batch": 2},
    ),
}

MEASURE = """
import sys
from pathlib import Path
import torch
from transformers import TrainerCallback

from hpd.config import load_recipe
from hpd.models import load_model
from hpd.training.folder import RunFolder
from hpd.teachers import ModelTeacher
from hpd.progress import Progress
from hpd.training.plan import plan
from hpd.training.single import make_trainer

torch.set_num_threads(1)

def resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])

class Peak(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(resident("VmHWM") - baseline, flush=True)

recipe = load_recipe(sys.argv[1])
planned = plan(recipe)
torch.ones(64, 64, requires_grad=True).mm(torch.ones(64, 64)).sum().backward()
baseline = resident("VmRSS")
student, teacher = load_model(recipe.student, "student"), ModelTeacher(load_model(recipe.teacher, "teacher"))
trainer = make_trainer(planned, student, teacher, RunFolder(recipe), Progress())
trainer.add_callback(Peak())
trainer.train()
"""


def write_recipe(folder: Path, shape, batch=1, **train) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer = tiny_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    common = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, **special}
    for role, layers in (("student", shape["num_hidden_layers"]), ("teacher", 2)):
        config = LlamaConfig(
            **{**shape, "num_hidden_layers": layers}, **common, architectures=["LlamaForCausalLM"]
        )
        config.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {
        "student": {"model": str(folder / "student"), "init": "random"},
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": batch,
            "gradient_checkpointing": False,
            "max_length": 320,
            "save_strategy": "no",
            "use_cpu": True,
            **train,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_predicted_memory_is_within_a_fifth_of_the_measured_peak(tmp_path, size):
    shape, options = SIZES[size]
    recipe = write_recipe(tmp_path, shape, **options)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(recipe)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.split()[-1])
    predicted = StepMemory(plan(load_recipe(recipe))).predict()
    print(size, measured / MIB, predicted.total / MIB)
    assert predicted.total == pytest.approx(measured, rel=0.2), {
        k: v / MIB for k, v in predicted._asdict().items()
    }


def step_memory(tmp_path, **train):
    return StepMemory(plan(load_recipe(write_recipe(tmp_path, SIZES["activations"][0], batch=2, **train))))


def test_the_largest_batch_and_chunk_fit_and_one_more_does_not(tmp_path):
    step = step_memory(tmp_path)
    budget = 150 * MIB
    fit = step.fit(budget)
    assert fit.rows > 1
    assert step.predict(batch=fit.rows).total <= budget < step.predict(batch=fit.rows + 1).total
    positions = step.label_positions(2)
    assert positions == 2 * 240
    assert fit.chunk_bytes == positions * step.row_bytes
    tight = step.predict(chunk_bytes=100 * step.row_bytes).total
    assert step.predict(chunk_bytes=step.fit(tight).chunk_bytes).total <= tight
    assert 0 < step.fit(tight).chunk_bytes < fit.chunk_bytes
    assert step.fit(MIB) == (0, 0)


def test_a_teacher_that_no_step_asks_takes_its_weights_alone(tmp_path):
    file = write_recipe(tmp_path, SIZES["activations"][0], batch=2)
    asked, unasked = (
        StepMemory(plan(load_recipe(file, ["method=sft", f"train.metric_stride={stride}"]))).predict()
        for stride in (16, 0)
    )
    assert asked.teacher_forward > 0 == unasked.teacher_forward
    assert asked._replace(teacher_forward=0) == unasked


def test_the_teachers_own_rows_are_counted(tmp_path):
    """A prompt for the teacher alone: its row is as much longer as the prompt is, in memory and FLOPs, and
    nothing of the student's changes."""
    file = write_recipe(tmp_path / "a", SIZES["activations"][0], batch=4)
    texts = [{"prompt": f"say {i}:", "completion": " one two three" * (1 + i % 3)} for i in range(12)]
    (tmp_path / "a" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    hint = "one two three four five six seven eight nine ten " * 8
    plain, own = (plan(load_recipe(file, change)) for change in ([], [f"teacher.prompt={hint}{{prompt}}"]))
    assert plain.lengths.teacher is None
    lengths = own.lengths
    assert lengths.teacher is not None
    more = len(tiny_tokenizer()(hint)["input_ids"])
    assert lengths.teacher.tokens - lengths.tokens == pytest.approx(more, abs=2)
    assert lengths.teacher.label_tokens == lengths.label_tokens
    price = flops_per_token(own.recipe)
    added = price.of_row(lengths) - price.of_row(plain.lengths)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "teacher")
    inner = sum(p.numel() for p in teacher.parameters()) - teacher.get_input_embeddings().weight.numel()
    assert added == pytest.approx(2 * inner * (lengths.teacher.tokens - lengths.tokens), rel=1e-6)
    memory, wider = StepMemory(plain), StepMemory(own)
    assert wider.teacher_tokens > wider.tokens == memory.tokens == memory.teacher_tokens
    before, after = memory.predict(), wider.predict()
    assert after.teacher_forward > before.teacher_forward
    assert after._replace(teacher_forward=0) == before._replace(teacher_forward=0)


def test_what_saves_memory_is_seen(tmp_path):
    plain = step_memory(tmp_path / "a").predict()
    checkpointed = step_memory(tmp_path / "b", gradient_checkpointing=True).predict()
    half = step_memory(tmp_path / "c", bf16=True).predict()
    accumulated = step_memory(tmp_path / "d", gradient_accumulation_steps=2).predict()
    adafactor = step_memory(tmp_path / "e", optim="adafactor").predict()
    assert checkpointed.activations < 0.4 * plain.activations
    assert half.activations < 0.8 * plain.activations
    assert accumulated.activations == plain.activations + plain.student
    assert plain.optimizer == 2 * plain.student
    assert adafactor.optimizer < 0.1 * plain.optimizer
    eager = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    eager["student"]["attn_implementation"] = "eager"
    assert StepMemory(plan(load_recipe(eager))).predict().activations > 1.2 * plain.activations
    student = eager["student"]["model"]
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student)).save_pretrained(student)
    adapted = ["lora={r: 4}", "student.init=pretrained"]
    lora = StepMemory(plan(load_recipe(tmp_path / "a" / "recipe.yaml", adapted))).predict()
    assert lora.optimizer < 0.2 * plain.optimizer
    assert lora.student > plain.student
    itself = ["teacher=self", "student.init=pretrained", f"student.model={tmp_path / 'a' / 'teacher'}"]
    assert StepMemory(plan(load_recipe(tmp_path / "a" / "recipe.yaml", itself))).predict().teacher > 0


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_quantized_weights_are_counted_as_they_are_loaded(tmp_path, bits):
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    file = write_recipe(tmp_path, SIZES["activations"][0], batch=2)
    student = str(tmp_path / "student")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student)).save_pretrained(student)
    kind = f"quantization: {bits}"
    overrides = [
        f"student={{model: {student}, {kind}}}",
        f"teacher={{model: {tmp_path / 'teacher'}, {kind}}}",
        "lora={r: 4}",
    ]
    recipe = load_recipe(file, overrides)
    step = StepMemory(plan(recipe))
    predicted = step.predict()

    def held(model):
        scales = [
            module.weight.quant_state.absmax if bits == "4bit" else module.weight.SCB
            for module in model.modules()
            if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        ]
        return tensor_bytes([*model.parameters(), *scales])

    loaded = {role: load_model(getattr(recipe, role), role) for role in ("student", "teacher")}
    adapted = get_peft_model(loaded["student"], lora_of(recipe)).train()
    assert predicted.teacher == held(loaded["teacher"])
    assert predicted.student == held(adapted)
    whole = StepMemory(plan(load_recipe(file, ["student.init=pretrained", "lora={r: 4}"]))).predict()
    assert predicted.student < 0.6 * whole.student
    with LiveBytes() as live:
        hidden = backbone(adapted, 2, step.tokens, autocast=False)
        activations = live.now
        hidden.sum().backward()
    assert predicted.activations == pytest.approx(activations, rel=0.05)
    assert predicted.backward == pytest.approx(live.peak, rel=0.3)


@pytest.mark.parametrize(
    "method", ["hpd", "forward_kl", pytest.param("generalized_jsd", marks=pytest.mark.slow)]
)
def test_the_operator_holds_gradients_and_two_chunks(method):
    """SmolLM2's head: at most a tenth beside the gradients of head and hidden states and two chunks of
    logits."""
    tokens, width, vocab = 768, 576, 49152
    hidden, weight = (
        torch.randn(tokens, width, requires_grad=True),
        torch.zeros(vocab, width, requires_grad=True),
    )
    teacher = Scores(torch.randn(tokens, width), Head(torch.zeros(vocab, width)))
    rows = chunk_rows(tokens, 4 * vocab, default_chunk_bytes("cpu"))
    terms = name_terms(method_terms(method, {}))
    chunked._cpu_scratch.clear()
    with LiveBytes() as live:
        loss, _ = reweighted_nll(
            Scores(hidden, Head(weight)),
            teacher,
            torch.zeros(tokens, dtype=torch.long),
            terms,
            uniforms=torch.zeros(tokens, 1),
            metric_stride=DistillConfig.metric_stride,
        )
        loss.backward()
    bound = 4 * (weight.numel() + hidden.numel() + 2 * rows * vocab)
    assert bound < live.peak <= 1.1 * bound


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("500 MB", 500_000_000), ("1.5tib", 1.5 * 2**40), ("7", 7)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "24 gallons", "-3GiB", "0GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="such as 24GiB; got"):
        parse_bytes(text)
