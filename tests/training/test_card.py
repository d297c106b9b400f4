"""The model card: metadata that the Hub reads, true names, and nothing of this machine."""

import yaml
from helpers.trainers import make_trainer, rows
from tiny_models import tiny_pair

from hpd.config import load_recipe
from hpd.training.card import card_of

RECIPE = {
    "student": "org/student-1b",
    "teacher": "/home/me/models/big-teacher",
    "data": "org/some-data",
    "method": "akl",
    "output_dir": "/home/me/runs/mine",
}


def card(**changes):
    recipe = load_recipe({**RECIPE, **changes})
    text = card_of(
        recipe, "mine", {"method": "akl", "steps": 3}, yaml.safe_dump({**RECIPE, **changes})
    ).text()
    return yaml.safe_load(text.split("---")[1]), text


def test_hub_ids_are_metadata_and_local_folders_are_not():
    metadata, text = card()
    assert metadata["base_model"] == "org/student-1b"
    assert metadata["datasets"] == ["org/some-data"]
    assert (metadata["pipeline_tag"], metadata["library_name"]) == ("text-generation", "transformers")
    assert "distilled from big-teacher with the method `akl`" in text
    assert "/home/me" not in text
    metadata, text = card(student="/home/me/small", data="/home/me/rows.jsonl", lora={"r": 4})
    assert "base_model" not in metadata
    assert "datasets" not in metadata
    assert metadata["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in text
    assert "/home/me" not in text


def test_the_license_is_that_of_the_base_models_card(tmp_path):
    assert "license" not in card()[0]
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# small\n")
    assert card(student=str(tmp_path))[0]["license"] == "apache-2.0"


def test_the_snippet_is_python():
    for lora in (None, {"r": 4}):
        compile(card(lora=lora)[1].split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_trainer_of_python_writes_its_own_method_and_teacher(tmp_path):
    pair = tiny_pair("llama", tmp_path / "pair")
    trainer = make_trainer(pair, tmp_path / "run", method="forward_kl", train=rows(8))
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "`forward_kl`" in text
    assert "distilled from teacher" in text
    assert "None" not in text
    assert str(tmp_path) not in text
