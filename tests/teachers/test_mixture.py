"""Several teachers: mixed, and each for its own rows."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.cached_pairs import NUMBERS, make_recipe
from helpers.cached_trainers import batches_of, losses, trainer_of
from helpers.tiny_models import tiny_model

from hpd.batch import TokenBatch
from hpd.config import load_recipe
from hpd.losses.products import logits
from hpd.methods import method_terms, name_terms
from hpd.teachers import MixtureTeacher, ModelTeacher, RoutedScores
from hpd.teachers.mixture import _mix
from hpd.training.caching import write_cache
from hpd.training.plan import plan
from hpd.training.run import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Rows that name their teacher, and a second teacher."""
    folder = tmp_path_factory.mktemp("several")
    path = make_recipe(folder)
    rows = [
        {
            "prompt": f"say {NUMBERS[i % 10]} {i}:",
            "completion": " " + " ".join(NUMBERS[: 1 + i % 7]),
            "field": ("a", "b")[i % 3 == 0],
        }
        for i in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model("llama", folder / "second", role="teacher", seed=9)
    return path


def teachers(recipe, **settings):
    parts = {"a": str(recipe.parent / "teacher"), "b": str(recipe.parent / "second")}
    return "teacher=" + json.dumps({"teachers": parts, **settings})


MIXTURE = {"type": "mixture", "weights": {"a": 3.0, "b": 1.0}}
ROUTED = {"type": "routed", "column": "field"}


def distributions(trainer, inputs, batch):
    return {
        name: logits(trainer.teacher.teachers[name].scores(inputs, batch)).softmax(-1)
        for name in trainer.teacher.teachers
    }


def test_a_mixture_is_the_weighted_sum_of_its_teachers_distributions(recipe, tmp_path):
    trainer = trainer_of(recipe, tmp_path, teachers(recipe, **MIXTURE))
    inputs = batches_of(trainer)[0]
    batch = TokenBatch.pop(inputs)
    parts = distributions(trainer, inputs, batch)
    assert (parts["a"] - parts["b"]).abs().max() > 0.05
    mixed = trainer.teacher.scores(inputs, batch).hidden
    torch.testing.assert_close(mixed.exp(), 0.75 * parts["a"] + 0.25 * parts["b"], rtol=1e-4, atol=1e-6)


def test_a_mixture_does_not_depend_on_its_chunks_and_keeps_small_numbers(monkeypatch):
    from hpd.losses import Head, Scores
    from hpd.teachers import mixture

    scores = [Scores(torch.tensor([[0.0, 0.0, -150.0 - i]]).expand(7, 3), Head(None)) for i in range(2)]
    found = []
    for size in (1, 2**20):
        monkeypatch.setattr(mixture, "_CHUNK_BYTES", size)
        found.append(_mix(_mix(None, scores[0], 0.5, 3), scores[1], 0.5, 3))
    assert torch.equal(*found)
    expected = torch.logaddexp(torch.tensor(-150.0), torch.tensor(-151.0)) - 2 * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(found[0][:, 2], expected.expand(7))


@pytest.mark.parametrize("method", ["hpd", "forward_kl", "reverse_kl", "sft"])
def test_a_mixture_of_one_and_the_same_teacher_is_that_teacher(recipe, tmp_path, method):
    same = {"a": str(recipe.parent / "teacher"), "b": str(recipe.parent / "teacher")}
    for name, teacher in (("one", []), ("two", ["teacher=" + json.dumps({**MIXTURE, "teachers": same})])):
        train(load_recipe(recipe, [f"output_dir={tmp_path / name}", f"method={method}", *teacher]))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "layout", [(), ("train.padding_free=true", "train.max_length=null")], ids=["padded", "padding-free"]
)
def test_each_row_is_scored_by_its_own_teacher_only(recipe, tmp_path, layout):
    trainer = trainer_of(recipe, tmp_path, teachers(recipe, **ROUTED), *layout)
    rows = {tuple(row["input_ids"]): row["field"] for row in [*trainer.train_dataset, *trainer.eval_dataset]}
    answered = set()
    for inputs in batches_of(trainer):
        asked = inputs.pop("asked")
        batch = TokenBatch.pop(inputs)
        parts = distributions(trainer, inputs, batch)
        routed = trainer.teacher.scores({**inputs, "asked": asked}, batch)
        assert isinstance(routed, RoutedScores)
        names = [name for name in trainer.teacher.teachers if name in asked]
        covered = torch.cat([positions for positions, _ in routed.parts]).sort().values
        assert torch.equal(covered, torch.arange(len(batch.labels)))
        for name, (positions, scores) in zip(names, routed.parts, strict=True):
            torch.testing.assert_close(
                logits(scores).softmax(-1), parts[name][positions], rtol=1e-4, atol=1e-6
            )
            answered.add(name)
            if not layout:
                owners = inputs["input_ids"][
                    (batch.index[positions] // inputs["input_ids"].shape[1]).unique()
                ]
                real = [
                    tuple(row[: int(n)].tolist()) for row, n in zip(owners, (owners != 0).sum(1), strict=True)
                ]
                assert {rows[row] for row in real if row in rows} <= {name}
    assert answered == {"a", "b"}


def test_the_loss_of_routed_rows_is_the_sum_over_their_teachers(recipe, tmp_path):
    trainer = trainer_of(recipe, tmp_path, teachers(recipe, **ROUTED))
    trainer.terms = name_terms(method_terms("forward_kl", {}))
    inputs = batches_of(trainer)[0]
    batch = TokenBatch.pop(dict(inputs))
    own = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    parts = distributions(trainer, own, batch)
    with torch.no_grad():
        log_q = trainer.model.eval()(**own).logits.flatten(0, 1)[batch.index].log_softmax(-1)
    p = torch.empty_like(log_q)
    for name, part in inputs["asked"].items():
        p[part["positions"]] = parts[name][part["positions"]]
    expected = (p * (p.log() - log_q)).sum(-1).mean()
    trainer.model.train()
    assert float(trainer.compute_loss(trainer.model, inputs).detach()) == pytest.approx(
        float(expected), rel=1e-4
    )


def test_routes_to_caches_and_mixtures_of_caches(recipe, tmp_path):
    """A live teacher and a cached one side by side, then both cached."""
    parts = {}
    for name, model in (("a", "teacher"), ("b", "second")):
        place = tmp_path / f"cache-{name}"
        write_cache(load_recipe(recipe, [f"teacher={recipe.parent / model}", f"cache.path={place}"]))
        parts[name] = {"type": "cached", "path": str(place)}
    for kind in (ROUTED, MIXTURE):
        for name, chosen in (
            ("live", {"a": str(recipe.parent / "teacher"), "b": str(recipe.parent / "second")}),
            ("half", {"a": str(recipe.parent / "teacher"), "b": parts["b"]}),
            ("cached", parts),
        ):
            teacher = "teacher=" + json.dumps({**kind, "teachers": chosen})
            train(load_recipe(recipe, [f"output_dir={tmp_path / kind['type'] / name}", teacher]))
        live = losses(tmp_path / kind["type"] / "live")
        assert losses(tmp_path / kind["type"] / "half") == pytest.approx(live, rel=1e-4, abs=1e-6)
        assert losses(tmp_path / kind["type"] / "cached") == pytest.approx(live, rel=1e-4, abs=1e-6)


def test_a_mixture_is_cached_at_its_likeliest_tokens(recipe, tmp_path):
    mixed = [teachers(recipe, **MIXTURE), f"cache.path={tmp_path / 'cache'}"]
    with pytest.raises(ValueError, match="A mixture has no hidden state"):
        write_cache(load_recipe(recipe, mixed))
    small = [*mixed, "cache.kind=top_k", "cache.top_k=300"]
    write_cache(load_recipe(recipe, small))
    cached = f"teacher={{type: cached, path: {tmp_path / 'cache'}}}"
    for name, teacher in (("live", mixed[0]), ("cached", cached)):
        train(load_recipe(recipe, [f"output_dir={tmp_path / name}", teacher]))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-4, abs=1e-6)
    nested = {
        **MIXTURE,
        "teachers": {
            "a": {"type": "cached", "path": str(tmp_path / "cache")},
            "b": str(recipe.parent / "second"),
        },
    }
    with pytest.raises(ValueError, match="needs whole distributions"):
        plan(load_recipe(recipe, ["teacher=" + json.dumps(nested)]))


def test_a_batch_without_labels_is_a_zero(recipe, tmp_path):
    trainer = trainer_of(recipe, tmp_path, teachers(recipe, **ROUTED))
    row = trainer.train_dataset[0]
    inputs = trainer._prepare_inputs(trainer.data_collator([{**row, "labels": [-100] * len(row["labels"])}]))
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    loss.backward()
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "mixture"}, "teacher.weights needs a number > 0 for each of a, b"),
        ({"type": "mixture", "weights": {"a": 1.0, "c": 1.0}}, "for each of a, b"),
        ({"type": "mixture", "weights": {"a": 1.0, "b": 0.0}}, "> 0"),
        ({"type": "routed"}, "teacher.column is missing"),
        ({"type": "routed", "column": "field", "weights": {"a": 1}}, "teacher.weights is for type mixture"),
        ({"type": "routed", "column": "nope"}, "teacher.column is 'nope', which the dataset does not have"),
        ({"type": "model", "model": "x"}, "teacher.teachers is for type mixture or routed"),
    ],
)
def test_mistakes_are_named(recipe, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(load_recipe(recipe, [teachers(recipe, **settings)]))


def test_rows_of_nobody_or_of_two_are_refused(recipe, tmp_path):
    for field, message in (
        (["a", "x"], "there is no such teacher: a, b"),
        (["a", "b"], "are the same, and go to 'a' and 'b'"),
    ):
        file = tmp_path / f"{field[1]}.jsonl"
        file.write_text(
            "".join(
                json.dumps({"prompt": "say one:", "completion": " one", "field": name}) + "\n"
                for name in field
            )
        )
        with pytest.raises(ValueError, match=message):
            trainer_of(
                recipe,
                tmp_path / field[1],
                teachers(recipe, **ROUTED),
                f"data.path={file}",
                "data.validation=null",
            )
    with pytest.raises(ValueError, match="train.packing"):
        load_recipe(recipe, [teachers(recipe, **ROUTED), "train.packing=true"])


def test_from_python(recipe):
    from transformers import AutoModelForCausalLM

    parts = {
        name: ModelTeacher(AutoModelForCausalLM.from_pretrained(recipe.parent / name))
        for name in ("teacher", "second")
    }
    assert MixtureTeacher(parts, {"teacher": 1, "second": 3}).weights == {"teacher": 0.25, "second": 0.75}
    with pytest.raises(ValueError, match="weight > 0 for each"):
        MixtureTeacher(parts, {"teacher": 1.0})
