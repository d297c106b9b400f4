"""What a resumed run says: nothing that is harmless and alarms."""

import json

from helpers.trainers import rows
from tiny_models import tiny_pair
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hpd.config import load_recipe
from hpd.progress import Progress
from hpd.training.run import train


class Said(Progress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_a_tied_head_that_the_file_does_not_repeat_is_no_missing_key(tmp_path):
    student, teacher = tiny_pair("llama", tmp_path / "pair")
    config = AutoConfig.from_pretrained(student)
    config.tie_word_embeddings = True
    tied = tmp_path / "tied"
    AutoModelForCausalLM.from_config(config).save_pretrained(tied)
    AutoTokenizer.from_pretrained(student).save_pretrained(tied)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    tree = {
        "student": str(tied),
        "teacher": str(teacher),
        "data": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 1, "save_steps": 1, "use_cpu": True},
    }
    train(load_recipe(tree))
    tree["train"]["max_steps"] = 2
    said = Said()
    summary = train(load_recipe(tree), progress=said)
    assert summary["steps"] == 2
    assert not [line for line in said.lines if "warning" in line or "missing" in line]
