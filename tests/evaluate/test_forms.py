"""Forms in which data sets hold questions and answers."""

import json

import pytest

from hpd.evaluate.benchmarks.exact_match import ExactMatch
from hpd.evaluate.benchmarks.math import gsm8k
from hpd.evaluate.benchmarks.rows import read_rows
from hpd.evaluate.text_rows import read_text_rows
from hpd.generation.texts import Answer

USER = {"role": "user", "content": "What is 3 + 4?"}
FORMS = {
    "problem, solution": {"problem": "What is 3 + 4?", "solution": r"3 + 4 = \\boxed{7}."},
    "question, rationale at the end": {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"},
    "instruction, output": {"instruction": "What is 3 + 4?", "output": "The answer is 7."},
    "instruction, empty input, output, answer": {
        "instruction": "What is 3 + 4?",
        "input": "",
        "output": "We add 3 and 4 and get 7 in the end.",
        "answer": "7.0",
    },
    "instruction, output without a mark": {
        "instruction": "What is 3 + 4?",
        "output": "We add 3 and 4, which are small, so that there are 7 apples.",
    },
    "prompt, response": {"prompt": "What is 3 + 4?", "response": "It is 7."},
    "query, expected_answer": {"query": "What is 3 + 4?", "expected_answer": 7},
    "Question, Answer": {"Question": "What is 3 + 4?", "Answer": 7.0},
    "Final Answer": {"Problem": "What is 3 + 4?", "Final Answer": "7"},
    "finalAnswer": {"problem": "What is 3 + 4?", "finalAnswer": 7},
    "an answer's number, no answer": {"question": "What is 3 + 4?", "answer": None, "answer_number": 7},
    "reference_answer": {"question": "What is 3 + 4?", "reference_answer": "7"},
    "list of one": {"problem": "What is 3 + 4?", "answer": ["7"]},
    "nested": {"problem": "What is 3 + 4?", "answers": {"text": ["7"]}},
    "ground truth": {"problem": "What is 3 + 4?", "reward_model": {"ground_truth": "7"}},
    "chat": {"messages": [USER, {"role": "assistant", "content": "7"}]},
    "chat of parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "What is 3 "}, {"type": "text", "text": "+ 4?"}],
            },
            {"role": "assistant", "content": "7"},
        ]
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "What is 3 + 4?"}, {"from": "gpt", "value": "7"}]
    },
    "prompt and completion as chats": {
        "prompt": [USER],
        "completion": [{"role": "assistant", "content": "7"}],
    },
    "one text": {"text": "Question: What is 3 + 4?\nAnswer: 3 + 4 = 7, so it is 7."},
    "one text, letters": {"text": "Q: What is 3 + 4?\nA: 7"},
    "Alpaca's prompt": {"text": "### Instruction:\nWhat is 3 + 4?\n\n### Response:\nIt is 7"},
    "answer inside the question": {"question": "What is 3 + 4? Answer: 7"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", [gsm8k, ExactMatch])
def test_every_form_gives_its_question_and_answer(task, form, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FORMS[form]) + "\n")
    built = task(path)
    (example,) = built.examples()
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
    assert prompt == "What is 3 + 4?"
    right, wrong = built.grade([example] * 2, [Answer(text="so it is 7"), Answer(text="so it is 8")])
    assert (right.correct, wrong.correct) == (True, False)


def test_input_and_body_belong_to_the_question(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Add the numbers.", "input": "3, 4", "output": "7"},
        {"Body": "Ann has 3 pens and buys 4", "Question": "How many has she?", "Answer": 7},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ["Add the numbers.\n\n3, 4", "Ann has 3 pens and buys 4. How many has she?"]
    assert [example.prompt for example in gsm8k(path).examples()] == prompts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": None}], "answer": "1"}, "row 1: turn 1 of its chat"),
        ({"messages": [{"role": "assistant", "content": "a"}], "answer": "1"}, "no turn of role 'user'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}, "turn 1 of its chat"),
        ({"problem": "1?"}, "no answer"),
        ({"answer": "1"}, "no (question|prompt)"),
    ],
)
@pytest.mark.parametrize("task", [gsm8k, ExactMatch])
def test_rows_without_a_question_or_an_answer_are_named(task, row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        task(path)


def test_a_row_nested_100_000_deep_gets_one_sentence(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"problem": "1?", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    for read in (read_rows, gsm8k, ExactMatch, read_text_rows):
        with pytest.raises(ValueError, match="nested too deeply") as error:
            read(path)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", [None, [{"type": "image"}]])
def test_text_rows_refuse_turns_without_text(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(ValueError, match="row 1: turn 1 of its chat"):
        read_text_rows(path)
