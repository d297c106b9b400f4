"""System texts and templates that have no system turn."""

import logging

import pytest
from tiny_models import tiny_tokenizer

from hpd.generation.engine import encode_prompt, turns_for_template
from hpd.generation.settings import GenerationSettings

REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)
IGNORES = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TAKES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def _text(tokenizer, prompt, system=None):
    return tokenizer.decode(encode_prompt(tokenizer, prompt, GenerationSettings(system_prompt=system)))


@pytest.mark.parametrize("template", [REFUSES, IGNORES])
def test_a_system_text_goes_before_the_first_user_turn(tokenizer, template, caplog):
    """Of the task, and of a row; the template that refuses it is not the row's fault."""
    tokenizer.chat_template = template + "{# " + str(id(caplog)) + " #}"  # a warning for each template
    with caplog.at_level(logging.WARNING):
        assert turns_for_template(
            tokenizer, [{"role": "system", "content": "short"}, {"role": "user", "content": "why"}]
        ) == [{"role": "user", "content": "short\n\nwhy"}]
        merged = _text(tokenizer, [{"role": "user", "content": "short\n\nwhy"}])
        assert _text(tokenizer, "why", "short") == merged
        row = [{"role": "system", "content": "short"}, {"role": "user", "content": "why"}]
        assert _text(tokenizer, row) == merged
    said = [record for record in caplog.records if "has no system turn" in record.message]
    assert len(said) == 1


def test_a_template_that_takes_system_turns_gets_them(tokenizer, caplog):
    tokenizer.chat_template = TAKES
    turns = [{"role": "system", "content": "short"}, {"role": "user", "content": "why"}]
    assert turns_for_template(tokenizer, turns) == turns
    assert not caplog.records


def test_a_template_that_refuses_all_says_so_itself(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="chat template refuses it: no"):
        _text(tokenizer, "why", "short")
