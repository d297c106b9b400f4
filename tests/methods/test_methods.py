"""The table: every row builds, and one recipe runs every method by its name alone."""

import json
import math
import warnings

import pytest
from pydantic import TypeAdapter, ValidationError
from tiny_models import tiny_pair

from hpd import Objective
from hpd.config import load_recipe
from hpd.methods import METHODS, method_terms, name_terms
from hpd.methods.prefixes import RolloutConfig
from hpd.methods.regime import choose_regime
from hpd.methods.terms import TermConfig
from hpd.objectives import forward_kl, hpd, nll, reverse_kl
from hpd.training.run import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    student, teacher = tiny_pair("llama", folder)
    rows = [{"prompt": f"add {i}:", "completion": f" {i} and {i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": str(student),
        "teacher": str(teacher),
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.25},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "max_length": 64,
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    }


# sod takes rows of several turns: tests/training/test_positions_trained.py.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "sod"])
def test_one_recipe_runs_every_method_by_name(recipe, tmp_path, method):
    own = ["teacher.prompt=answer{completion}. {prompt}"] if METHODS[method].own_prompt else []
    own += ["train.vocabulary=bytes"] if method in ("uld", "gold") else []
    train(load_recipe({**recipe, "output_dir": str(tmp_path / "run")}, [f"method={method}", *own]))
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_complete(method):
    row = METHODS[method]
    assert all((row.summary, row.weight, row.use, row.defaults, row.reference))
    assert 0.0 <= row.prefixes.student_share(0.0) <= row.prefixes.student_share(1.0) <= 1.0
    assert name_terms(method_terms(method, {}))


def test_parameters_go_to_objective_or_term():
    (term,) = method_terms(
        "hpd", {"reinforce": False, "num_samples": 3, "sample_fraction": 0.5, "exclude_label": True}
    )
    assert term.kwargs == {"reinforce": False}
    assert (term.num_samples, term.sample_fraction, term.exclude_label) == (3, 0.5, True)
    support = term.build().support
    assert (support.draws, support.share, support.importance) == (3, 0.5, False)


def test_draws_exact_is_a_parameter_of_hpd():
    (term,) = name_terms(method_terms("hpd", {"draws": "exact", "reinforce": False}))
    assert str(term.support) == "label + full"
    assert term.objective.domain == "label_and_vocabulary"
    with pytest.raises(ValueError, match="draws: exact is HPD's expectation"):
        name_terms(method_terms("akl", {"draws": "exact"}))


def test_importance_is_unbiased_by_default_and_off_for_hpd():
    assert TermConfig(objective="reverse_kl", support="label+sampled").build().support.importance
    assert not TermConfig(objective="hpd").build().support.importance


def test_terms_of_one_objective_get_names_of_their_own():
    names = [
        t.name for t in name_terms([TermConfig(objective="nll"), TermConfig(objective="nll", weight=0.5)])
    ]
    assert names == ["nll", "nll#2"]


def test_objectives_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def f(r): return r * r.log()\ndef df(r): return r.log() + 1\nnothing = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    TermConfig(objective="f_divergence", kwargs={"f": "mine:f", "df": "mine:df"}).build()
    for name, message in (
        ("mine:nope", "cannot be imported"),
        ("nowhere:f", "cannot be imported"),
        ("mine:nothing", "is a int"),
    ):
        with pytest.raises(ValueError, match=message):
            TermConfig(objective=name).build()


@pytest.mark.parametrize(
    ("name", "factory"),
    [("forward_kl", forward_kl), ("reverse_kl", reverse_kl), ("nll", nll), ("hpd", hpd)],
)
def test_an_objective_a_factory_and_a_path_build_the_term_of_the_name(name, factory):
    by_name = TermConfig(objective=name).build()
    for given in (factory(), factory, f"hpd.objectives:{name}"):
        term = TermConfig(objective=given).build(name)
        assert (term.support, term.name) == (by_name.support, name)
        assert term.objective._replace(weights=None, value=None, stats=None) == by_name.objective._replace(
            weights=None, value=None, stats=None
        )
    assert TermConfig(objective=factory()).name == TermConfig(objective=factory).name == name


def test_parameters_of_a_factory_may_be_schedules_and_an_objective_has_none():
    config = TermConfig(
        objective=reverse_kl, kwargs={"baseline": {"schedule": "linear", "start": 0.0, "end": 1.0}}
    )
    assert config.scheduled
    assert config.at(0.5).build().objective.arguments == (0.5,)
    with pytest.raises(ValueError, match="'reverse_kl' has no parameter 'baseline'"):
        TermConfig(objective=reverse_kl(), kwargs={"baseline": 1.0}).build()


def test_a_rule_of_ones_own_on_label_and_draws_gets_its_support():
    mine = Objective(hpd().weights, hpd().value, domain="label")
    term = TermConfig(objective=mine).build()
    assert (term.name, str(term.support), term.support.importance) == (
        "objective",
        "label + sampled(1)",
        False,
    )


def test_a_recipe_gives_objectives_by_name():
    adapter = TypeAdapter(TermConfig)
    assert adapter.validate_python({"objective": "hpd.objectives:nll"}).build().objective.rule == "nll"
    assert adapter.dump_python(TermConfig(objective="nll"), mode="json")["objective"] == "nll"
    with pytest.raises(ValidationError, match="valid string"):
        adapter.validate_python({"objective": forward_kl()})


@pytest.mark.parametrize(
    ("method", "rollouts", "biased"),
    [
        ("opd", {}, False),
        ("opd", {"temperature": 0.7}, True),
        ("minillm", {"teacher_share": 0.2}, False),
        ("minillm", {"temperature": 0.7}, True),
    ],
)
def test_rollouts_of_a_reshaped_student_are_said_to_bias_the_gradient(method, rollouts, biased):
    terms = name_terms(method_terms(method, {}))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        choose_regime(method, terms, None, RolloutConfig(**rollouts), None)
    assert ["the gradient is biased" in str(warning.message) for warning in found] == [True] * biased


@pytest.mark.parametrize(
    "reshaped",
    [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 10}, {"min_p": 0.1}, {"repetition_penalty": 1.1}],
    ids=lambda given: next(iter(given)),
)
def test_a_share_of_the_teacher_beside_a_reshaped_student_is_refused(reshaped):
    """The correction takes the student's part for plain draws, so the ratio would be wrong."""
    terms = name_terms(method_terms("minillm", {}))
    rollouts = RolloutConfig(teacher_share=0.2, **reshaped)
    with pytest.raises(ValueError, match="teacher_share is corrected for as a share of plain draws"):
        choose_regime("minillm", terms, None, rollouts, None)
