"""The cost model against measured peaks, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig

from hpd.config import load_recipe
from hpd.memory import StepMemory, parse_bytes
from hpd.train import plan

MIB = 2**20
ROWS = [{"input_ids": [5 + (7 * i + j) % 200 for j in range(320)], "labels": [-100] * 80 + [5 + (7 * i + j) % 200 for j in range(80, 320)]} for i in range(24)]

# Three owners of the peak: weights and states, activations, the operator's chunks.
SIZES = {
    "weights": ({"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4096}, {"batch": 1}),
    "activations": ({"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1024}, {"batch": 8}),
    "logits": ({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 65536}, {"batch": 2}),
}

MEASURE = '''
import sys
from pathlib import Path
import torch
from transformers import TrainerCallback

from hpd.config import load_recipe
from hpd.models import load_model
from hpd.teachers import ModelTeacher
from hpd.train import plan, _trainer
from hpd.runs import RunFolder
from hpd.train import Progress

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
trainer = _trainer(planned, student, teacher, RunFolder(recipe), Progress())
trainer.add_callback(Peak())
trainer.train()
'''


def write_recipe(folder: Path, shape, batch=1, **train) -> Path:
    tokenizer = tiny_tokenizer()
    common = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_token_id,
              "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    for role, layers in (("student", shape["num_hidden_layers"]), ("teacher", 2)):
        config = LlamaConfig(**{**shape, "num_hidden_layers": layers}, **common, architectures=["LlamaForCausalLM"])
        config.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    if not (folder / "teacher" / "model.safetensors").exists():
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {
        "student": {"model": str(folder / "student"), "init": "random"}, "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {"max_steps": 2, "per_device_train_batch_size": batch, "gradient_checkpointing": False, "max_length": 320,
                  "save_strategy": "no", "use_cpu": True, **train},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("size", SIZES)
def test_predicted_memory_is_within_a_fifth_of_the_measured_peak(tmp_path, size):
    shape, options = SIZES[size]
    recipe = write_recipe(tmp_path, shape, **options)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(recipe)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.split()[-1])
    predicted = StepMemory(plan(load_recipe(recipe))).predict()
    print(size, measured / MIB, predicted.total / MIB, {k: v / MIB for k, v in predicted._asdict().items()})
    assert predicted.total == pytest.approx(measured, rel=0.2), {k: v / MIB for k, v in predicted._asdict().items()}
