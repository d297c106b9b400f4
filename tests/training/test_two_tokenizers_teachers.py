"""Between two tokenizers: served teachers, mixtures and routes, beside a live teacher's numbers."""

from __future__ import annotations

import pytest
import torch
from helpers.servers import PromptServer, connected, load_backend, served
from helpers.trainers import gradient, make_trainer, rows
from helpers.two_tokenizers import bytes_recipe, mixed_pair, slow
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores
from hpd.losses.products import logits
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.teachers import MixtureTeacher, ModelTeacher, RoutedTeacher, Teacher, TeacherUnavailable
from hpd.training.plan import plan
from hpd.training.run import train

LAYOUTS = {
    "padded": {"per_device_train_batch_size": 8},
    "padding-free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return mixed_pair(tmp_path_factory.mktemp("pair"))


def load(pair, scale=1.0):
    """The teacher of the pair, or one that is surer than it."""
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    return ModelTeacher(model)


def trained(pair, folder, **options):
    return gradient(make_trainer(pair, folder, vocabulary="bytes", **options))


def close(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


class Averaged(Teacher):
    """0.25 of one model's probabilities and 0.75 of another's, from whole logits."""

    def __init__(self, *models):
        self.models = models
        self.vocab = models[0].vocab

    def prepare(self, student, accelerator):
        for model in self.models:
            model.prepare(student, accelerator)

    def scores(self, inputs, batch):
        sides = [logits(model.scores(inputs, batch), self.vocab).softmax(-1) for model in self.models]
        return Scores((0.25 * sides[0] + 0.75 * sides[1]).log(), Head(None))


@pytest.mark.parametrize("method", ["forward_kl", *slow("hpd")])
def test_a_mixture_mixes_the_teachers_tokens(pair, tmp_path, method):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    mixture = MixtureTeacher({"a": load(pair), "b": load(pair, 3.0)}, {"a": 1.0, "b": 3.0})
    found = trained(pair, tmp_path / "a", method=method, teacher=mixture)
    other = Averaged(load(pair), load(pair, 3.0))
    close(found, trained(pair, tmp_path / "b", method=method, teacher=other, teacher_tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("label_reverse_kl", "padding-free"),
        pytest.param("label_reverse_kl", "padded", marks=pytest.mark.slow),
        ("reverse_kl", "padded"),
        pytest.param("reverse_kl", "padding-free", marks=pytest.mark.slow),
    ],
)
def test_each_row_is_learned_from_its_own_teacher(pair, tmp_path, method, layout):
    """The loss is a sum over rows: that of each teacher's rows alone, by their labels."""
    given = [{**row, "who": "ab"[i % 3 == 0]} for i, row in enumerate(rows(8))]
    teachers = {"a": load(pair), "b": load(pair, 3.0)}
    options = {"method": method, **LAYOUTS[layout]}
    whole = trained(pair, tmp_path / "both", train=given, teacher=RoutedTeacher(teachers, "who"), **options)
    total, loss, grad = 0, 0.0, torch.zeros_like(whole[1])
    for name, scale in (("a", 1.0), ("b", 3.0)):
        some = [row for row in given if row["who"] == name]
        trainer = make_trainer(
            pair, tmp_path / name, train=some, teacher=load(pair, scale), vocabulary="bytes", **options
        )
        count = sum(len(TokenBatch.pop(dict(b)).labels) for b in trainer.get_train_dataloader())
        one, part = gradient(trainer)
        total, loss, grad = total + count, loss + count * one, grad + count * part
    close(whole, (loss / total, grad / total))


def test_teachers_with_two_tokenizers_are_refused(pair, tmp_path):
    student = ModelTeacher(AutoModelForCausalLM.from_pretrained(pair[0]))
    with pytest.raises(ValueError, match="The teacher a and the teacher b have two tokenizers"):
        make_trainer(
            pair, tmp_path, vocabulary="bytes",
            teacher=MixtureTeacher({"a": load(pair), "b": student}, {"a": 1.0, "b": 1.0}),
        )  # fmt: skip
    parts = {"a": str(pair[1]), "b": {"type": "self"}}
    tree = {"type": "mixture", "teachers": parts, "weights": {"a": 1, "b": 1}}
    with pytest.raises(ValueError, match="The teacher a and the teacher b have two tokenizers"):
        plan(recipe_of(pair, tmp_path, tree))


def recipe_of(pair, folder, teacher, **changes):
    given = [{**row, "who": "ab"[i % 2]} for i, row in enumerate(rows(10))]
    return bytes_recipe(pair, folder, given, teacher=teacher, **changes)


@pytest.mark.parametrize("kind", ["routed", *slow("mixture")])
def test_recipes_of_several_teachers_train(pair, tmp_path, kind):
    teacher = {"type": kind, "teachers": {"a": str(pair[1]), "b": str(pair[1])}}
    teacher |= {"weights": {"a": 1, "b": 2}} if kind == "mixture" else {"column": "who"}
    assert train(recipe_of(pair, tmp_path, teacher))["steps"] == 2


@pytest.mark.parametrize("writes", [True, *slow(False)])
def test_a_served_teacher_says_what_a_live_one_does(pair, tmp_path, writes):
    """Its tokenizer comes from the server; it reads its own rows, the student's own among them."""
    regime = {"rollouts": RolloutConfig(max_new_tokens=6), "prefixes": Prefixes(student=1.0)}
    regime = regime if writes else {}
    student = AutoTokenizer.from_pretrained(pair[0])
    found = []
    with served(load_backend(pair[1])) as url:
        teacher = connected(url, student, protocol="hpd")
        for name, one in (("served", teacher), ("live", None)):
            trainer = make_trainer(
                pair, tmp_path / name, vocabulary="bytes", method="forward_kl", teacher=one, **regime
            )
            batches = trainer._step.begin(list(trainer.get_train_dataloader()), 0, 0.0)
            found.append(gradient(trainer, batches))
        teacher.close()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[1][1].norm()


def test_a_server_of_others_serves_rules_on_the_label_exactly(pair, tmp_path):
    own = AutoTokenizer.from_pretrained(pair[1])
    with PromptServer(pair[1]).running() as url:
        teacher = connected(url, own, model="tiny", top_k=2)
        options = {"method": "masked_sft", "teacher_tokenizer": own}
        found = trained(pair, tmp_path / "a", teacher=teacher, **options)
        close(found, trained(pair, tmp_path / "b", **options))
        # Not with an approximated tail either: of its tokens' first bytes it tells two.
        uniform = connected(url, own, model="tiny", top_k=2, tail="uniform")
        for name, one, said in (
            ("c", teacher, "and that is not enough: term hpd reads tokens that the student draws"),
            ("d", uniform, "tells its likeliest tokens: between two tokenizers it serves rules on the label"),
        ):
            with pytest.raises(ValueError, match=said):
                trained(pair, tmp_path / name, teacher=one, teacher_tokenizer=own, method="hpd")
        uniform.close()
        teacher.close()
        asked = {"type": "server", "url": url, "model": "tiny"}
        with pytest.raises(ValueError, match=r"does not tell the server's tokenizer.*teacher.tokenizer"):
            recipe_of(pair, tmp_path, asked)
        named = recipe_of(pair, tmp_path, {**asked, "tokenizer": str(pair[1])}, method="masked_sft")
        assert train(named)["steps"] == 2


def test_a_token_beyond_the_tokenizer_that_the_server_was_said_to_have_is_the_teachers(pair, tmp_path):
    server = PromptServer(pair[1])
    count = len(server.tokenizer)
    server.model.resize_token_embeddings(count + 8)
    with torch.no_grad():
        server.model.lm_head.weight[count + 5] = 0.0
        server.model.lm_head.weight[count + 5, 0] = 50.0
    with server.running() as url:
        asked = {"type": "server", "url": url, "model": "tiny", "tokenizer": str(pair[1]), "wait_seconds": 30}
        with pytest.raises((ValueError, TeacherUnavailable), match=f"beyond the teacher's {count}:"):
            plan(recipe_of(pair, tmp_path, asked, method="masked_sft"))


def test_a_recipe_trains_from_a_server_that_tells_its_tokenizer(pair, tmp_path):
    with served(load_backend(pair[1])) as url:
        recipe = recipe_of(pair, tmp_path, {"type": "server", "protocol": "hpd", "url": url})
        assert train(recipe)["steps"] == 2
