"""`hpd eval`: which of its options go together."""

import inspect
from dataclasses import fields

import pytest

from hpd.terminal.eval_options import EvalOptions, HarnessOptions, MetricsOptions, TaskOptions


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, TaskOptions),
        ({"few_shot": 2, "preset": "paper"}, TaskOptions),
        ({"metrics": "kl", "teacher": "t", "temperature": 0.7}, MetricsOptions),
        ({"harness": "lm-eval", "tasks": "x", "few_shot": 2}, HarnessOptions),
    ],
)
def test_the_mode_keeps_what_was_given(given, kind):
    mode = EvalOptions(models=["m"], **given).mode()
    assert type(mode) is kind
    assert {name: getattr(mode, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": "kl", "harness": "lm-eval"}, "different evaluations"),
        ({"teacher": "t"}, "--teacher has no effect on an evaluation of tasks"),
        ({"metrics": "kl", "few_shot_data": "x"}, "--few-shot-data has no effect on --metrics"),
        ({"metrics": "kl", "engine": "vllm"}, "--engine has no effect on --metrics"),
        ({"harness": "lm-eval", "preset": "paper"}, "--preset has no effect on --harness"),
    ],
)
def test_options_without_effect_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EvalOptions(models=["m"], **given).mode()


def test_every_option_has_a_help_text_and_one_default():
    for name, parameter in inspect.signature(EvalOptions).parameters.items():
        (info,) = parameter.annotation.__metadata__
        assert info.help, name
    defaults = {field.name: field.default for field in fields(EvalOptions)}
    for kind in (TaskOptions, MetricsOptions, HarnessOptions):
        assert all(defaults[field.name] == field.default for field in fields(kind))
