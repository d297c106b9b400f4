"""Trainers without a recipe whose chat template prints today's date: the day of their first step is kept."""

import datetime
import json
import logging

import pytest
from datasets import Dataset
from helpers.trainers import rows
from tiny_models import tiny_pair
from transformers import AutoTokenizer

from hpd import DistillConfig, DistillTrainer
from hpd.config import load_recipe
from hpd.files import write_json
from hpd.teachers import CachedTeacher
from hpd.training.caching import write_cache

DATED = (
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TODAY = datetime.date.today()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folders = tiny_pair("qwen2", tmp_path_factory.mktemp("pair"))
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = DATED
        tokenizer.save_pretrained(folder)
    return folders


def talks():
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows()
    ]


def trainer_of(pair, folder, teacher=None, **options):
    args = DistillConfig(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        max_length=64,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return DistillTrainer(
        str(pair[0]),
        teacher or str(pair[1]),
        method="forward_kl",
        args=args,
        train_dataset=Dataset.from_list(talks()),
        **options,
    )


def printed(trainer):
    """The dates of the prepared rows."""
    texts = [trainer._tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    return {text.split("Today: ")[1].partition("<|im_end|>")[0] for text in texts}


def day_of(folder):
    return json.loads((folder / "date.json").read_text())["date"]


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory):
    """A run that began on a day of 2020."""
    folder = tmp_path_factory.mktemp("python") / "run"
    trainer = trainer_of(pair, folder, processing_class=AutoTokenizer.from_pretrained(pair[0]))
    assert printed(trainer) == {f"{TODAY:%d %b %Y}"}
    assert not (folder / "date.json").exists()
    trainer.train()
    assert day_of(folder) == TODAY.isoformat()
    write_json(folder / "date.json", {"date": "2020-01-02"})
    return folder


def test_a_run_that_goes_on_has_its_first_day(pair, run):
    trainer = trainer_of(pair, run)
    assert printed(trainer) == {"02 Jan 2020"}
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert trainer.state.global_step == 2
    assert day_of(run) == "2020-01-02"


def test_going_on_from_another_folder_is_compared(pair, run, tmp_path, caplog):
    trainer = trainer_of(pair, tmp_path)
    with pytest.raises(ValueError, match="began on 2020-01-02, and the rows here are rendered with"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert not (tmp_path / "date.json").exists()
    (run / "date.json").rename(run / "kept.json")
    try:
        with caplog.at_level(logging.WARNING, logger="hpd"):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    finally:
        (run / "kept.json").rename(run / "date.json")
    assert "has no date.json: rows are rendered with" in caplog.text


def test_a_folder_without_a_checkpoint_holds_no_run(pair, tmp_path):
    write_json(tmp_path / "date.json", {"date": "2020-01-02"})
    assert printed(trainer_of(pair, tmp_path)) == {f"{TODAY:%d %b %Y}"}


def test_the_caller_s_tokenizer_keeps_its_clock_and_files_the_template(pair, run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    trainer = trainer_of(pair, run, processing_class=tokenizer)
    assert tokenizer.chat_template == DATED
    assert f"{TODAY:%d %b %Y}" in tokenizer.apply_chat_template(talks()[0]["prompt"], tokenize=False)
    assert printed(trainer) == {"02 Jan 2020"}
    trainer.save_model(str(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == DATED
    assert AutoTokenizer.from_pretrained(run / "checkpoint-1").chat_template == DATED


def test_a_template_by_path_is_fixed_too(pair, tmp_path):
    (tmp_path / "dated.jinja").write_text(DATED.replace("Today", "Now, Today"))
    args = DistillConfig(
        output_dir=str(tmp_path / "run"),
        chat_template_path=str(tmp_path / "dated.jinja"),
        use_cpu=True,
        report_to="none",
    )
    trainer = DistillTrainer(
        str(pair[0]), str(pair[1]), method="forward_kl", args=args, train_dataset=Dataset.from_list(talks())
    )
    assert "strftime_now" in trainer._tokenizer.undated_chat_template
    assert printed(trainer) == {f"{TODAY:%d %b %Y}"}


def test_rows_are_those_of_a_cache_of_another_day(pair, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks()))
    recipe = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "cache": {"path": str(tmp_path / "cache")},
        "train": {"max_length": 64, "use_cpu": True},
        "output_dir": str(tmp_path / "early"),
    }
    (tmp_path / "early").mkdir()
    write_json(tmp_path / "early" / "date.json", {"date": "2021-03-04"})
    write_cache(load_recipe(recipe))
    assert day_of_cache(tmp_path / "cache") == "2021-03-04"
    trainer = trainer_of(pair, tmp_path / "run", teacher=CachedTeacher(tmp_path / "cache"))
    assert printed(trainer) == {"04 Mar 2021"}


def day_of_cache(folder):
    return json.loads((folder / "cache.json").read_text())["date"]
