"""Rules over positions as a recipe writes them: what is taken, and what is refused with a reason."""

from __future__ import annotations

import pytest

from hpd.config.check import check_tree
from hpd.methods import method_terms
from hpd.methods.byte_forms import methods_with_byte_forms
from hpd.methods.position_rules import PositionRule, as_rule
from hpd.methods.regime import choose_regime
from hpd.methods.table import choose_terms, name_terms
from hpd.methods.terms import TermConfig


def recipe(weight, **more):
    return {
        "student": "s", "teacher": "t", "data": {"path": "rows.jsonl"}, "output_dir": "out",
        "terms": [{"objective": "forward_kl", "weight": weight}], **more,
    }  # fmt: skip


def test_a_recipe_and_the_parameters_of_a_method_take_the_same_rule():
    written = {"rule": "first", "share": {"schedule": "linear", "start": 0.25, "end": 1.0, "over": 0.5}}
    from_recipe = check_tree(recipe(written)).choose_terms()[0]
    from_method = choose_terms("forward_kl", {"weight": written}, ())[0]
    assert from_recipe.weight == from_method.weight == as_rule(written)
    assert from_recipe.scheduled
    shares = [from_recipe.at(x).build().positions.number("share") for x in (0.0, 0.25, 0.5, 1.0)]
    assert shares == [0.25, 0.625, 1.0, 1.0]
    assert from_recipe.build().weight == 1.0


def test_defaults_are_those_that_are_said():
    assert PositionRule(rule="drift").number("gain") == 1.0
    assert [PositionRule(rule="steps").number(n) for n in ("epsilon", "limit")] == [1e-3, 1.5]
    assert not TermConfig(objective="nll", weight=PositionRule(rule="drift")).scheduled
    assert str(PositionRule(rule="first", share=0.3)) == "by first, share 0.3"


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"rule": "frist", "share": 0.3}, "first"),
        ({"rule": "first"}, "weight.share is missing"),
        ({"rule": "first", "share": 0.0}, r"weight.share must be in \(0, 1\], got 0.0"),
        ({"rule": "first", "share": 1.5}, r"in \(0, 1\]"),
        ({"rule": "first", "share": 1.0}, "no effect: remove weight"),
        ({"rule": "entropy", "share": 0.5, "gain": 1.0}, "weight.gain has no effect with rule entropy"),
        ({"rule": "drift", "gain": 0}, "no effect"),
        ({"rule": "drift", "gain": -1}, "weight.gain must be >= 0"),
        (
            {"rule": "drift", "gain": {"schedule": "adaptive", "start": 0.1, "end": 1}},
            "take constant, linear",
        ),
        ({"rule": "steps", "limit": 0.5}, "weight.limit must be >= 1"),
        ({"rule": "column"}, "weight.column is missing"),
        ({"rule": "first", "share": 0.3, "size": 2}, "size"),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_followed_is_refused_at_both_doors(weight, said):
    with pytest.raises(ValueError, match=said):
        check_tree(recipe(weight))
    with pytest.raises(ValueError, match=said):
        choose_terms("forward_kl", {"weight": weight}, ())


@pytest.mark.parametrize(
    ("method", "weight", "regime", "said"),
    [
        ("gkd", {"rule": "column", "column": "c"}, {}, "the column c is of the dataset's rows"),
        ("opd", {"rule": "steps"}, {}, "one step, without"),
        ("gkd", {"rule": "steps"}, {"prefixes": {"student": 1}}, "one step, without"),
        ("minillm", {"rule": "drift"}, {}, "strategy.discount adds up"),
    ],
)
def test_a_rule_without_effect_in_the_regime_is_refused(method, weight, regime, said):
    tree = recipe(1.0, method=method, method_kwargs={"weight": weight}, **regime)
    del tree["terms"]
    with pytest.raises(ValueError, match=said):
        check_tree(tree)


def test_two_columns_are_refused_and_one_twice_is_not():
    terms = [TermConfig(objective="nll", weight=PositionRule(rule="column", column=name)) for name in "aab"]
    choose_regime(None, name_terms(terms[:2]))
    with pytest.raises(ValueError, match=r"weighed by 2 columns \(a, b\)"):
        choose_regime(None, name_terms(terms))


def test_there_is_no_byte_form():
    assert not {"iw_opd", "tip", "sod", "length_curriculum"} & set(methods_with_byte_forms())
    with pytest.raises(ValueError, match="counts the tokens of one tokenizer"):
        check_tree(recipe({"rule": "drift"}, train={"vocabulary": "bytes"}))


def test_the_rows_of_the_table_have_the_rules_of_their_papers():
    rules = {name: method_terms(name, {})[0].weight for name in ("iw_opd", "tip", "sod", "length_curriculum")}
    assert {name: rule.rule for name, rule in rules.items()} == {
        "iw_opd": "drift", "tip": "entropy", "sod": "steps", "length_curriculum": "first",
    }  # fmt: skip
    assert rules["tip"].share == 0.5
    assert rules["sod"].number("limit") == 1.5
