"""The rendered row beside the row: what templates cut, strip and add, and what a run makes of it."""

import datetime
import json
import shutil
from importlib import resources

import pytest
import yaml
from datasets import Dataset
from tiny_models import tiny_pair, tiny_tokenizer
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, GPT2Config
from typer.testing import CliRunner

from hpd.cli import app
from hpd.config import load_recipe
from hpd.data import measure
from hpd.data.context import check_context, context_of
from hpd.data.dates import own_template, set_date
from hpd.data.rendered import compare_rows
from hpd.data.rendering import render
from hpd.data.repair import repaired
from hpd.data.shown import row_as_learned
from hpd.progress import Progress
from hpd.teachers.cache import write_json
from hpd.training.caching import write_cache
from hpd.training.plan import plan
from hpd.training.run import train

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}"
    "{% else %}{% set c = m['content'] %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<Assistant>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)
EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
DATED = (
    "{{ bos_token }}{% set day = strftime_now('%d %b %Y') %}"
    "{{ '<|im_start|>system\nToday Date: ' + day + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a kind helper of all.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

USER = {"role": "user", "content": "say one"}
THOUGHT = "<think>\ncount\n</think>\n\none two"


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def pair(content, **more):
    return {"prompt": [USER], "completion": [answer(content, **more)]}


def tokenizer_of(template=None, bos=True):
    tokenizer = tiny_tokenizer(bos)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def learned(rendered, tokenizer):
    """The text of the labels; the first token is none, since nothing predicts it."""
    labels = list(zip(rendered.ids, rendered.mask, strict=True))[1:]
    return tokenizer.decode([token for token, bit in labels if bit])


def topics(row, tokenizer, labels="completion", ends=None):
    found = compare_rows([row], tokenizer, labels, ends)
    return {v.topic: v.text for v in found if v.level == "warning"}


def save_pair(folder, template=None):
    student, teacher = tiny_pair("llama", folder)
    for place in (student, teacher) if template else ():
        (place / "chat_template.jinja").write_text(template)
    return student, teacher


def recipe_of(tmp_path, rows, template=None, data=None, train=None, name="run", **more):
    folder = tmp_path / "pair"
    if not folder.exists():
        save_pair(folder, template)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / f"{name}.yaml"
    content = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "method": "forward_kl",
        "data": {"path": str(tmp_path / "rows.jsonl"), **(data or {})},
        "train": {"max_steps": 1, "max_length": 128, "per_device_train_batch_size": 2, **(train or {})},
        "output_dir": str(tmp_path / name),
        **more,
    }
    file.write_text(yaml.safe_dump(content))
    return file


def rows_that_train(trainer_rows, tokenizer):
    """The learned text of each row that a trainer has prepared."""
    return [tokenizer.decode([i for i in row["labels"][1:] if i != -100]) for row in trainer_rows]


@pytest.mark.parametrize("labels", ["completion", "last_turn"])
def test_thoughts_that_a_template_cuts_are_learned(labels):
    tokenizer = tokenizer_of(R1)
    rendered = render(pair(THOUGHT), tokenizer, labels)
    assert learned(rendered, tokenizer) == "count\n</think>\n\none two<|im_end|>"
    assert rendered.text.startswith(rendered.prompt)
    assert "cuts the beginning" in topics(pair(THOUGHT), tokenizer)["thoughts"]


def test_thoughts_of_a_whole_conversation():
    tokenizer = tokenizer_of(R1)
    turns = [USER, answer(THOUGHT), USER, answer(THOUGHT.replace("count", "again"))]
    found = topics({"messages": turns}, tokenizer)
    assert "again" in found["thoughts"]
    assert "count" in found["dropped text"]
    rendered = render({"messages": turns}, tokenizer, "completion")
    assert "again" in rendered.text
    earlier = compare_rows([{"prompt": turns[:-1], "completion": turns[-1:]}], tokenizer, "completion")
    assert [v.level for v in earlier if v.topic == "thoughts"] == ["warning", "ok"]


def test_reasoning_in_a_field_that_the_template_does_not_know():
    found = topics(pair("one two", reasoning_content="count slowly"), tokenizer_of())
    assert "count slowly" in found["dropped text"]


def test_an_answer_that_a_template_rewrites_is_not_put_back():
    tokenizer = tokenizer_of("{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}")
    rendered = render(pair("one two"), tokenizer, "completion")
    assert rendered.cut == ""
    assert "ONE TWO" in rendered.text
    found = compare_rows([pair("one two")], tokenizer, "completion")
    assert any("should be learned" in v.text and "'one two'" in v.text for v in found)


def test_a_system_message_without_a_place():
    row = {"prompt": [{"role": "system", "content": "be brief"}, USER], "completion": [answer("one")]}
    assert "system: 'be brief'" in topics(row, tokenizer_of(NO_SYSTEM))["dropped text"]
    assert topics(row, tokenizer_of()) == {}


def test_stripped_answers():
    assert "strips" in topics(pair("  one two\n"), tokenizer_of(TRIMMED))["trimmed text"]
    assert topics(pair("one two"), tokenizer_of(TRIMMED)) == {}
    assert topics(pair("  one two\n"), tokenizer_of()) == {}


def test_empty_thoughts_are_named_unless_the_prompt_has_them():
    tokenizer = tokenizer_of(EMPTY_THOUGHT)
    assert "empty thought" in topics(pair("one two"), tokenizer)["added text"]
    assert "empty thought" in topics({"messages": [USER, answer("one")]}, tokenizer)["added text"]
    assert topics(pair(THOUGHT), tokenizer) == {}
    asked = {**pair("one two"), "chat_template_kwargs": {"enable_thinking": False}}
    assert topics(asked, tokenizer) == {}
    assert learned(render(asked, tokenizer, "completion"), tokenizer) == "one two<|im_end|>\n"


def test_a_default_system_prompt():
    tokenizer = tokenizer_of(DEFAULT_SYSTEM)
    assert "You are a kind helper of all." in topics(pair("one"), tokenizer)["added text"]
    own = {"prompt": [{"role": "system", "content": "be brief"}, USER], "completion": [answer("one")]}
    assert topics(own, tokenizer) == {}


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "deepseek_r1_distill", "llama3_2", "gemma", "gptoss"])
def test_templates_that_come_with_trl(name):
    tokenizer = tokenizer_of(template_of_trl(name))
    set_date(tokenizer, datetime.date(2025, 3, 7))
    expected = {
        "qwen2_5": {"added text"},
        "qwen3": {"added text"},
        "deepseek_r1_distill": {"prompt and completion"},
        "llama3_2": {"added text", "date"},
        "gemma": set(),
        "gptoss": {"added text", "date"},
    }
    assert topics(pair("one two"), tokenizer).keys() == expected[name]


def template_of_trl(name):
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3", "qwen3", "lfm2_2_5"])
def test_thoughts_of_several_turns_leave_the_labels_in_the_answers(name):
    """TRL's template with marks may print thoughts that the model's own leaves out."""
    tokenizer = tokenizer_of(template_of_trl(name))
    turns = [USER, answer(THOUGHT), {"role": "user", "content": "say two"}, answer(THOUGHT)]
    rendered = render({"messages": turns}, tokenizer, "completion")
    shown = learned(rendered, tokenizer)
    assert shown.count("one two") == 2
    assert "say" not in shown
    assert shown.endswith(THOUGHT[8:] + shown.rpartition("one two")[2])
    assert tokenizer.decode(rendered.ids) == rendered.text


ALPHA, BETA = {"role": "user", "content": "ask alpha"}, {"role": "user", "content": "ask beta"}
REPLY, THINKING = "reply gamma", "<think>\nmull\n</think>\n\nreply gamma"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = [ALPHA, answer("", tool_calls=[CALL]), {"role": "tool", "content": "ask tool", "name": "add"}]
# Rows, and the answers of each that are learned.
ROWS_OF_TURNS = [
    ({"messages": [ALPHA, answer(REPLY), BETA, answer(REPLY)]}, 2),
    ({"messages": [ALPHA, answer(THINKING), BETA, answer(THINKING)]}, 2),
    ({"messages": [ALPHA, answer(THINKING), BETA, answer(REPLY)]}, 2),
    ({"messages": [ALPHA, answer(REPLY), BETA, answer(THINKING)]}, 2),
    ({"messages": [ALPHA, answer(REPLY, reasoning_content="mull"), BETA, answer(REPLY)]}, 2),
    ({"messages": [ALPHA, answer(REPLY, weight=0), BETA, answer(THINKING, weight=1)]}, 1),
    ({"messages": [*TOOL, answer(REPLY)]}, 1),
    ({"prompt": [ALPHA, answer(THINKING), BETA], "completion": [answer(THINKING)]}, 1),
    ({"prompt": [ALPHA, answer(THINKING), BETA], "completion": [answer(REPLY)]}, 1),
    ({"prompt": [ALPHA], "completion": [answer(REPLY, reasoning_content="mull")]}, 1),
]
# They print messages of parts, for images, and their models load as no language model.
OF_IMAGES = ("idefics3", "smolvlm", "llava")


@pytest.mark.parametrize("labels", ["completion", "assistant"])
def test_labels_are_the_answers_whatever_the_template(labels):
    """Every template that comes with TRL takes the row and learns its answers, or refuses it."""
    tokenizer, wrong, taken = tokenizer_of(bos=False), [], 0
    for path in sorted((resources.files("trl") / "chat_templates").iterdir(), key=str):
        if not path.name.endswith(".jinja") or path.name.startswith(OF_IMAGES) or "training" in path.name:
            continue
        tokenizer.chat_template = path.read_text()
        for row, answers in ROWS_OF_TURNS:
            try:
                rendered = render(row, tokenizer, labels)
            except ValueError:
                continue
            taken += 1
            shown = learned(rendered, tokenizer)
            whole = tokenizer.decode(rendered.ids) == rendered.text
            if "ask" in shown or shown.count(REPLY) != answers or not whole:
                wrong.append((path.name, row, shown))
    assert not wrong
    assert taken > 100


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3"])
@pytest.mark.parametrize("labels", ["completion", "assistant"])
def test_thoughts_in_a_prompt_are_not_learned(name, labels):
    tokenizer = tokenizer_of(template_of_trl(name))
    prompt = [USER, answer(THOUGHT), {"role": "user", "content": "say two"}]
    rendered = render({"prompt": prompt, "completion": [answer("two")]}, tokenizer, labels)
    assert "one two" not in learned(rendered, tokenizer)
    assert "two" in learned(rendered, tokenizer)
    assert tokenizer.decode(rendered.ids) == rendered.text


@pytest.mark.parametrize("labels", ["completion", "all"])
def test_an_answer_has_the_end_that_the_template_prints_with_the_next_turn(labels):
    tokenizer = tokenizer_of(template_of_trl("glm4moe"))
    assert learned(render(pair("one"), tokenizer, labels), tokenizer).endswith("one<|user|>")


def test_rows_that_end_with_text_teach_no_end():
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    known = frozenset({tokenizer.eos_token_id})
    said = topics(pair("one two"), tokenizer, ends=known)["end of generation"]
    assert "1 of the first 1 rows end with text, such as" in said
    assert "would not learn to stop" in said
    assert topics({"prompt": "say:", "completion": " one"}, tokenizer, ends=known) == {}


def test_a_thought_behind_an_empty_one():
    tokenizer = tokenizer_of(template_of_trl("qwen3_8"))
    for row in (pair(THOUGHT), {"messages": [USER, answer(THOUGHT)]}):
        verdicts = compare_rows([row], tokenizer, "completion")
        assert any("closes an empty thought" in v.text and "reasoning_content" in v.text for v in verdicts)
    apart = compare_rows([pair("one two", reasoning_content="count")], tokenizer, "completion")
    assert not any("thought" in verdict.text for verdict in apart)


def test_tokens_that_merge_across_the_seam():
    tokenizer = tokenizer_of()
    row = {"prompt": "say one: ", "completion": "one two"}
    rendered = render(row, tokenizer, "completion")
    assert learned(rendered, tokenizer) == " one two<|im_end|>"
    assert "merge" in topics(row, tokenizer)["prompt and completion"]
    assert topics({"prompt": "say one:", "completion": " one two"}, tokenizer) == {}


def test_a_prompt_that_the_row_does_not_go_on_from():
    assert "'<think>\\n'" in topics(pair("one two"), tokenizer_of(R1))["prompt and completion"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    "text", ["say one: one two", "<|bos|>say one: one two<|im_end|>\n", "<|bos|><|bos|>say one: one two"]
)
def test_text_has_one_begin_and_one_end(text, bos):
    tokenizer = tokenizer_of(bos=bos)
    rendered = render(repaired({"text": text}, tokenizer), tokenizer, "completion")
    begins = rendered.ids.count(tokenizer.bos_token_id)
    assert begins == (1 if bos or text.startswith("<|bos|>") else 0)
    assert rendered.ids.count(tokenizer.eos_token_id) == 1
    assert rendered.ids[-1] == tokenizer.eos_token_id


def test_prompts_completions_and_messages_with_begin_and_end_tokens():
    tokenizer = tokenizer_of()
    row = {"prompt": "<|bos|>say one:", "completion": " one<|im_end|><|im_end|>\n"}
    rendered = render(repaired(row, tokenizer), tokenizer, "completion")
    assert tokenizer.decode(rendered.ids) == "<|bos|>say one: one<|im_end|>"
    assert learned(rendered, tokenizer) == " one<|im_end|>"
    assert topics(row, tokenizer).keys() == {"begin token", "end token"}
    turns = repaired(pair("one<|im_end|>"), tokenizer)
    assert render(turns, tokenizer, "completion").text.count("one<|im_end|><|im_end|>") == 0


def test_a_tokenizer_that_adds_the_end_itself():
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", 1), ("<|im_end|>", 3)]
    )
    for row in ({"text": "say one"}, {"prompt": "say one:", "completion": " one"}):
        rendered = render(row, tokenizer, "completion")
        assert rendered.ids.count(tokenizer.eos_token_id) == 1
        assert rendered.ids[-1] == tokenizer.eos_token_id
        assert rendered.mask[-1]
    assert learned(rendered, tokenizer) == " one<|im_end|>"


def test_rows_that_need_nothing_are_left_alone():
    for row in (pair("one two"), {"text": "one"}, {"input_ids": [1, 2], "labels": [-100, 2]}):
        assert repaired(row, tokenizer_of()) == row


def test_an_end_that_generation_goes_on_after():
    tokenizer = tokenizer_of()
    known = frozenset({tokenizer.convert_tokens_to_ids("<|endoftext|>")})
    assert "train.eos_token: '<|im_end|>'" in topics(pair("one"), tokenizer, ends=known)["end of generation"]
    assert topics(pair("one"), tokenizer, ends=known | {tokenizer.eos_token_id}) == {}


def test_plan_knows_what_the_students_generation_stops_at(tmp_path):
    file = recipe_of(tmp_path, [pair("one two")] * 2)
    assert not [v for v in plan(load_recipe(file)).verdicts if v.topic == "end of generation"]
    config = tmp_path / "pair" / "student" / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": 0}))
    assert [v for v in plan(load_recipe(file)).verdicts if v.topic == "end of generation"]
    given = plan(load_recipe(file, ["train.eos_token=<|im_end|>"]))
    assert not [v for v in given.verdicts if v.topic == "end of generation"]


def test_rows_beyond_the_context_of_either_model():
    tokenizer = tokenizer_of()
    llama = AutoConfig.for_model("llama", max_position_embeddings=16, vocab_size=300)
    long = AutoConfig.for_model("llama", max_position_embeddings=4096, vocab_size=300)
    table = GPT2Config(n_positions=16, vocab_size=300, n_embd=8, n_layer=1, n_head=1)
    rows = [{"text": "say one: one two " * 20}, {"text": "say one"}]
    check = lambda student, teacher, length: check_context(  # noqa: E731
        rows, tokenizer, "completion", length, {"student": student, "teacher": teacher}
    )
    (found,) = check(llama, long, None)
    assert (found.level, found.topic) == ("warning", "context")
    assert "1 rows are longer than the student reads" in found.text
    assert "train.max_length: 16" in found.text
    (found,) = check(long, table, 1024)
    assert found.level == "error"
    assert "the teacher reads" in found.text
    assert check(llama, table, 16) == []
    assert check(long, long, None) == []


def test_a_context_that_rope_stretches():
    config = AutoConfig.for_model(
        "llama",
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    assert context_of(config) == 256


def test_the_end_of_long_rows_is_measured_as_it_is_trained():
    tokenizer = tokenizer_of()
    rows = Dataset.from_list([{"prompt": "say one: " * 60, "completion": "one two"}] * 3)
    lengths = measure(rows, tokenizer, 32, "completion", "keep_end")
    label_tokens = len(tokenizer(" one two")["input_ids"])  # the begin token stands for the end token
    assert lengths.label_tokens == label_tokens
    assert lengths.ends_with_eos == 1.0
    assert lengths.cut.cut_rows == 3
    assert lengths.cut.cut_labels == 0
    (before, after) = row_as_learned(rows, tokenizer, "completion", 32, "keep_end")
    assert (after.text, after.learned) == (" one two<|im_end|>", True)
    assert not before.learned
    with pytest.raises(ValueError, match="Every label is masked"):
        measure(rows, tokenizer, 32, "completion", "keep_start")


def test_what_is_dropped_is_counted():
    tokenizer = tokenizer_of()
    ids = list(range(20, 30))
    rows = Dataset.from_list(
        [
            {"input_ids": ids, "labels": [-100] * 5 + ids[5:]},
            {"input_ids": ids, "labels": [-100] * 8 + ids[8:]},
            {"input_ids": ids, "labels": [-100] * 10},
        ]
    )
    lengths = measure(rows, tokenizer, 7, "completion")
    assert lengths.cut._asdict() == {
        "masked_rows": 1,
        "lost_rows": 1,
        "lost_tokens": 20,
        "cut_rows": 1,
        "cut_tokens": 3,
        "cut_labels": 5,
    }
    assert (lengths.kept_tokens, lengths.kept_labels) == (7, 2)


def test_a_date_stands_still_and_is_not_saved(tmp_path):
    tokenizer = tokenizer_of(DATED)
    day = datetime.date(2024, 2, 9)
    assert set_date(tokenizer, day) == day
    assert "Today Date: 09 Feb 2024" in tokenizer.apply_chat_template([USER], tokenize=False)
    assert "09 Feb 2024" in topics(pair("one"), tokenizer)["date"]
    with own_template(tokenizer):
        assert tokenizer.chat_template == DATED
        tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == DATED
    assert "09 Feb 2024" in tokenizer.apply_chat_template([USER], tokenize=False)
    assert set_date(tokenizer, datetime.date(2025, 1, 1)) == day  # once
    assert "09 Feb 2024" in tokenizer.apply_chat_template([USER], tokenize=False)
    assert set_date(tokenizer_of(), day) is None


def test_a_run_and_a_cache_keep_their_first_day(tmp_path):
    file = recipe_of(tmp_path, [pair("one two")] * 4, DATED, cache={"path": str(tmp_path / "cache")})
    train(load_recipe(file))
    run = tmp_path / "run"
    today = datetime.date.today().isoformat()
    assert json.loads((run / "date.json").read_text()) == {"date": today}
    assert AutoTokenizer.from_pretrained(run).chat_template == DATED
    (run / "date.json").write_text('{"date": "2020-01-02"}')
    assert plan(load_recipe(file)).date == datetime.date(2020, 1, 2)
    assert plan(load_recipe(file), fresh=True).date.isoformat() == today
    assert "02 Jan 2020" in plan(load_recipe(file)).tokenizer.apply_chat_template([USER], tokenize=False)
    (run / "date.json").write_text("{}")
    write_cache(load_recipe(file))  # begun by the run of 2020, had its folder not lost the day
    about = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert about["date"] == today
    about.pop("checksum")
    write_json(tmp_path / "cache" / "cache.json", {**about, "date": "2021-01-02"})
    cached = [
        "teacher.type=cached",
        f"teacher.path={tmp_path / 'cache'}",
        "output_dir=" + str(tmp_path / "next"),
    ]
    assert plan(load_recipe(file, cached)).date == datetime.date(2021, 1, 2)


class Said(Progress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(
    ("rows", "template", "text"),
    [
        ([{"text": "<|bos|>say one: one two<|im_end|>"}] * 4, None, "begin token"),
        ([pair(THOUGHT)] * 4, R1, "cuts the beginning"),
        ([{"prompt": "say one: ", "completion": "one two"}] * 4, None, "merge"),
    ],
)
def test_training_says_its_warnings(tmp_path, rows, template, text):
    said = Said()
    train(load_recipe(recipe_of(tmp_path, rows, template)), progress=said)
    assert [line for line in said.lines if line.startswith("warning, ") and text in line]
    assert not [line for line in said.lines if line.startswith("warning, trl")]


def test_trainer_in_python_reads_the_same_rows(tmp_path):
    from hpd import DistillConfig, DistillTrainer

    student, teacher = save_pair(tmp_path / "pair", R1)
    tokenizer = AutoTokenizer.from_pretrained(student)

    def prepared(rows):
        args = DistillConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False)
        trainer = DistillTrainer(
            model=str(student),
            teacher=str(teacher),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return rows_that_train(trainer.train_dataset, tokenizer)

    assert prepared([pair(THOUGHT)]) == ["count\n</think>\n\none two<|im_end|>"]
    assert prepared([{"text": "<|bos|>say one: one two<|im_end|>"}]) == ["say one: one two<|im_end|>"]


def test_dry_run_and_doctor_show_a_row(tmp_path):
    file = recipe_of(tmp_path, [{"prompt": "say one:", "completion": " one two"}] * 4)
    for command in (["train", str(file), "--dry-run"], ["doctor", str(file)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "<|bos|>say one:[[ one two<|im_end|>]]" in result.output
        assert "first 4 rows: 4 rows with" in result.output
        assert "dropped: nothing" in result.output


def test_dry_run_fails_where_training_would_end_in_an_index_error(tmp_path):
    file = recipe_of(tmp_path, [{"text": "say one: one two " * 40}] * 2, train={"max_length": 512})
    for role in ("student", "teacher"):
        folder = tmp_path / "pair" / role
        tokenizer = AutoTokenizer.from_pretrained(folder)
        shutil.rmtree(folder)
        from transformers import GPT2LMHeadModel

        config = GPT2Config(
            n_positions=64, vocab_size=300, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=3
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert result.exit_code == 2
    assert "train.max_length: 64" in " ".join(result.output.split())
