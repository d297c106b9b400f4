"""Rows as people have them, and the exact text that carries labels in the trainer's own batch; the dry run
measures the same."""

# ruff: noqa: E501 (a case is a line)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM

from hpd import DistillConfig, DistillTrainer
from hpd.batch import IGNORE_INDEX, TokenBatch
from hpd.config import load_recipe
from hpd.training.plan import plan

SYSTEM = {"role": "system", "content": "be brief"}
ASK, ANSWER = {"role": "user", "content": "say one"}, {"role": "assistant", "content": "one two"}
AGAIN, SECOND = {"role": "user", "content": "say two"}, {"role": "assistant", "content": "two three"}
LONG = "say one: " * 60


class Learned(NamedTuple):
    """A row, its recipe, the text before the first label, and the text that carries labels."""

    row: dict[str, Any]
    learn: str
    before: str | None = None
    data: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    train: dict[str, Any] = {}  # noqa: RUF012


MAPPED = {"columns": {"prompt": "question", "completion": "answer"}}
CHAT = "<|bos|><|im_start|>user\nsay one<|im_end|>\n<|im_start|>assistant\n"
IDS = [1, 20, 21, 3]  # <|bos|>12<|im_end|>
TURNED = "<|bos|><|im_start|>system\nbe brief<|im_end|>\n" + CHAT.removeprefix("<|bos|>")

# fmt: off
CASES: dict[str, Learned] = {
    "mapped columns, others later": Learned({"question": "QQQ", "answer": "AAA", "completion": "CCC", "prompt": "PPP"}, "AAA<|im_end|>", "<|bos|>QQQ", MAPPED),
    "mapped columns, others first": Learned({"prompt": "PPP", "completion": "CCC", "question": "QQQ", "answer": "AAA"}, "AAA<|im_end|>", "<|bos|>QQQ", MAPPED),
    "mapped prompt, another of its name": Learned({"question": "say one: ", "answer": "one two", "prompt": "PPP"}, " one two<|im_end|>", None, MAPPED),
    "mapped text beside messages": Learned({"messages": [ASK, ANSWER], "body": "one"}, "one<|im_end|>", "<|bos|>", {"columns": {"text": "body"}}),
    "messages": Learned({"messages": [ASK, ANSWER]}, "one two<|im_end|>", CHAT),
    "messages, all of them": Learned({"messages": [ASK, ANSWER]}, CHAT.removeprefix("<|bos|>") + "one two<|im_end|>\n", "<|bos|>", {"labels": "all"}),
    "two turns": Learned({"messages": [ASK, ANSWER, AGAIN, SECOND]}, "one two<|im_end|>two three<|im_end|>", CHAT, {"labels": "assistant"}),
    "last of two turns": Learned({"messages": [ASK, ANSWER, AGAIN, SECOND]}, "two three<|im_end|>\n", None, {"labels": "last_turn"}),
    "a turn of weight 0": Learned({"messages": [ASK, {**ANSWER, "weight": 0}, AGAIN, {**SECOND, "weight": 1}]}, "two three<|im_end|>"),
    "a turn that is not to be trained": Learned({"messages": [ASK, ANSWER, AGAIN, {**SECOND, "train": False}]}, "one two<|im_end|>", CHAT),
    "prompt and messages": Learned({"prompt": "say one", "prompt_id": "x", "messages": [ASK, ANSWER]}, "one two<|im_end|>", CHAT),
    "preferences and messages": Learned({"prompt": "say one", "messages": [ASK, ANSWER], "chosen": [ASK, ANSWER], "rejected": [ASK, SECOND]}, "one two<|im_end|>", CHAT),
    "messages as JSON": Learned({"messages": json.dumps([ASK, ANSWER])}, "one two<|im_end|>", CHAT),
    "text that is rendered already": Learned({"text": "<|bos|>say one: one two<|im_end|>\n"}, "say one: one two<|im_end|>", "<|bos|>"),
    "a completion with its end": Learned({"prompt": "<|bos|>say one:", "completion": " one two<|im_end|>"}, " one two<|im_end|>", "<|bos|>say one:"),
    "ShareGPT": Learned({"conversations": [{"from": "human", "value": "say one"}, {"from": "gpt", "value": "one two"}]}, "one two<|im_end|>", CHAT),
    "ShareGPT with a chosen turn": Learned({"conversations": [{"from": "human", "value": "say one"}], "chosen": {"from": "gpt", "value": "one two"}, "rejected": {"from": "gpt", "value": "two"}}, "one two<|im_end|>\n", CHAT),
    "ShareGPT with a system column": Learned({"system": "be brief", "conversations": [{"from": "human", "value": "say one"}, {"from": "gpt", "value": "one two"}]}, "one two<|im_end|>", TURNED),
    "conversations by role": Learned({"conversations": [ASK, ANSWER]}, "one two<|im_end|>", CHAT),
    "pair of messages": Learned({"prompt": [ASK], "completion": [ANSWER]}, "one two<|im_end|>\n", CHAT),
    "pair with a system column": Learned({"system": "be brief", "prompt": "say one", "completion": "one two"}, "one two<|im_end|>\n", TURNED),
    "pair with a history": Learned({"history": [["say two", "two three"]], "prompt": "say one", "completion": "one two"}, "one two<|im_end|>\n", "<|bos|><|im_start|>user\nsay two<|im_end|>\n<|im_start|>assistant\ntwo three<|im_end|>\n" + CHAT.removeprefix("<|bos|>")),
    "alpaca": Learned({"instruction": "add", "input": "one two", "output": "three"}, "three<|im_end|>\n", "<|bos|><|im_start|>user\nadd\none two<|im_end|>\n<|im_start|>assistant\n"),
    "alpaca without an input": Learned({"instruction": "say one", "input": "", "output": "one two", "text": "### say one"}, "one two<|im_end|>\n", CHAT),
    "alpaca as text": Learned({"instruction": "add", "input": "one two", "output": "three"}, "three<|im_end|>", "<|bos|>add\none two\n", {"format": "plain"}),
    "alpaca, mapped": Learned({"instruction": "add", "input": "one two", "output": "three"}, "three<|im_end|>\n", "<|bos|><|im_start|>user\nadd\none two<|im_end|>\n<|im_start|>assistant\n", {"columns": {"prompt": "instruction", "completion": "output"}}),
    "Dolly": Learned({"instruction": "add", "context": "one two", "response": "three", "category": "sums"}, "three<|im_end|>\n", "<|bos|><|im_start|>user\nadd\none two<|im_end|>\n<|im_start|>assistant\n"),
    "chosen and rejected": Learned({"chosen": [ASK, ANSWER], "rejected": [ASK, SECOND]}, "one two<|im_end|>\n", CHAT),
    "prompt beside whole answers": Learned({"prompt": "say one", "chosen": [ASK, ANSWER], "rejected": [ASK, SECOND]}, "one two<|im_end|>\n", CHAT),
    "a good answer": Learned({"prompt": "say one: ", "completion": "one two", "label": True}, " one two<|im_end|>"),
    "text beside a prompt": Learned({"prompt": "say one: ", "text": "say one: one two"}, "say one: one two<|im_end|>", "<|bos|>"),
    "ids": Learned({"input_ids": IDS}, "12<|im_end|>", "<|bos|>"),
    "ids and labels": Learned({"input_ids": IDS, "labels": [-100, -100, 21, 3]}, "2<|im_end|>", "<|bos|>1"),
    "ids and a completion mask": Learned({"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}, "2<|im_end|>", "<|bos|>1"),
    "ids and an assistant mask": Learned({"input_ids": IDS, "assistant_masks": [0, 0, 1, 0]}, "2", "<|bos|>1"),
    "ids with padding": Learned({"input_ids": [0, 0, *IDS], "attention_mask": [0, 0, 1, 1, 1, 1]}, "12<|im_end|>", "<|bos|>"),
    "the end of a long row": Learned({"prompt": LONG, "completion": "one two"}, " one two<|im_end|>", None, {}, {"truncation_mode": "keep_end", "max_length": 32}),
}
# fmt: on


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tiny_pair("llama", folder)
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher")]
    return folder, models


def recipe_for(pair, folder: Path, rows: list[dict[str, Any]], **more: Any):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "student": str(pair[0] / "student"),
        "teacher": str(pair[0] / "teacher"),
        "data": {"path": str(path), **more.pop("data", {})},
        "train": {"max_length": 128, "max_steps": 1, **more.pop("train", {})},
        "output_dir": str(folder / "run"),
        **more,
    }
    return load_recipe(tree)


def learned(trainer: DistillTrainer) -> tuple[str, str]:
    """The text that carries labels in the first batch's first row, and what stands before it."""
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    # The loss reads the labels of the token batch, and counts those of the collated one.
    assert TokenBatch.pop(dict(batch)).labels.tolist() == [
        label for row in batch["labels"].tolist() for label in row if label != IGNORE_INDEX
    ]
    carried = [label for label in labels if label != IGNORE_INDEX]
    # The first token has no position before it, so it is never a label.
    start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    decode = trainer.processing_class.decode
    return decode(carried), decode(ids[:start])


def trainer_for(pair, planned_args, rows, tokenizer) -> DistillTrainer:
    student, teacher = pair[1]
    return DistillTrainer(
        model=student,
        teacher=teacher,
        method="forward_kl",
        args=planned_args,
        train_dataset=rows,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_learned(pair, tmp_path, name):
    case = CASES[name]
    recipe = recipe_for(pair, tmp_path, [case.row] * 2, data=case.data, train=case.train)
    planned = plan(recipe)
    trainer = trainer_for(pair, planned.args, planned.rows.train, planned.tokenizer)
    found, before = learned(trainer)
    assert found == case.learn
    assert case.before is None or before == case.before
    tokens = [sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in trainer.train_dataset]
    # A first token that is the dataset's is counted by the dry run, and is no position of the loss.
    assert planned.lengths.label_tokens - sum(tokens) / len(tokens) in (0, 1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.data and not case.train])
def test_python_reads_the_same_rows(pair, tmp_path, name):
    case = CASES[name]
    args = DistillConfig(
        output_dir=str(tmp_path), max_length=128, max_steps=1, report_to="none", use_cpu=True
    )
    tokenizer = plan(recipe_for(pair, tmp_path, [{"prompt": "a", "completion": "b"}])).tokenizer
    trainer = trainer_for(pair, args, Dataset.from_list([case.row] * 2), tokenizer)
    assert learned(trainer)[0] == case.learn


THINKS = (
    "{{ bos_token }}{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{{ '<|A|>' + c.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|U|>' + c }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|A|><think>\\n' }}{% endif %}"
)
THOUGHT = "<think>\ncount\n</think>\n\none two"


@pytest.mark.parametrize(
    ("row", "labels", "learn"),
    [
        ({"prompt": [ASK], "completion": [{**ANSWER, "content": THOUGHT}]}, "completion", ""),
        ({"messages": [ASK, {**ANSWER, "content": THOUGHT}]}, "completion", ""),
        ({"messages": [ASK, {**ANSWER, "content": THOUGHT}]}, "last_turn", ""),
        (
            {"messages": [ASK, ANSWER, AGAIN, {**SECOND, "content": THOUGHT}]},
            "assistant",
            "one two<|im_end|>",
        ),
    ],
)
def test_a_thought_that_the_template_cuts_is_learned(pair, tmp_path, row, labels, learn):
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKS)
    options = {"data": {"labels": labels}, "train": {"chat_template_path": str(template)}}
    planned = plan(recipe_for(pair, tmp_path, [row] * 2, **options))
    trainer = trainer_for(pair, planned.args, planned.rows.train, planned.tokenizer)
    assert learned(trainer)[0] == f"{learn}count\n</think>\n\none two<|im_end|>"


def test_a_template_without_marks_is_learned_turn_by_turn(pair, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    row = {"messages": [ASK, ANSWER, AGAIN, {**SECOND, "weight": 0}, ASK, ANSWER]}
    for labels in ("completion", "assistant"):
        options = {"data": {"labels": labels}, "train": {"chat_template_path": str(template)}}
        planned = plan(recipe_for(pair, tmp_path, [row] * 2, **options))
        trainer = trainer_for(pair, planned.args, planned.rows.train, planned.tokenizer)
        assert learned(trainer)[0] == "one two<|im_end|>" * 2


def test_a_template_that_renders_turns_anew_is_refused(pair, tmp_path):
    template = tmp_path / "forgets.jinja"
    template.write_text("{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}")
    options = {"train": {"chat_template_path": str(template)}}
    with pytest.raises(ValueError, match="renders turn 1 .*labels: last_turn"):
        plan(recipe_for(pair, tmp_path, [{"messages": [ASK, ANSWER, AGAIN, SECOND]}] * 2, **options))


def test_thoughts_and_tools_reach_the_template(pair, tmp_path):
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{{ bos_token }}{{ tools | tojson if tools }}{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% if m.reasoning_content is defined %}{{ '(' + m.reasoning_content + ')' }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tools = [{"name": "add", "of": {"x": 1}}, {"name": "look", "of": {"y": 2}}]
    rows = [
        {"messages": [ASK, {**ANSWER, "reasoning_content": "count"}], "tools": tools},
        {"messages": [ASK, ANSWER], "tools": None},
    ]
    options = {"train": {"chat_template_path": str(template), "train_sampling_strategy": "sequential"}}
    planned = plan(recipe_for(pair, tmp_path, rows, **options))
    trainer = trainer_for(pair, planned.args, planned.rows.train, planned.tokenizer)
    shown, without = (trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset)
    assert shown == (
        '<|bos|>[{"name": "add", "of": {"x": 1}}, {"name": "look", "of": {"y": 2}}]<user>say one<|im_end|>'
        "<assistant>(count)one two<|im_end|>"
    )
    assert without == "<|bos|><user>say one<|im_end|><assistant>one two<|im_end|>"


def test_columns_without_effect_are_verdicts(pair, tmp_path):
    row = {"prompt": "say one", "messages": [ASK, ANSWER], "prompt_id": "x", "source": "web"}
    found = [v for v in plan(recipe_for(pair, tmp_path, [row])).verdicts if v.topic == "columns"]
    assert [v.level for v in found] == ["warning", "ok"]
    assert "rows are read from messages; prompt may hold" in found[0].text
    assert found[1].text == "not read: prompt_id, source"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "say one: "},
        {"prompt": [ASK]},
        {"messages": [ASK]},
        {"conversations": [{"from": "human", "value": "say one"}]},
    ],
)
def test_prompts_are_enough_where_the_student_writes(pair, tmp_path, row):
    settings = {"per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    options = {"method": "opd", "rollouts": {"max_new_tokens": 4}, "train": settings}
    planned = plan(recipe_for(pair, tmp_path, [row] * 2, **options))
    recipe = planned.recipe
    student, teacher = pair[1]
    trainer = DistillTrainer(
        model=student, teacher=teacher, method="opd", rollouts=recipe.rollouts, args=planned.args,
        train_dataset=planned.rows.train, processing_class=planned.tokenizer,
    )  # fmt: skip
    prompts = [row["prefix"] for row in spied(trainer)]
    chat = CHAT if "prompt" not in row or isinstance(row["prompt"], list) else "<|bos|>say one: "
    assert [trainer.processing_class.decode(ids) for ids in prompts] == [chat] * 2
    with pytest.raises(ValueError, match="Training needs prompt and completion|no assistant message"):
        plan(recipe_for(pair, tmp_path, [row] * 2))


def spied(trainer):
    """Prompts of the rollouts of one training step."""
    seen = []
    make = trainer._make_engine

    def engine():
        made = make()
        generate = made.generate
        made.generate = lambda prompts, *rest: (
            seen.extend({"prefix": ids} for ids in prompts) or generate(prompts, *rest)
        )
        return made

    trainer._step.mixer._make_engine = engine
    trainer.train()
    return seen


def test_rows_of_several_formats_train_together(pair, tmp_path):
    rows = [{"text": "one two"}, {"messages": [ASK, ANSWER]}, {"prompt": "say one: ", "completion": "one"}]
    planned = plan(recipe_for(pair, tmp_path, rows))
    trainer = trainer_for(pair, planned.args, planned.rows.train, planned.tokenizer)
    decode = trainer.processing_class.decode
    carried = [decode([i for i in row["labels"][1:] if i != IGNORE_INDEX]) for row in trainer.train_dataset]
    assert carried == ["one two<|im_end|>", "one two<|im_end|>", " one<|im_end|>"]
