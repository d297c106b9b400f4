"""A teacher that reads its own prompt: rows of the dataset and of the student, every layout, every kind of
teacher."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.cached_pairs import make_recipe
from helpers.cached_trainers import batches_of, losses, trainer_of
from helpers.servers import load_backend, served
from helpers.trainers import first_batch, gradient, make_trainer, rows
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.batch import TokenBatch, as_teacher_reads
from hpd.config import load_recipe
from hpd.data.taken_apart import rows_of
from hpd.losses import Head, Scores
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.teachers import MixtureTeacher, ModelTeacher, RoutedTeacher, Teacher
from hpd.training.caching import write_cache
from hpd.training.run import train

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "padded": {"per_device_train_batch_size": 4},
    "padding-free": {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
    "packed": {"per_device_train_batch_size": 1, "packing": True, "max_length": 48, "shuffle_dataset": False},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def with_prompts(given, prompt):
    return [{**row, "teacher_prompt": prompt(number, row)} for number, row in enumerate(given)]


def hinted(given):
    return with_prompts(given, lambda number, row: f"answer {number}:{row['completion']}. {row['prompt']}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["hpd", "forward_kl"])
def test_an_empty_context_is_the_loss_without_one_bit_for_bit(pair, tmp_path, layout, method):
    """One row has more for the teacher than for the student; batches without that row are equal."""
    given = rows(12)
    one = with_prompts(given, lambda number, row: ("now " if number == 5 else "") + row["prompt"])
    ours, plain = (
        make_trainer(pair, tmp_path / name, method=method, train=train, **LAYOUTS[layout])
        for name, train in (("a", one), ("b", given))
    )
    same = []
    for batch, expected in zip(ours.get_train_dataloader(), plain.get_train_dataloader(), strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        same.append(torch.equal(batch["teacher_input_ids"], batch["input_ids"]))
        loss, grad = gradient(ours, [batch])
        loss_without, grad_without = gradient(plain, [expected])
        assert (loss == loss_without) == same[-1]
        assert torch.equal(grad, grad_without) == same[-1]
    assert same.count(False) == 1
    assert same.count(True) >= 2


def reference(pair, given):
    """Forward KL and its gradient in float64, row by row, from the texts."""
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval() for folder in pair
    )
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in given:
        answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        sides = []
        for model, prompt in ((student, row["prompt"]), (teacher, row["teacher_prompt"])):
            before = tokenizer(prompt)["input_ids"]
            logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
            sides.append(torch.log_softmax(logits, -1))
        log_q, log_p = sides[0], sides[1].detach()
        total = total + (log_p.exp() * (log_p - log_q)).sum()
        count += len(answer)
    (total / count).backward()
    return float(total.detach()) / count, torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_a_float64_reference(pair, tmp_path, layout):
    given = hinted(rows(9))
    loss, grad = gradient(make_trainer(pair, tmp_path, method="forward_kl", train=given, **LAYOUTS[layout]))
    expected, expected_grad = reference(pair, given)
    assert loss == pytest.approx(expected, rel=2e-5)
    assert (grad.double() - expected_grad).norm() < 2e-5 * expected_grad.norm()


class Copier(Teacher):
    """An enumerable teacher: its prompt begins with a hint of HINT tokens, and it copies each of them with
    probability 1 - EPSILON; whatever else, and behind the hint, is uniform."""

    HINT, EPSILON = 2, 0.1

    def __init__(self, vocab):
        self.vocab = vocab

    def probabilities(self, hint, place):
        p = torch.full((self.vocab,), self.EPSILON / self.vocab, dtype=torch.float64)
        if place >= self.HINT:
            return torch.full_like(p, 1.0 / self.vocab)
        p[hint[place]] += 1.0 - self.EPSILON
        return p

    def scores(self, inputs, batch):
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        found = []
        for index in batch.index.tolist():
            start = index - int(positions.flatten()[index])
            row = ids.flatten()[start : index + 1].tolist()
            # The prompt ends with its only colon.
            colon = row.index(self.colon)
            found.append(self.probabilities(row[:colon], len(row) - 1 - colon))
        return Scores(torch.stack(found).log().float(), Head(None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_the_hint_is_learned_as_its_enumeration_says(tmp_path, tmp_path_factory, layout):
    """All hints of two letters, the same student's prompt for each: the student cannot see the hint, so the
    expected gradient is that of the forward KL to the mixture over hints, which is enumerated here."""
    pair = tiny_pair("qwen2", tmp_path_factory.mktemp("pair"))  # no begin token: a hint begins the row
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    letters = [tokenizer(letter)["input_ids"][0] for letter in "abc"]
    hints = list(itertools.product("abc", repeat=2))
    given = [{"prompt": "x:", "completion": "bc", "teacher_prompt": "".join(hint) + ":"} for hint in hints]
    teacher = Copier(300)
    teacher.colon = tokenizer(":")["input_ids"][0]
    assert tokenizer("bc")["input_ids"] == letters[1:]
    trainer = make_trainer(
        pair, tmp_path, method="forward_kl", train=given, teacher=teacher, **LAYOUTS[layout]
    )
    loss, grad = gradient(trainer)

    student = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float64).eval()
    ids = [*tokenizer("x:")["input_ids"], *letters[1:], tokenizer.eos_token_id]
    log_q = torch.log_softmax(student(input_ids=torch.tensor([ids])).logits[0, -4:-1], -1)
    expected = torch.zeros((), dtype=torch.float64)
    ids_of = dict(zip("abc", letters, strict=True))
    for place in range(3):
        each = [teacher.probabilities([ids_of[letter] for letter in hint], place) for hint in hints]
        mixture = torch.stack(each).mean(0)
        if place < 2:
            assert mixture[letters].tolist() == pytest.approx([0.9 / 3 + 0.1 / 300] * 3)
        entropy = torch.stack([(p * p.log()).sum() for p in each]).mean()
        expected = expected + entropy - (mixture * log_q[place]).sum()
    (expected / 3).backward()
    assert loss == pytest.approx(float(expected) / 3, rel=1e-5)
    expected_grad = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (grad.double() - expected_grad).norm() < 2e-5 * expected_grad.norm()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("continued", [None, 3])
def test_what_the_student_writes_is_read_behind_the_teachers_prompt(pair, tmp_path, layout, continued):
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    given = hinted(rows(8))
    trainer = make_trainer(
        pair,
        tmp_path,
        method="forward_kl",
        train=given,
        prefixes=Prefixes(student=1.0, continue_tokens=continued),
        rollouts=RolloutConfig(max_new_tokens=6),
        **LAYOUTS[layout],
    )
    batches = trainer._step.begin(list(trainer.get_train_dataloader()), 0, 0.0)
    seen = 0
    for batch in batches:
        positions = TokenBatch.pop(dict(batch))
        own, of_teacher = as_teacher_reads(batch, positions)
        assert len(positions.by_student)
        sides = batch["input_ids"].flatten(), own["input_ids"].flatten()
        for side, index in zip(sides, (positions.index, of_teacher.index), strict=True):
            assert torch.equal(side[index + 1], positions.labels)
        for row in rows_of(batch):
            (begin,) = [
                tokenizer(one["teacher_prompt"])["input_ids"]
                for one in given
                if row.input_ids[: len(ids := tokenizer(one["prompt"])["input_ids"])] == ids
            ]
            assert row.teacher_prefix[: len(begin)] == begin
            seen += 1
    assert seen == 8
    loss, grad = gradient(trainer, batches)
    assert math.isfinite(loss)
    assert grad.norm() > 0


def test_the_students_rows_get_the_loss_of_the_same_rows_from_a_dataset(pair, tmp_path):
    """What was written, put into a dataset with the teacher's prompts: the same loss and gradient."""
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    given = hinted(rows(8))
    trainer = make_trainer(
        pair,
        tmp_path / "a",
        method="forward_kl",
        train=given,
        prefixes=Prefixes(student=1.0),
        rollouts=RolloutConfig(max_new_tokens=6),
    )
    (batch,) = trainer._step.begin(list(trainer.get_train_dataloader()), 0, 0.0)
    stored = [
        {
            "input_ids": row.input_ids,
            "labels": row.labels,
            "teacher_prefixes": [
                row.teacher_prefix if place == row.first_label else [] for place in range(len(row.labels))
            ],
        }
        for row in rows_of(batch)
    ]
    starts = [tokenizer(row["teacher_prompt"])["input_ids"] for row in given]
    assert [row.teacher_prefix for row in rows_of(batch)] == starts
    loss, grad = gradient(trainer, [batch])
    again, same = gradient(make_trainer(pair, tmp_path / "b", method="forward_kl", train=stored))
    assert loss == pytest.approx(again, rel=1e-6)
    assert (grad - same).norm() < 1e-5 * grad.norm()


def test_several_teachers_read_the_same_own_rows(pair, tmp_path):
    given = [{**row, "who": "ab"[i % 2]} for i, row in enumerate(hinted(rows(8)))]

    def load():
        return ModelTeacher(AutoModelForCausalLM.from_pretrained(pair[1]))

    teachers = {
        "one": load(),
        "mixed": MixtureTeacher({"a": load(), "b": load()}, {"a": 1.0, "b": 3.0}),
        "routed": RoutedTeacher({"a": load(), "b": load()}, "who"),
        "self": "self",
    }
    found = {
        name: gradient(
            make_trainer(pair, tmp_path / name, method="forward_kl", train=given, teacher=teacher)
        )[0]
        for name, teacher in teachers.items()
    }
    assert found["mixed"] == pytest.approx(found["one"], rel=1e-5)
    assert found["routed"] == pytest.approx(found["one"], rel=1e-5)
    # The student itself, with the answer in its prompt: not the student without it.
    assert found["self"] > 1e-3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return make_recipe(folder, 24, method="forward_kl", teacher={
        "model": str(folder / "teacher"), "prompt": "answer{completion}. {prompt}",
    })  # fmt: skip


def test_a_cache_holds_what_the_teacher_says_in_its_own_rows(recipe, tmp_path):
    write_cache(load_recipe(recipe))
    cached = ["teacher.type=cached", "teacher.model=null"]
    live, stored = (trainer_of(recipe, tmp_path / name, *more) for name, more in (("a", ()), ("b", cached)))
    for ours, theirs in zip(batches_of(stored), batches_of(live), strict=True):
        assert torch.equal(ours["teacher_input_ids"], theirs["teacher_input_ids"])
        with torch.no_grad():
            loss, expected = (t.compute_loss(t.model.eval(), b) for t, b in ((stored, ours), (live, theirs)))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="another teacher's prompt"):
        trainer_of(recipe, tmp_path / "c", *cached, "teacher.prompt=now {prompt}")
    with pytest.raises(ValueError, match="another teacher's prompt"):
        trainer_of(recipe, tmp_path / "d", *cached, "teacher.prompt=null")


@pytest.mark.slow
def test_a_served_teacher_reads_its_own_rows(recipe, tmp_path):
    teacher = load_recipe(recipe).teacher
    train(load_recipe(recipe, [f"output_dir={tmp_path / 'live'}"]))
    with served(load_backend(teacher.model)) as url:
        changes = [f"teacher.url={url}", "teacher.type=server", "teacher.protocol=hpd", "teacher.model=null"]
        train(load_recipe(recipe, [f"output_dir={tmp_path / 'served'}", *changes]))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "live"), abs=2e-5)


def test_rows_that_the_python_door_cannot_take_are_refused(pair, tmp_path):
    given = rows(4)
    same = with_prompts(given, lambda _, row: row["prompt"])
    with pytest.raises(ValueError, match="no effect"):
        make_trainer(pair, tmp_path, train=same)
    with pytest.raises(ValueError, match="keep_end"):
        make_trainer(pair, tmp_path, train=hinted(given), truncation_mode="keep_end")
    with pytest.raises(ValueError, match="bfd_split"):
        make_trainer(pair, tmp_path, train=hinted(given), packing=True, packing_strategy="bfd_split")
    with pytest.raises(ValueError, match="teacher_share"):
        make_trainer(
            pair, tmp_path, train=hinted(given), prefixes=Prefixes(student=1.0),
            rollouts=RolloutConfig(max_new_tokens=4, teacher_share=0.5), method="forward_kl",
        )  # fmt: skip
    prepared = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "teacher_prompt": "x"}]
    with pytest.raises(ValueError, match="prepared already"):
        make_trainer(pair, tmp_path, train=prepared)


def test_packing_is_trls(pair, tmp_path):
    ours, plain = (
        make_trainer(pair, tmp_path / name, train=train, packing=True, max_length=32)
        for name, train in (("a", hinted(rows(12))), ("b", rows(12)))
    )
    for name in ("input_ids", "labels", "seq_lengths"):
        assert ours.train_dataset[name][:] == plain.train_dataset[name][:]
    assert first_batch(ours)["teacher_input_ids"].shape[1] > first_batch(ours)["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.labels=all"], "data.labels: all"),
        (["train.truncation_mode=keep_end"], "keep_end"),
        (["train.packing=true", "train.packing_strategy=wrapped"], "packing_strategy: wrapped"),
        (["teacher.prompt='  '"], "teacher.prompt is empty"),
        (["teacher.system_prompt='{prompt}'"], "Row 0 is text"),
        (["teacher.prompt='{solution}'"], "names solution, which the dataset .* does not have"),
        (["teacher.prompt='{prompt}'"], "no effect"),
        (["teacher.prompt='" + "one " * 600 + "{prompt}'"], "its context has 512"),
    ],
)
def test_recipes_are_refused_before_a_model_loads(recipe, tmp_path, changes, said, monkeypatch):
    from hpd.training import single

    monkeypatch.setattr(single, "_load_student", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=said):
        train(load_recipe(recipe, [f"output_dir={tmp_path}", *changes]))


@pytest.mark.parametrize("name", ["opsd", "prompt_distillation", "sdft"])
def test_recipes_train_two_steps(name, pair, tmp_path):
    text = json.dumps({"question": "say two", "answer": "one two"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(text + text.replace("two", "three") * 7)
    changes = [
        f"student={pair[0]}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "data.name=null",
        "train.max_steps=2",
        "train.logging_steps=1",
        "train.bf16=false",
        "train.use_cpu=true",
        f"output_dir={tmp_path / 'run'}",
    ]
    if name == "prompt_distillation":
        changes += [f"teacher.model={pair[1]}", "data.validation=0.25"]
    loaded = load_recipe(ROOT / "recipes/context" / f"{name}.yaml", changes)
    assert loaded.teacher.reads_own_rows
    assert train(loaded)["steps"] == 2
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_one_context_for_all_teachers_of_a_mixture(recipe):
    parts = {"a": {"model": "x", "prompt": "y {prompt}"}, "b": "z"}
    changes = [f"teacher={ {'type': 'mixture', 'teachers': parts, 'weights': {'a': 1, 'b': 1}} }"]
    with pytest.raises(ValueError, match="teacher.teachers.a has a prompt of its own"):
        load_recipe(recipe, changes)
