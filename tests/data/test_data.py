"""Datasets on disk: every format, and every mistake as one sentence."""

import gzip
import json
import re

import pytest
from datasets import Dataset
from tiny_models import tiny_pair
from transformers import AutoTokenizer

from hpd.config import DataConfig, load_recipe
from hpd.data import load_preferences, load_prompts, load_rows, measure
from hpd.data.templates import check_templates
from hpd.training.plan import plan

ROWS = [{"question": f"what is {i}?", "answer": f"it is {i}", "id": i} for i in range(10)]
COLUMNS = {"prompt": "question", "completion": "answer"}


def write(path, rows=ROWS):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def config(path, **options):
    return DataConfig(**{"path": str(path), "columns": COLUMNS, **options})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines(tmp_path, name):
    rows = load_rows(config(write(tmp_path / name)))
    assert len(rows.train) == 10
    assert rows.train[3] == {"prompt": "what is 3?", "completion": "it is 3"}
    assert not rows.conversational


def test_csv_and_parquet_and_json_and_folder(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_csv(str(tmp_path / "rows.csv"))
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    for name in ("rows.csv", "rows.parquet", "rows.json"):
        assert load_rows(config(tmp_path / name)).train[0]["completion"] == "it is 0", name
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS[:4])
    write(folder / "b.jsonl", ROWS[4:])
    assert len(load_rows(config(folder)).train) == 10


def test_chat_wraps_text_into_messages_with_a_system_prompt(tmp_path):
    rows = load_rows(config(write(tmp_path / "r.jsonl"), format="chat", system_prompt="be brief"))
    assert rows.conversational
    assert rows.train[0]["prompt"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is 0?"},
    ]
    assert rows.train[0]["completion"] == [{"role": "assistant", "content": "it is 0"}]


def test_last_turn_splits_a_conversation(tmp_path):
    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    rows = load_rows(
        DataConfig(path=str(write(tmp_path / "r.jsonl", [{"messages": turns}])), labels="last_turn")
    )
    assert [m["content"] for m in rows.train[0]["prompt"]] == ["a", "b", "c"]
    assert [m["content"] for m in rows.train[0]["completion"]] == ["d"]


def test_validation_by_share_file_and_limit(tmp_path):
    file, other = write(tmp_path / "r.jsonl"), write(tmp_path / "v.jsonl", ROWS[:3])
    shared = load_rows(config(file, validation=0.2))
    assert (len(shared.train), len(shared.validation)) == (8, 2)
    assert not {r["prompt"] for r in shared.train} & {r["prompt"] for r in shared.validation}
    given = load_rows(config(file, validation=str(other), limit=5))
    assert (len(given.train), len(given.validation)) == (5, 3)


def test_streaming_reads_lazily(tmp_path):
    rows = load_rows(config(write(tmp_path / "r.jsonl"), streaming=True))
    assert not hasattr(rows.train, "__len__")
    assert next(iter(rows.train))["prompt"] == "what is 0?"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"columns": {}}, "columns question, answer, id.*map them"),
        (
            ROWS,
            {"columns": {"prompt": "q", "completion": "answer"}},
            "maps prompt to 'q', which the dataset does not have",
        ),
        ([{"question": "a", "answer": ""}], {}, "Row 0 has an empty completion"),
        ([{"question": "only"}], {"columns": {"prompt": "question"}}, "Training needs prompt and completion"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            {"columns": {}, "labels": "last_turn"},
            "empty prompt|no answer to learn",
        ),
    ],
)
def test_rows_that_cannot_be_learned_from(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_rows(config(write(tmp_path / "r.jsonl", rows), **options))


USER, ANSWER = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}
PARTS = [{"type": "text", "text": "say "}, {"type": "text", "text": "one"}]


@pytest.mark.parametrize("kind", ["text", "input_text"])
def test_content_in_parts_is_their_text(tmp_path, kind):
    """The template of a text model would print the list."""
    parts = [{**part, "type": kind} for part in PARTS]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    rows = load_rows(DataConfig(path=str(path))).train
    assert [turn["content"] for turn in rows[0]["messages"]] == ["say one", "one"]
    pair = load_rows(DataConfig(path=str(path), labels="last_turn")).train
    assert pair[0]["prompt"][0]["content"] == "say one"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x", "completion": c} for c in ("x", 6)], "Row 1: the column completion has values"),
        ([{"prompt": p, "completion": "5"} for p in ("x", ["2"])], "Row 1: the column prompt has values of"),
        ([{"messages": [{**USER, "content": PARTS}, {"role": "assistant", "content": "5"}]}],
         "Row 0: the turns of messages have content of more than one type"),
        ([{"conversations": [{"from": "human", "value": v}, {"from": "gpt", "value": "y"}]}
          for v in ("x", 2)],
         "Row 1: the turns of conversations have content of more than one type"),
    ],
)  # fmt: skip
def test_text_among_other_types_is_refused(tmp_path, rows, message):
    """`datasets` would read the text 5 back as a number."""
    with pytest.raises(ValueError, match=message):
        load_rows(DataConfig(path=str(write(tmp_path / "rows.jsonl", rows))))


@pytest.mark.parametrize(
    ("column", "value", "remedy"),
    [
        ("system_prompt", "Be brief.", "map it: data.columns: {system: system_prompt}"),
        ("context", "In France.", "map it: data.columns: {input: context}"),
        ("chat_history", [["a", "b"]], "map it: data.columns: {history: chat_history}"),
        ("cot", "hm", "a student learns it inside the answer"),
        ("is_correct", False, "keep the rows that are true"),
        ("responses", ["a"], "make a row of each"),
    ],
)
def test_columns_that_carry_meaning_under_another_name(tmp_path, column, value, remedy):
    columns = {"prompt": "problem", "completion": "answer"}
    rows = [{"problem": "2+3?", "answer": "5", column: value}]
    path = str(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=remedy):
        load_rows(DataConfig(path=path, columns=columns))
    assert load_rows(DataConfig(path=path, columns=columns, ignore=[column])).train[0]["prompt"] == "2+3?"


def test_a_mapped_input_and_system_stand_in_the_prompt(tmp_path):
    row = {"problem": "where?", "answer": "here", "context": "In France.", "system_prompt": "Be brief."}
    columns = {"prompt": "problem", "completion": "answer", "input": "context", "system": "system_prompt"}
    path = str(write(tmp_path / "rows.jsonl", [row]))
    system, user = load_rows(DataConfig(path=path, columns=columns)).train[0]["prompt"]
    assert (system["content"], user["content"]) == ("Be brief.", "where?\nIn France.")


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (("Question", "Answer"), "{prompt: Question, completion: Answer}"),
        (("problem", "generated_solution", "source"), "{prompt: problem, completion: generated_solution}"),
        (("conversation", "id"), "{messages: conversation}"),
        (("a", "b"), "for example data.columns: {prompt: question"),
    ],
)
def test_unknown_columns_get_the_mapping_that_is_likely(tmp_path, columns, advice):
    path = str(write(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "x")]))
    with pytest.raises(ValueError, match=re.escape(advice)):
        load_rows(DataConfig(path=path))


def test_calls_whose_arguments_differ_in_type_are_no_mixed_text(tmp_path):
    calls = [[{"type": "function", "function": {"name": "f", "arguments": a}}] for a in ({"a": 1}, "{}")]
    rows = [{"messages": [USER, {"role": "assistant", "content": "5", "tool_calls": c}]} for c in calls]
    read = load_rows(DataConfig(path=str(write(tmp_path / "rows.jsonl", rows)))).train
    assert read[1]["messages"][1]["content"] == "5"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No dataset at"):
        load_rows(config(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_rows(config(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(config(tmp_path / "broken.jsonl"))
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match="give a .jsonl"):
        load_rows(config(tmp_path / "rows.txt"))


def test_measure_sees_what_training_will(tmp_path):
    student, _ = tiny_pair("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = load_rows(config(write(tmp_path / "r.jsonl"))).train
    lengths = measure(rows, tokenizer, 512, "completion")
    completion = len(tokenizer("what is 3?it is 3" + tokenizer.eos_token)["input_ids"]) - len(
        tokenizer("what is 3?")["input_ids"]
    )
    assert lengths.num_rows == 10
    assert lengths.label_tokens == pytest.approx(completion, abs=1.0)
    assert lengths.ends_with_eos == 1.0
    assert lengths.cut_rows == 0.0
    with pytest.raises(ValueError, match="Every label is masked.*max_length=2"):
        measure(rows, tokenizer, 2, "completion")


def test_measure_counts_the_labels_that_training_keeps(tmp_path):
    student, _ = tiny_pair("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(student)
    turns = [{"role": "user", "content": "say one two"}, {"role": "assistant", "content": "one two"}]
    rows = load_rows(
        DataConfig(path=str(write(tmp_path / "r.jsonl", [{"messages": turns}])), labels="assistant")
    ).train
    everything = measure(rows, tokenizer, 512, "all").label_tokens
    assistant = measure(rows, tokenizer, 512, "assistant").label_tokens
    assert 0 < assistant < everything
    assert measure(rows, tokenizer, 512, "completion").label_tokens == assistant
    assert assistant == len(tokenizer("one two<|im_end|>", add_special_tokens=False)["input_ids"])


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chats(count=300, bad=None, turns=(USER, USER, ANSWER)):
    return [{"messages": list(turns) if i == bad else [USER, ANSWER]} for i in range(count)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tiny_pair("llama", folder)
    return folder


def recipe_of_chats(pair, tmp_path, template=ALTERNATE, bad=None, turns=(USER, USER, ANSWER), **data):
    (tmp_path / "t.jinja").write_text(template)
    path = write(tmp_path / "chats.jsonl", chats(bad=bad, turns=turns))
    tree = {
        "student": str(pair / "student"),
        "teacher": str(pair / "teacher"),
        "data": {"path": str(path), **data},
        "train": {"max_length": 64, "max_steps": 2, "chat_template_path": str(tmp_path / "t.jinja")},
        "output_dir": str(tmp_path / "run"),
    }
    return load_recipe(tree)


@pytest.mark.parametrize("labels", ["completion", "assistant", "last_turn", "all"])
def test_a_template_that_refuses_a_late_row_is_told_with_its_number(pair, tmp_path, labels):
    template = ALTERNATE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    options = {"labels": labels, "template": template}
    plan(recipe_of_chats(pair, tmp_path, **options))
    said = (
        r"Row 290 \(turns: user, user.* it begins 'what\?'\): the student's chat template refuses it: Roles "
        "must alternate"
    )
    with pytest.raises(ValueError, match=said):
        plan(recipe_of_chats(pair, tmp_path, bad=290, **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "content", "message"),
    [
        ("{{ messages[0].content + '' }}", None, "Row 299.*None"),
        (
            "{{ messages[0].a.b if messages[0].content == 'x' else messages[0].content }}",
            "x",
            "Row 299.*(undefined|no attribute)",
        ),
    ],
)
def test_whatever_a_template_raises_is_told(pair, tmp_path, template, content, message):
    with pytest.raises(ValueError, match=message):
        plan(
            recipe_of_chats(
                pair, tmp_path, template, bad=299, turns=({"role": "user", "content": content}, ANSWER)
            )
        )


def test_rows_for_validation_and_streams_are_looked_at(pair, tmp_path):
    other = write(tmp_path / "other.jsonl", chats(5, bad=3))
    with pytest.raises(ValueError, match="Row 3 of the validation rows"):
        plan(recipe_of_chats(pair, tmp_path, validation=str(other)))
    with pytest.raises(ValueError, match=r"Row \d+ of the (training|validation) rows"):
        plan(recipe_of_chats(pair, tmp_path, bad=290, validation=0.5))
    stream = plan(recipe_of_chats(pair, tmp_path, bad=290, streaming=True)).rows.train
    with pytest.raises(ValueError, match="Row 290"):
        list(stream)


def test_tools_and_options_of_a_row_reach_its_template(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    tokenizer.chat_template = (
        "{{ tools[0].name }}{{ messages[0].content }}"
        "{% if strict %}{{ raise_exception('strict') }}{% endif %}"
    )
    row = {"messages": [USER, ANSWER], "tools": '[{"name": "search"}]'}
    check_templates(Dataset.from_list([row]), tokenizer, "completion")
    with pytest.raises(ValueError, match="Row 1.*strict"):
        check_templates(
            Dataset.from_list([{**row, "chat_template_kwargs": {"strict": s}} for s in (False, True)]),
            tokenizer,
            "all",
        )


def test_a_base_model_trains_on_conversations_with_the_template_that_is_named(pair, tmp_path):
    recipe = recipe_of_chats(pair, tmp_path)
    assert plan(recipe).lengths.num_rows == 256
    (pair / "student" / "chat_template.jinja").rename(tmp_path / "own.jinja")
    try:
        planned = plan(recipe)
    finally:
        (tmp_path / "own.jinja").rename(pair / "student" / "chat_template.jinja")
    assert planned.tokenizer.chat_template == ALTERNATE
    planned.require_sound()


@pytest.mark.parametrize("prompt", ["hello?", [USER]])
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_preference_pairs_of_whole_dialogues_get_their_prompt_from_them(tmp_path, prompt, system_prompt):
    """UltraFeedback's form: the prompt as a text, and dialogues that begin with it; and TRL's own."""
    other = {"role": "assistant", "content": "no"}
    head = [USER] if isinstance(prompt, str) else []
    row = {"prompt": prompt, "chosen": [*head, ANSWER], "rejected": [*head, other], "score": 1.0}
    path = write(tmp_path / "pairs.jsonl", [row, row])
    rows = load_preferences(DataConfig(path=str(path), system_prompt=system_prompt))
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    assert rows[0] == {"prompt": [*system, USER], "chosen": [ANSWER], "rejected": [other]}
    assert len(rows) == 2


def test_preference_pairs_of_texts_stay_texts(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "pairs.jsonl", [row])
    assert load_preferences(DataConfig(path=str(path)))[0] == row
    with pytest.raises(ValueError, match="has no effect on preference pairs.* text: write them as messages"):
        load_preferences(DataConfig(path=str(path), system_prompt="Be brief."))
    turns = load_preferences(DataConfig(path=str(path), system_prompt="Be brief.", format="chat"))[0]
    assert [turn["content"] for turn in turns["prompt"]] == ["Be brief.", "a"]
    assert (turns["chosen"][0]["content"], turns["rejected"][0]["content"]) == ("b", "c")


def test_preference_pairs_keep_what_stands_before_them(tmp_path):
    """The form of orca_dpo_pairs: a system text beside the question."""
    row = {"system": "Be brief.", "question": "a", "chosen": "b", "rejected": "c"}
    path = str(write(tmp_path / "pairs.jsonl", [row]))
    pair = load_preferences(DataConfig(path=path, columns={"prompt": "question"}))[0]
    assert [turn["content"] for turn in pair["prompt"]] == ["Be brief.", "a"]
    assert pair["rejected"] == [{"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rejected": [{**USER, "content": "why?"}, ANSWER]}, "behind different prompts"),
        (
            {"rejected": [USER, {"role": "assistant", "content": ""}]},
            "turn 1 of .* is an empty assistant message",
        ),
        ({"weight": 0.5}, "the column weight, which changes what is learned"),
    ],
)
def test_preference_pairs_that_cannot_be_compared(tmp_path, changed, message):
    row = {
        "prompt": "what?",
        "chosen": [USER, ANSWER],
        "rejected": [USER, {**ANSWER, "content": "no"}],
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        load_preferences(DataConfig(path=str(write(tmp_path / "pairs.jsonl", [row]))))


@pytest.mark.parametrize("column", ["system_prompt", "context", "chat_history"])
def test_columns_before_a_prompt_are_not_passed_over_where_rows_are_written(tmp_path, column):
    value = [["a", "b"]] if column == "chat_history" else "some text"
    path = str(write(tmp_path / "rows.jsonl", [{"question": "a", column: value, "rationale": "b"}]))
    with pytest.raises(ValueError, match=f"the column {column}, which changes"):
        load_prompts(DataConfig(path=path, columns={"prompt": "question"}))


def test_preference_pairs_of_messages_are_no_plain_text(tmp_path):
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "no"}]}
    path = write(tmp_path / "pairs.jsonl", [row])
    assert load_preferences(DataConfig(path=str(path), format="chat"))[0] == row
    with pytest.raises(ValueError, match="data.format: plain has no effect on preference pairs"):
        load_preferences(DataConfig(path=str(path), format="plain"))
