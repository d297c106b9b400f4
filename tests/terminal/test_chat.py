"""`hpd chat`: one answer for each line, the conversation before it, and an end that is said."""

import json

import pytest
from tiny_models import tiny_pair
from typer.testing import CliRunner

from hpd.cli import app
from hpd.terminal import chat as module


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("chat"))[0]


def talk(student, text, *words):
    return CliRunner().invoke(app, ["chat", str(student), "--max-new-tokens", "4", *words], input=text)


def test_each_line_is_answered_with_what_was_said_before(student, monkeypatch):
    tokenizer = json.loads((student / "tokenizer_config.json").read_text())
    seen = []
    encode = module.encode_prompt
    monkeypatch.setattr(module, "encode_prompt", lambda t, p, s: seen.append(p) or encode(t, p, s))
    done = talk(student, "one\ntwo\n/new\nthree\n\nnever read\n")
    assert done.exit_code == 0, done.output
    if "chat_template" in tokenizer or (student / "chat_template.jinja").exists():
        assert [len(turns) for turns in seen] == [1, 3, 1]
    else:
        assert seen == ["one", "two", "three"]


def test_a_cut_answer_is_said_to_be_cut(student):
    done = talk(student, "one\n")
    assert done.exit_code == 0
    assert "cut at --max-new-tokens 4" in done.stderr


def test_settings_without_effect_are_errors(student):
    done = talk(student, "one\n", "--top-p", "0.5")
    assert done.exit_code == 2
    assert "no effect at temperature 0" in " ".join(done.output.split())
