"""Prompts over a row's columns, and the teacher's row beside the student's."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset
from tiny_models import tiny_tokenizer

from hpd.batch import TEACHER_PREFIXES
from hpd.data.rendering import render
from hpd.data.teacher_prompts import TeacherContext
from hpd.data.teacher_rows import check_prefixes, check_teacher_rows, prefixes_of, teacher_prefix

TEXT = {"prompt": "say two:", "completion": " one two"}
CHAT = {
    "prompt": [{"role": "user", "content": "say two:"}],
    "completion": [{"role": "assistant", "content": "one two"}],
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{prompt}", "say two:"),
        ("Hint: {hint}\n{prompt}", "Hint: one\n\nsay two:"),
        ("{completion} is right. {prompt}", " one two is right. say two:"),
        ("{number} of {share}", "3 of 0.5"),
        # Only names in braces are columns: no formats, no attributes, no escapes.
        (r"\boxed{} {0} {prompt!r} {prompt.x} { prompt }", r"\boxed{} {0} {prompt!r} {prompt.x} { prompt }"),
        ("{{ hint | upper }}{% if nothing %}!{% endif %}{{ prompt }}", "ONE\nsay two:"),
        ("{% for word in words %}{{ word }} {% endfor %}\n", "a b \n"),
    ],
)
def test_a_prompt_is_written_over_the_columns(prompt, expected):
    row = {"hint": "one\n", "number": 3, "share": 0.5, "nothing": None, "words": ["a", "b"]}
    context = TeacherContext(prompt)
    context.check(list(row), "the dataset x")
    assert context.prompt_of(row, TEXT, 0) == expected


def test_of_a_conversation_the_last_user_turn_and_the_system_turn_are_the_teachers():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "say one:"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "say two:"},
    ]
    row = {"prompt": turns, "completion": CHAT["completion"]}
    found = TeacherContext("{prompt} ({completion})", "You know {solution}.").prompt_of(
        {"solution": "2"}, row, 0
    )
    assert found == [
        {"role": "system", "content": "You know 2."},
        *turns[1:3],
        {"role": "user", "content": "say two: (one two)"},
    ]
    assert turns[3]["content"] == "say two:"
    assert TeacherContext(system_prompt="Think.").prompt_of({}, CHAT, 0) == [
        {"role": "system", "content": "Think."},
        *CHAT["prompt"],
    ]


@pytest.mark.parametrize(
    ("context", "row", "said"),
    [
        (TeacherContext("{hint}"), {"hint": None}, "Row 7: teacher.prompt names hint, which is empty"),
        (TeacherContext("{hint}"), {"hint": ["a"]}, "names hint, which is a list"),
        (TeacherContext("{{ hint.nothing }}"), {"hint": {}}, "Row 7: teacher.prompt cannot be rendered"),
        (TeacherContext("{{ ''.__class__.__mro__ }}"), {}, "cannot be rendered: .*unsafe"),
        (TeacherContext(system_prompt="x"), {}, "Row 7 is text.*write it into teacher.prompt"),
    ],
)
def test_rows_that_cannot_be_filled_are_named(context, row, said):
    with pytest.raises(ValueError, match=said):
        context.prompt_of(row, TEXT, 7)


@pytest.mark.parametrize(
    ("context", "said"),
    [
        (
            TeacherContext("{hint} {solution}"),
            "teacher.prompt names solution, which the dataset x does not have",
        ),
        (
            TeacherContext(None, "{{ solution }}"),
            "teacher.system_prompt names solution.*columns question, hint",
        ),
        (TeacherContext("{% if hint %}"), "not a Jinja template"),
    ],
)
def test_templates_are_checked_before_any_row(context, said):
    with pytest.raises(ValueError, match=said):
        context.check(["question", "hint"], "the dataset x")


@pytest.mark.parametrize("row", [TEXT, CHAT], ids=["text", "chat"])
def test_the_answer_has_the_same_tokens_behind_both_prompts(row, tokenizer):
    own = TeacherContext("The answer is {completion}. {prompt}").prompt_of({}, row, 0)
    prefix = teacher_prefix({**row, "teacher_prompt": own}, tokenizer, "completion", 0)
    student, teacher = (render(one, tokenizer, "completion") for one in (row, {**row, "prompt": own}))
    assert prefix.ids + student.ids[prefix.start :] == teacher.ids
    assert len(prefix.ids) > prefix.start
    assert [token for token, bit in zip(teacher.ids, teacher.mask, strict=True) if bit] == student.ids[
        prefix.start :
    ]
    column = prefixes_of(prefix, len(student.ids))
    assert [place for place, ids in enumerate(column) if ids] == [prefix.start]


def test_without_a_prompt_of_its_own_the_teacher_reads_the_students(tokenizer):
    prefix = teacher_prefix({**TEXT, "teacher_prompt": None}, tokenizer, "completion", 0)
    assert prefix.ids == render(TEXT, tokenizer, "completion").ids[: prefix.start]


@pytest.mark.parametrize(
    ("row", "own", "labels", "said"),
    [
        ({"text": "say two"}, "x", "completion", "no prompt of that form"),
        (CHAT, "x", "completion", "both are texts, or both are messages"),
        (TEXT, "x", "all", "Every token of a row is learned"),
        # The tokenizer has a token for "one".
        (
            {"prompt": "say:", "completion": "ne two"},
            "say: o",
            "completion",
            "Row 3.*' one two.*tokens merge",
        ),
    ],
)
def test_rows_that_do_not_align_are_named(row, own, labels, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        teacher_prefix({**row, "teacher_prompt": own}, tokenizer, labels, 3)


def test_a_teachers_prompt_without_a_token_is_refused():
    with pytest.raises(ValueError, match="has no token"):
        teacher_prefix({**TEXT, "teacher_prompt": ""}, tiny_tokenizer(leading_bos=False), "completion", 0)


def hinted(*prompts):
    return [{**TEXT, "teacher_prompt": prompt} for prompt in prompts]


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_without_effect_or_beyond_the_context_are_errors(stream, tokenizer):
    def check(rows, **options):
        made = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
        found = check_teacher_rows(
            made, tokenizer, "completion", 64, {"teacher": 40, "other": None}, **options
        )
        return {verdict.topic: (verdict.level, verdict.text) for verdict in found}

    level, text = check(hinted("say two:", None))["teacher's rows"]
    assert level == "error"
    assert "no effect" in text
    found = check(hinted("say two:", "say one. say two:"))
    assert found.keys() == {"teacher's rows"}
    assert found["teacher's rows"][0] == "ok"
    assert "1 of 2 rows" in found["teacher's rows"][1]
    found = check(hinted("say two:", "one " * 60 + "say two:"))
    assert found["context"][0] == "error"
    assert "1 rows of the teacher" in found["context"][1]
    assert "context has 40" in found["context"][1]
    # A student that may write 60 tokens takes the teacher beyond its context, unless its row is cut.
    assert "context" in check(hinted("say one. say two:", None), new_tokens=60)


def test_prepared_rows_are_checked_too():
    column = [[], [], [1, 2], []]
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4], TEACHER_PREFIXES: column}])
    with pytest.raises(ValueError, match="no effect"):
        check_prefixes(rows, "keep_start")
    other = Dataset.from_list([{"input_ids": [1, 5, 3, 4], TEACHER_PREFIXES: column}])
    check_prefixes(other, "keep_start")
    with pytest.raises(ValueError, match="keep_end"):
        check_prefixes(other, "keep_end")
