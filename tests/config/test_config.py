"""Recipes: overrides, nearest keys, and choices that cannot go together."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import hpd.config
from hpd.config import (
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LoraConfig,
    ModelConfig,
    TeacherConfig,
    load_recipe,
    resolve,
)
from hpd.config.check import check_recipe
from hpd.config.guards import GuardsConfig
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.schedules import Schedule
from hpd.methods.strategy import StrategyConfig, as_strategy
from hpd.training.arguments import DistillConfig, train_arguments

GOOD = {"student": "org/student", "teacher": "org/teacher", "data": {"path": "rows.jsonl"}}


def test_shorthands_defaults_and_round_trip(tmp_path):
    recipe = load_recipe(GOOD)
    assert recipe.student.model == "org/student"
    assert recipe.teacher.type == "model"
    assert [term.objective for term in recipe.choose_terms()] == ["hpd"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(resolve(recipe)))
    assert load_recipe(file) == recipe


def test_self_teacher_has_a_shorthand():
    assert load_recipe({**GOOD, "teacher": "self"}).teacher.type == "self"


def test_overrides_reach_into_the_tree_and_read_yaml():
    recipe = load_recipe(
        GOOD, ["student.dtype=bfloat16", "train.max_steps=5", "method=akl", "method_kwargs.mu=0.4"]
    )
    assert recipe.student == ModelConfig(model="org/student", dtype="bfloat16")
    assert recipe.train == {"max_steps": 5}
    assert recipe.method_kwargs == {"mu": 0.4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"modle": "x"}}, "unknown key 'student.modle'; did you mean 'model'"),
        ({"techer": "x"}, "unknown key 'techer'; did you mean 'teacher'"),
        ({"lr": 1e-3}, "unknown key 'lr'; did you mean 'train.learning_rate'"),
        ({"max_steps": 5}, "unknown key 'max_steps'; did you mean 'train.max_steps'"),
        ({"data": {}}, "data.path is empty: give a path"),
        ({"student": {"model": "x", "dtype": "float33"}}, "student.dtype.*bfloat16.*got 'float33'"),
        ({"method": "hdp"}, "Unknown method 'hdp'. Did you mean 'hpd'"),
        (
            {"method_kwargs": {"renforce": False}, "method": "hpd"},
            "no parameter 'renforce'. Did you mean 'reinforce'",
        ),
        ({"method": "hpd", "terms": [{"objective": "nll"}]}, "method or terms, not both"),
        (
            {"terms": [{"objective": "nll", "wieght": 1}]},
            "unknown key 'terms.0.wieght'; did you mean 'weight'",
        ),
        ({"terms": [{"objective": "abkd"}]}, "needs alpha, beta"),
        ({"terms": [{"objective": "akl", "support": "label"}]}, "needs a whole distribution"),
        ({"terms": [{"objective": "reverse_kl", "support": "label"}]}, "not a divergence"),
        ({"terms": [{"objective": "hpd", "support": "full"}]}, "reads the label"),
        (
            {"terms": [{"objective": "reverse_kl", "support": "top_k", "top_k": 8, "tail": "drop"}]},
            "not a divergence",
        ),
        ({"terms": [{"objective": "reverse_kl", "support": "top_k"}]}, "needs top_k"),
        ({"terms": [{"objective": "forward_kl", "sample_fraction": 0.5}]}, "makes no use of sample_fraction"),
        ({"teacher": {"type": "model"}}, "teacher.model is missing"),
        ({"teacher": {"type": "self", "model": "x"}}, "remove teacher.model"),
        ({"data": {"path": "x", "validation": 1.5}}, r"must be in \(0, 1\)"),
        ({"data": {"path": "x", "validation": 0.1, "streaming": True}}, "no known length"),
        ({"eval": {"task": "exact-match"}}, "eval.data is missing"),
        ({"lora": {"lora_dropout": 1.5}}, "lora_dropout"),
        ({"guards": {"entropy": {"wran": 1}}}, "unknown key 'guards.entropy.wran'; did you mean 'warn'"),
        ({"rollouts": {"replay": {"capcity": 4}}}, "'rollouts.replay.capcity'; did you mean 'capacity'"),
        ({"stages": [{"name": "a", "dpo": {"pair": "data"}}]}, "'stages.0.dpo.pair'; did you mean 'pairs'"),
        ({"strategy": "polcy_gradient"}, "got 'polcy_gradient'; did you mean 'policy_gradient'"),
        (
            {"terms": [{"objective": "nll", "weight": {"schedule": "linear", "start": 1}}]},
            "schedule needs end",
        ),
        (
            {"teacher": {"type": "mixture", "teachers": {"a": {"type": "model"}, "b": "x"}}},
            "^teacher.teachers.a.model is missing",
        ),
        ({"lora": {"r": 0}}, "^lora.r must be >= 1, got 0.$"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe({**GOOD, **changes})


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="No recipe at"):
        load_recipe(tmp_path / "nope.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("- just a list")
    with pytest.raises(ValueError, match="holds no mapping"):
        load_recipe(broken)


def test_train_section_is_checked_against_the_trainers_fields():
    args = train_arguments(load_recipe({**GOOD, "train": {"learning_rate": "1e-4", "max_steps": 3}}))
    assert args.learning_rate == 1e-4
    assert args.max_steps == 3
    with pytest.raises(ValueError, match="unknown key 'train.learningrate'; did you mean 'learning_rate'"):
        train_arguments(load_recipe({**GOOD, "train": {"learningrate": 1}}))
    with pytest.raises(ValueError, match=r"train.learning_rate: .* got 'high'"):
        train_arguments(load_recipe({**GOOD, "train": {"learning_rate": "high"}}))
    with pytest.raises(ValueError, match="needs train.max_steps"):
        train_arguments(load_recipe({**GOOD, "data": {"path": "x", "streaming": True}}))


MISTAKES_IN_PYTHON = {
    "^generate.samples must be >= 1, got 0.$": (
        lambda: GenerateConfig(samples=0),
        {"generate": {"samples": 0}},
    ),
    "^generate.reference has no effect without": (
        lambda: GenerateConfig(reference="gold"),
        {"generate": {"reference": "gold"}},
    ),
    "^teacher.model is missing": (lambda: TeacherConfig(type="model"), {"teacher": {"type": "model"}}),
    "^teacher.path is for type cached": (
        lambda: TeacherConfig(model="x", path="y"),
        {"teacher": {"model": "x", "path": "y"}},
    ),
    "^teacher.url must be": (lambda: TeacherConfig(type="server"), {"teacher": {"type": "server"}}),
    "^data.limit must be >= 1, got 0.$": (
        lambda: DataConfig(path="x", limit=0),
        {"data": {"path": "x", "limit": 0}},
    ),
    "^lora.r must be >= 1": (lambda: LoraConfig(r=0), {"lora": {"r": 0}}),
    "^eval.data is missing": (EvalConfig, {"eval": {}}),
    "^rollouts.top_p must be in": (lambda: RolloutConfig(top_p=2.0), {"rollouts": {"top_p": 2.0}}),
    "^strategy.updates must be >= 1": (
        lambda: StrategyConfig(type="policy_gradient", updates=0),
        {"strategy": {"type": "policy_gradient", "updates": 0}},
    ),
    "^train.max_length must be >= 2, got 1.$": (
        lambda: DistillConfig(output_dir="x", max_length=1),
        {"train": {"max_length": 1}},
    ),
    "^train.impl is 'chunkd'. Did you mean 'chunked'": (
        lambda: DistillConfig(output_dir="x", impl="chunkd"),
        {"train": {"impl": "chunkd"}},
    ),
    "^train.vocabulary is 'shared'. Did you mean 'shared_prefix'": (
        lambda: DistillConfig(output_dir="x", vocabulary="shared"),
        {"train": {"vocabulary": "shared"}},
    ),
    "^train.kl_estimator is 'k4'. Allowed: exact, k1, k2, k3, rao_blackwell": (
        lambda: DistillConfig(output_dir="x", kl_estimator="k4"),
        {"train": {"kl_estimator": "k4"}},
    ),
    "^train.gradient_filter must be >= 0, got -1e-05": (
        lambda: DistillConfig(output_dir="x", gradient_filter=-1e-5),
        {"train": {"gradient_filter": -1e-5}},
    ),
    "^train.gradient_filter is a share of a position's gradient, below 1": (
        lambda: DistillConfig(output_dir="x", gradient_filter=2.0),
        {"train": {"gradient_filter": 2.0}},
    ),
    "^train.gradient_filter has no effect on train.impl: reference": (
        lambda: DistillConfig(output_dir="x", gradient_filter=1e-5, impl="reference"),
        {"train": {"gradient_filter": 1e-5, "impl": "reference"}},
    ),
}


@pytest.mark.parametrize("message", MISTAKES_IN_PYTHON)
def test_python_and_recipe_say_the_same(message):
    build, changes = MISTAKES_IN_PYTHON[message]
    with pytest.raises(ValueError, match=message) as in_python:
        build()
    with pytest.raises(ValueError, match=message) as in_recipe:
        train_arguments(load_recipe({**GOOD, **changes}))
    assert str(in_python.value) == str(in_recipe.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TeacherConfig(type="modle", model="x"), "teacher.type is 'modle'. Did you mean 'model'"),
        (lambda: ModelConfig(model="x", dtype="float33"), "dtype is 'float33'. Did you mean 'float32'"),
        (lambda: GenerateConfig(filter="corect"), "generate.filter is 'corect'. Did you mean 'correct'"),
        (
            lambda: GuardsConfig(non_finite="halt"),
            "guards.non_finite is 'halt'. Allowed: off, warn, stop, skip",
        ),
        (lambda: Prefixes(mix="rows"), "prefixes.mix is 'rows'. Did you mean 'row'"),
        (lambda: Schedule(schedule="wavy", start=1.0), "schedule.schedule is 'wavy'. Allowed: constant"),
        (lambda: as_strategy("directly"), "strategy.type is 'directly'. Did you mean 'direct'"),
        (lambda: TeacherConfig(model="x", quantization="2bit"), "teacher.quantization is '2bit'"),
    ],
)
def test_a_name_that_is_not_declared_is_refused_in_python_too(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_recipe_built_in_python_is_checked_as_a_whole():
    recipe = load_recipe(GOOD)
    check_recipe(recipe)
    routed = TeacherConfig(type="cached", path="cache")
    with pytest.raises(ValueError, match="knows the dataset's rows only"):
        check_recipe(dataclasses.replace(recipe, teacher=routed, prefixes=Prefixes(student=1.0)))
    with pytest.raises(ValueError, match="output_dir is empty"):
        dataclasses.replace(recipe, output_dir=" ")


def _modules():
    config = Path(hpd.config.__file__).parent
    return [*sorted(config.glob("*.py")), *sorted((config.parent / "methods").glob("*.py"))]


def test_every_field_is_documented():
    seen = set()
    for node in (node for path in _modules() for node in ast.parse(path.read_text()).body):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Config", "Recipe", "Prefixes")):
            continue
        seen.add(node.name)
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(field.target)} has no text under it"
    assert {"Recipe", "DataConfig", "TeacherConfig", "GuardsConfig", "TermConfig", "Prefixes"} <= seen


def test_recipe_classes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe(GOOD).output_dir = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "read", "want"),
    [
        ("train.save_strategy=no", lambda r: r.train["save_strategy"], "no"),
        ("train.run_name=off", lambda r: r.train["run_name"], "off"),
        ("train.packing=true", lambda r: r.train["packing"], True),
        ("train.max_steps=7", lambda r: r.train["max_steps"], 7),
        ("student.revision=12e45", lambda r: r.student.revision, "12e45"),
        ("student.revision=0123456", lambda r: r.student.revision, "0123456"),
        ("student.revision=null", lambda r: r.student.revision, None),
        ("student.model=no", lambda r: r.student.model, "no"),
        ("teacher.model=1e5", lambda r: r.teacher.model, "1e5"),
        ("output_dir=2024", lambda r: r.output_dir, "2024"),
        ("data.streaming=yes", lambda r: r.data.streaming, True),
        ("data.streaming=no", lambda r: r.data.streaming, False),
        ("data.system_prompt=Answer: shortly", lambda r: r.data.system_prompt, "Answer: shortly"),
        ("teacher.prompt={question}", lambda r: r.teacher.prompt, "{question}"),
        ("method_kwargs.reinforce=no", lambda r: r.method_kwargs["reinforce"], False),
    ],
)
def test_text_on_the_command_line_stays_text_where_a_field_is_text(override, read, want):
    got = read(load_recipe(GOOD, [override]))
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train={max_steps: 5}", r"takes learning_rate from .* \(train\.max_steps\)"),
        ("data=other.jsonl", r"takes labels from .* \(data\.path\)"),
        ("student={model: z}", r"takes dtype from .* \(student\.model\)"),
        ("student=z", r"takes dtype from .* \(student\.model\)"),
        ("teacher=u", r"takes dtype from .* \(teacher\.type, teacher\.model\)"),
        ("teacher={type: cached, path: cache}", None),  # has nothing in common with the one that is there
        ("teacher=self", None),
        ("data={path: other.jsonl, labels: last_turn}", None),
        ("lora={r: 4}", None),
    ],
)
def test_a_section_given_as_a_whole_says_what_it_takes_from_the_recipe(override, message, recwarn):
    tree = {
        "student": {"model": "s", "dtype": "bfloat16"},
        "teacher": {"model": "t", "dtype": "bfloat16"},
        "data": {"path": "d.jsonl", "labels": "assistant"},
        "train": {"learning_rate": 1e-3},
    }
    whole = load_recipe(tree, [override])
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (message is not None)
    assert all(re.search(message, text) for text in said)
    assert ("learning_rate" in whole.train) == (not override.startswith("train"))
