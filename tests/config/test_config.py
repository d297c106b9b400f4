"""Recipes: overrides, nearest keys, and choices that cannot go together."""

import dataclasses

import pytest
import yaml

from hpd.config import check as config
from hpd.config import load_recipe, resolve
from hpd.training.arguments import train_arguments

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
    assert recipe.student == config.ModelConfig(model="org/student", dtype="bfloat16")
    assert recipe.train == {"max_steps": 5}
    assert recipe.method_kwargs == {"mu": 0.4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"modle": "x"}}, "unknown key 'student.modle'; did you mean 'model'"),
        ({"techer": "x"}, "unknown key 'techer'; did you mean 'teacher'"),
        ({"data": {}}, "'data.path' is missing"),
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
        ({"terms": [{"objective": "forward_kl", "draw_share": 0.5}]}, "makes no use of draw_share"),
        ({"teacher": {"type": "model"}}, "teacher.model is missing"),
        ({"teacher": {"type": "self", "model": "x"}}, "remove teacher.model"),
        ({"data": {"path": "x", "validation": 1.5}}, r"must be in \(0, 1\)"),
        ({"data": {"path": "x", "validation": 0.1, "streaming": True}}, "no known length"),
        ({"eval": {"task": "exact-match"}}, "eval.data is missing"),
        ({"lora": {"lora_dropout": 1.5}}, "lora_dropout"),
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


def test_every_field_is_documented():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(config))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(field.target)} has no text under it"


def test_recipe_classes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe(GOOD).output_dir = "x"  # type: ignore[misc]
