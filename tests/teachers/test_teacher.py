"""The teacher's interface: what a class needs, and objects that were written before there was one."""

from types import SimpleNamespace

import pytest
import torch
from helpers.trainers import first_batch, make_trainer
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM

from hpd.models.forward import scores_of
from hpd.teachers import ModelTeacher, RemoteTeacher, SelfTeacher, Teacher, TeacherUnavailable
from hpd.teachers.sources import as_teacher


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def model(pair):
    return ModelTeacher(AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)).model


class Plain(Teacher):
    """Nothing but scores."""

    def __init__(self, live):
        self.live = live

    def scores(self, inputs, batch):
        return scores_of(self.live, inputs, batch.index)


class Duck:
    """Written for the protocol: no base class."""

    def __init__(self, live):
        self.live = live
        self.prepared = 0

    def prepare(self, student, accelerator):
        self.prepared += 1

    def scores(self, inputs, batch):
        return scores_of(self.live, inputs, batch.index)


class Remote(RemoteTeacher):
    def __init__(self, live, fails=False):
        self.live, self.fails = live, fails
        self.asked, self.waited, self.rows = 0, 0, 0

    def register_rows(self, rows):
        self.rows = sum(1 for _ in rows)

    def ask(self, inputs, batch):
        self.asked += 1
        return ["handle", self.asked]

    def wait(self, handle):
        assert handle[0] == "handle"
        self.waited += 1
        if self.fails:
            raise TeacherUnavailable("gone fishing")

    def scores(self, inputs, batch):
        assert inputs["asked"][0] == "handle"
        return scores_of(self.live, inputs, batch.index)


def loss_of(trainer):
    return float(trainer.compute_loss(trainer.model.train(), first_batch(trainer)).detach())


def test_scores_are_all_that_a_teacher_needs(pair, model, tmp_path):
    expected = loss_of(make_trainer(pair, tmp_path / "model", teacher=model))
    duck = Duck(model)
    for name, teacher in (("plain", Plain(model)), ("duck", duck)):
        trainer = make_trainer(pair, tmp_path / name, teacher=teacher)
        assert loss_of(trainer) == expected
        assert trainer.data_collator.ask is None
        trainer.train()
    assert duck.prepared == 1


def test_a_remote_teacher_is_asked_early_and_waited_for(pair, model, tmp_path):
    teacher = Remote(model)
    trainer = make_trainer(pair, tmp_path / "a", teacher=teacher)
    assert teacher.rows == len(trainer.train_dataset)
    trainer.train()
    assert teacher.asked == teacher.waited > 0
    with pytest.raises(TeacherUnavailable, match="gone fishing"):
        make_trainer(pair, tmp_path / "b", teacher=Remote(model, fails=True)).train()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("prepare",), "SimpleNamespace, which has no method scores: derive it from hpd.teachers.Teacher"),
        (("scores", "prepare", "read_rows"), "has read_rows: .*register_rows"),
        (("scores", "request", "wait"), "has request, wait: .*ask"),
    ],
)
def test_what_cannot_be_adapted_gets_one_sentence(methods, message):
    with pytest.raises(ValueError, match=message):
        as_teacher(SimpleNamespace(**dict.fromkeys(methods, print)))


def test_teachers_by_name_and_the_vocabulary_of_each(pair, model):
    assert isinstance(as_teacher("self"), SelfTeacher)
    assert as_teacher("self").vocab is None
    assert isinstance(as_teacher(str(pair[1])), ModelTeacher)
    assert as_teacher(model).vocab == as_teacher(SimpleNamespace(scores=print, model=model)).vocab == 300
    assert as_teacher(SimpleNamespace(scores=print, vocab=7)).vocab == 7
    known = Plain(model)
    assert as_teacher(known) is known
