"""recipes/paper/: each parses, says what it can and cannot reproduce, has the paper's numbers, and trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.dialogues import DIALOGUES, QUESTIONS, rows
from helpers.recipe_runs import check_mass_outside, check_run
from tiny_models import NUM_TOKENS, tiny_model, tiny_pair
from transformers import AutoTokenizer

from hpd.config import load_recipe
from hpd.config.load import stage_recipes
from hpd.generate import generate
from hpd.training.run import train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes" / "paper").glob("*.yaml"))}
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."

# The paper's numbers, written once more: learning rate, epochs, rows a step, tokens of context, and (math)
# rows. None: the paper does not give it, or it cannot be read, and the recipe's head says so.
PAPER: dict[str, tuple[float | None, int | None, int | None, int, int | None]] = {
    "math_qwen_1.5b": (1e-4, 10, 256, 10_240, 40_000),
    "math_qwen_3b": (8e-5, 10, 256, 10_240, 40_000),
    "math_llama_1b": (8e-5, 10, 256, 10_240, 40_000),
    "math_llama_3b": (5e-5, 10, 256, 10_240, 40_000),
    "math_then_opd": (1e-4, 10, 256, 10_240, 40_000),
    "dialogue": (5e-6, 10, 256, 4_096, None),
    "code_qwen": (None, 10, 256, 4_096, None),
    "code_deepseek": (None, 10, 256, 4_096, None),
    "dpo": (5e-6, 10, 256, 4_096, None),
    "self_distillation": (5e-6, 10, 256, 4_096, None),
    "qwen3_moe": (None, None, None, 20_480, None),
}
PAIRS = {
    "math_qwen_1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", "wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90"),
    "math_qwen_3b": ("Qwen/Qwen2.5-3B-Instruct", "wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90"),
    "math_llama_1b": ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    "math_llama_3b": ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    "math_then_opd": ("Qwen/Qwen2.5-1.5B-Instruct", "wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90"),
    "qwen3_moe": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B-Thinking-2507"),
}
LABELS = {"dialogue_labels": 4_096, "code_labels": 4_096}
GPUS = 8

SYSTEM_PROMPTS = {name: BOXED for name in PAPER if name.startswith(("math", "qwen3"))}
SYSTEM_PROMPTS |= dict.fromkeys(LABELS, "You are a helpful assistant.")


def _rows_a_step(settings: dict[str, Any]) -> int:
    return GPUS * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]


def test_every_recipe_is_in_a_table():
    assert set(RECIPES) == set(PAPER) | set(LABELS)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_says_what_it_can_and_cannot_reproduce(name):
    text = RECIPES[name].read_text(encoding="utf-8")
    assert load_recipe(RECIPES[name]).output_dir == f"runs/paper/{name}"
    head = text[: text.index("\nstudent:")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r"^# Can: .{30,}", head, re.MULTILINE)
    assert re.search(r"^# Cannot: .{30,}", head, re.MULTILINE)
    assert len(text.splitlines()) <= 50
    page = (ROOT / "docs/evidence/paper.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page


@pytest.mark.parametrize("name", PAPER)
def test_the_numbers_are_the_papers(name):
    rate, epochs, batch, context, limit = PAPER[name]
    recipe = load_recipe(RECIPES[name])
    settings = recipe.train
    assert recipe.method == "hpd"
    assert settings["max_length"] == context
    assert (settings["lr_scheduler_type"], settings["lr_scheduler_kwargs"]) == (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
    )
    assert settings["load_best_model_at_end"] is True
    head = RECIPES[name].read_text(encoding="utf-8").partition("\nstudent:")[0]
    for value, given, word in (
        (rate, settings["learning_rate"], "rate"),
        (epochs, settings["num_train_epochs"], "epochs"),
        (batch, _rows_a_step(settings), "batch"),
    ):
        if value is None:
            assert word in head.partition("# Cannot:")[2]
        else:
            assert value == given
    if limit is not None:
        assert recipe.data.limit == limit
        # About 1,560 steps, as the paper says.
        assert limit * epochs // batch in range(1_555, 1_570)
    if name in PAIRS:
        assert (recipe.student.model, recipe.teacher.model) == PAIRS[name]


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_the_teachers_and_of_the_papers_length(name):
    recipe = load_recipe(RECIPES[name])
    assert recipe.generate is not None
    assert recipe.generate.model is None  # the teacher writes
    assert recipe.generate.max_new_tokens == LABELS[name]
    assert recipe.generate.filter == "none"
    readers = [r for r in PAPER if load_recipe(RECIPES[r]).data.path == recipe.generate.output]
    for reader in readers:
        other = load_recipe(RECIPES[reader])
        assert reader == "self_distillation" or other.teacher.model == recipe.teacher.model
        assert f"{name}.yaml" in RECIPES[reader].read_text(encoding="utf-8")
    assert readers


@pytest.mark.parametrize("name", SYSTEM_PROMPTS)
def test_the_system_prompt_is_the_papers(name):
    assert load_recipe(RECIPES[name]).data.system_prompt == SYSTEM_PROMPTS[name]


def test_the_on_policy_stage_is_the_papers():
    offline, opd = stage_recipes(load_recipe(RECIPES["math_then_opd"]))
    alone = load_recipe(RECIPES["math_qwen_1.5b"])
    assert (offline.recipe.train, offline.recipe.data) == (alone.train, alone.data)
    assert opd.recipe.method == "opd"
    assert opd.recipe.train["learning_rate"] == 3e-6
    assert opd.recipe.rollouts is not None
    assert opd.recipe.rollouts.num_rollouts == 4
    assert _rows_a_step(dict(opd.recipe.train)) == 256 == 64 * 4


@pytest.mark.parametrize("name", ["dpo", "self_distillation"])
def test_preferences_are_the_papers(name):
    stages = stage_recipes(load_recipe(RECIPES[name]))
    preferences = [stage for stage in stages if stage.dpo is not None]
    for stage in preferences:
        assert stage.dpo is not None
        settings = stage.recipe.train
        assert stage.dpo.args == {"beta": 0.01}
        assert settings["learning_rate"] == 5e-7
        assert (settings["num_train_epochs"], settings["max_length"]) == (1, 4_096)
        assert _rows_a_step(dict(settings)) == 64
    assert [stage.name for stage in stages] == ["offline", "dpo"]
    assert preferences == stages[1:]


def test_a_round_of_self_distillation_keeps_the_rows_and_follows_the_last_preference_stage():
    """The student starts elsewhere: where it equals its teacher HPD has no gradient."""
    earlier = stage_recipes(load_recipe(RECIPES["dpo"]))
    offline, _ = stage_recipes(load_recipe(RECIPES["self_distillation"]))
    assert offline.recipe.teacher.model == earlier[1].recipe.output_dir
    assert offline.recipe.student == earlier[0].recipe.student
    assert offline.recipe.data == earlier[0].recipe.data
    assert offline.recipe.method == "hpd"


def test_the_preset_goes_into_a_recipe():
    recipe = load_recipe(RECIPES["math_qwen_1.5b"], ["eval=[{task: aime24, preset: paper}]"])
    assert recipe.eval[0].preset == "paper"


# ---- two steps of each kind

OPENR1 = rows(problem=QUESTIONS, messages=DIALOGUES)
LABELED = rows(
    prompt=[dialogue[:1] for dialogue in DIALOGUES], completion=[dialogue[1:] for dialogue in DIALOGUES]
)
WORSE = [[asked, other[1]] for (asked, _), other in zip(DIALOGUES, DIALOGUES[::-1], strict=True)]
PREFERENCES = rows(prompt=QUESTIONS, chosen=DIALOGUES, rejected=WORSE, messages=DIALOGUES)
# Those left out differ from one of these in names and numbers only.
TRAINED = {
    "math_qwen_1.5b": ("qwen2", 320, 328, OPENR1),
    "math_llama_1b": ("llama", NUM_TOKENS, NUM_TOKENS, OPENR1),
    "code_qwen": ("qwen2", 320, 328, LABELED),
    "math_then_opd": ("qwen2", 320, 328, OPENR1),
    "dpo": ("qwen2", 320, 328, LABELED),
    "qwen3_moe": ("qwen3", NUM_TOKENS, NUM_TOKENS, OPENR1),
}


def _write(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def _small(tree: dict[str, Any]) -> None:
    """Sizes of a unit test in the place of the recipe's, here and in its stages."""
    settings = tree.setdefault("train", {})
    settings |= {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if "rollouts" in tree:
        tree["rollouts"]["max_new_tokens"] = 4
        settings["per_device_train_batch_size"] = tree["rollouts"]["num_rollouts"]
    for stage in tree.get("stages", ()):
        _small(stage)


_TWICE = ("math_llama_1b", "code_qwen")  # of the kind of another


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in _TWICE else name for name in TRAINED]
)
def test_it_trains_two_steps_of_each_stage(name, tmp_path):
    architecture, student_vocab, teacher_vocab, data = TRAINED[name]
    student = tiny_model(architecture, tmp_path / "student", vocab=student_vocab)
    family = "qwen3_moe" if architecture == "qwen3" else architecture
    teacher = tiny_model(family, tmp_path / "teacher", vocab=teacher_vocab, role="teacher", seed=1)
    tree = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    _small(tree)
    tree["student"] = str(student)
    tree["teacher"] = str(teacher)
    tree["data"] |= {"path": _write(tmp_path / "rows.jsonl", data), "limit": None, "validation": 0.25}
    for stage in tree.get("stages", ()):
        if "data" in stage:
            stage["data"] |= {"path": _write(tmp_path / "pairs.jsonl", PREFERENCES), "split": "train"}
    tree["train"] |= {"max_length": 192, "bf16": False, "use_cpu": True, "logging_steps": 1}
    tree["output_dir"] = str(tmp_path / "run")
    summary = train(load_recipe(tree))
    if "stages" in tree:
        assert list(summary["stages"]) == [stage["name"] for stage in tree["stages"]]
        assert all(stage["steps"] == 2 for stage in summary["stages"].values())
        return
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    check_run(summary, logs, (student, teacher), tmp_path / "run")
    check_mass_outside(logs, student_vocab, teacher_vocab)


@pytest.mark.parametrize(("name", "reader"), [("dialogue_labels", "dialogue"), ("code_labels", "code_qwen")])
def test_generated_labels_are_read_by_the_recipe_that_trains_on_them(name, reader, tmp_path):
    student, teacher = tiny_pair("qwen2", tmp_path, student_vocab=320, teacher_vocab=328)
    columns = (
        {"instruction": QUESTIONS, "output": QUESTIONS}
        if name == "code_labels"
        else {"prompt": QUESTIONS, "messages": DIALOGUES}
    )
    output = tmp_path / "labels.jsonl"
    common = [f"student={student}", f"teacher={teacher}", f"output_dir={tmp_path / 'run'}"]
    generate(
        load_recipe(
            RECIPES[name],
            [
                *common,
                f"data.path={_write(tmp_path / 'prompts.jsonl', rows(**columns))}",
                "data.split=train",
                f"generate.output={output}",
                "generate.max_new_tokens=8",
                "generate.truncated=keep",
            ],
        )
    )
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(written) == len(QUESTIONS)
    assert all(row["prompt"][0] == {"role": "system", "content": SYSTEM_PROMPTS[name]} for row in written)
    small = ["train.max_steps=1", "train.max_length=192", "train.bf16=false", "train.use_cpu=true"]
    small += ["train.gradient_accumulation_steps=1", "data.validation=0.25", f"data.path={output}"]
    assert train(load_recipe(RECIPES[reader], [*common, *small]))["steps"] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "run")
