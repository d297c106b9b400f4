"""A cached teacher says what the live one says, whatever the order of training; and refuses what it was not
written for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.cached_pairs import files_of, make_recipe
from helpers.cached_trainers import batches_of, losses, trainer_of
from tiny_models import tiny_model

from hpd import METHODS, DistillConfig, DistillTrainer
from hpd.batch import TokenBatch
from hpd.config import load_recipe
from hpd.losses import Scores, TopKScores
from hpd.losses.products import logits
from hpd.methods import method_terms, name_terms
from hpd.methods.prefixes import Prefixes
from hpd.teachers import CachedTeacher, MixtureTeacher, SelfTeacher
from hpd.teachers.cache import read_about
from hpd.training.caching import write_cache
from hpd.training.plan import plan
from hpd.training.run import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="module")
def cache(recipe):
    summary = write_cache(load_recipe(recipe))
    assert len(list(summary.path.glob("shard-*.safetensors"))) >= 4
    return summary.path


def logprobs(scores):
    found = logits(scores)
    return found - (
        scores.log_z[:, None] if scores.log_z is not None else torch.logsumexp(found, -1, keepdim=True)
    )


@pytest.mark.parametrize("layout", [(), ("train.packing=true",)], ids=["padded", "packed"])
def test_float32_logprobs_are_the_live_teachers(recipe, cache, tmp_path, layout):
    live = trainer_of(recipe, tmp_path, *layout)
    cached = CachedTeacher(cache)
    seen = 0
    for inputs in batches_of(live):
        batch = TokenBatch.pop(inputs)
        there, here = live.teacher.scores(inputs, batch), cached.scores(inputs, batch)
        assert (logprobs(there) - logprobs(here)).abs().max() < 1e-5
        seen += len(batch.labels)
    assert seen > 100


@pytest.fixture(scope="module")
def twins(recipe, cache, tmp_path_factory):
    """Trainers of one student, with the live teacher and with its cache, and a batch of each."""
    live = trainer_of(recipe, tmp_path_factory.mktemp("live"))
    cached = trainer_of(recipe, tmp_path_factory.mktemp("run"), "teacher.type=cached")
    return live, cached


# Between two tokenizers: tests/training/test_two_tokenizers.py.
ON_DATASET = [n for n, row in METHODS.items() if not row.prefixes.on_policy and n not in ("gold", "uld")]


@pytest.mark.parametrize("method", ON_DATASET)
def test_every_method_learns_the_same_from_a_hidden_cache(twins, method):
    found = []
    for trainer in twins:
        trainer.terms = name_terms(method_terms(method, {}))
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model.train(), batches_of(trainer)[0])
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
    (loss, gradient), (other_loss, other_gradient) = found
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
    assert (other_gradient - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.slow
def test_fifty_steps_follow_the_live_teacher(recipe, cache, tmp_path):
    """Shuffled, over several epochs, with evaluation."""
    curves, distances, evaluations = [], [], []
    for name, teacher in (("live", "model"), ("cached", "cached")):
        summary = train(
            load_recipe(
                recipe, [f"output_dir={tmp_path / name}", f"teacher.type={teacher}", "train.max_steps=50"]
            )
        )
        curves.append(losses(tmp_path / name))
        distances.append(losses(tmp_path / name, "forward_kl"))
        evaluations.append([summary[f"{figure} after"] for figure in ("loss", "forward_kl", "reverse_kl")])
    assert len(curves[0]) == 50
    assert distances[1] == pytest.approx(distances[0], rel=1e-4)
    # HPD's loss is no distance: it passes through zero, where nothing is small beside it.
    assert curves[1] == pytest.approx(curves[0], rel=1e-4, abs=1e-6)
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        ["train.packing=true", "train.shuffle_dataset=true"],
        ["data.validation=null", "data.limit=9"],
        ["train.dataloader_num_workers=2"],
        ["train.packing=true", "train.dataloader_num_workers=1", "train.seed=7"],
    ],
    ids=["packed-shuffled", "subset", "workers", "packed-worker"],
)
def test_layouts_subsets_and_workers(recipe, cache, tmp_path, changes):
    settings = ["train.max_steps=6", "train.per_device_train_batch_size=2", *changes]
    for name, teacher in (("live", "model"), ("cached", "cached")):
        train(load_recipe(recipe, [f"output_dir={tmp_path / name}", f"teacher.type={teacher}", *settings]))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)


def test_a_repeated_row_is_stored_once(recipe, cache):
    about = CachedTeacher(cache).cache.about
    live = plan(load_recipe(recipe))
    rows = [*live.rows.train, *live.rows.validation]
    assert len({json.dumps(row) for row in rows}) == len(rows) - 4
    keys = CachedTeacher(cache).cache._keys
    assert len(set(keys.tolist())) == len(keys) == about["positions"]


# Nats, and share of positions whose sign of log p - log q changes; at a tiny teacher whose logits spread over
# about 10 nats.
@pytest.mark.parametrize(
    ("dtype", "nats", "branches"), [("bfloat16", 0.03, 0.02), ("float16", 0.004, 0.01), ("int8", 0.08, 0.02)]
)
def test_narrow_hidden_states_stay_within_their_tolerance(recipe, tmp_path, dtype, nats, branches):
    narrow = load_recipe(recipe, [f"cache.path={tmp_path / 'cache'}", f"cache.dtype={dtype}"])
    summary = write_cache(narrow)
    assert (
        summary.bytes_per_position == {"bfloat16": 48 * 2 + 4, "float16": 48 * 2 + 4, "int8": 48 + 8}[dtype]
    )
    live, cached = trainer_of(recipe, tmp_path / "run"), CachedTeacher(tmp_path / "cache")
    student = trainer_of(recipe, tmp_path / "student", "teacher=self").teacher
    worst, changed, total = 0.0, 0, 0
    for inputs in batches_of(live):
        batch = TokenBatch.pop(inputs)
        there, here = (
            logprobs(t.scores(inputs, batch)).gather(1, batch.labels[:, None]) for t in (live.teacher, cached)
        )
        own = logprobs(student.scores(inputs, batch)).gather(1, batch.labels[:, None])
        worst = max(worst, float((there - here).abs().max()))
        changed, total = changed + int(((there > own) != (here > own)).sum()), total + len(batch.labels)
    assert 1e-5 < worst < nats
    assert changed <= branches * total
    stored = cached.scores(inputs, batch)
    torch.testing.assert_close(torch.logsumexp(logits(stored), -1), stored.log_z, rtol=1e-5, atol=1e-5)


def test_top_k_is_exact_at_its_tokens_and_names_its_tail(recipe, tmp_path):
    small = ["cache.kind=top_k", "cache.top_k=8", "cache.dtype=auto", f"cache.path={tmp_path / 'cache'}"]
    assert write_cache(load_recipe(recipe, small)).bytes_per_position == 8 * 8 + 4
    live, cached = trainer_of(recipe, tmp_path / "run"), CachedTeacher(tmp_path / "cache")
    inputs = batches_of(live)[0]
    batch = TokenBatch.pop(inputs)
    there, here = logprobs(live.teacher.scores(inputs, batch)), cached.scores(inputs, batch)
    assert isinstance(here, TopKScores)
    torch.testing.assert_close(here.logprobs, there.topk(8, -1).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        here.label_logprobs, there.gather(1, batch.labels[:, None])[:, 0], rtol=0, atol=1e-5
    )
    train(load_recipe(recipe, [*small, "teacher.type=cached", f"output_dir={tmp_path / 'trained'}"]))
    logs = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.0 < log["teacher_tail_mass"] < 1.0 for log in logs if "loss" in log)
    assert all(0.0 < log["draws_off_top_k"] <= 1.0 for log in logs if "loss" in log)


def test_rules_of_the_label_are_exact_from_a_top_k_cache_of_one(recipe, tmp_path):
    small = ["cache.kind=top_k", "cache.top_k=1", f"cache.path={tmp_path / 'cache'}"]
    write_cache(load_recipe(recipe, small))
    live = trainer_of(recipe, tmp_path / "live")
    cached = trainer_of(recipe, tmp_path / "run", *small, "teacher.type=cached")
    for method in ("sft", "masked_sft", "label_forward_kl", "label_reverse_kl", "label_jsd"):
        found = []
        for trainer in (live, cached):
            trainer.terms = name_terms(method_terms(method, {}))
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model.train(), batches_of(trainer)[0])
            loss.backward()
            found.append((loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
        (loss, gradient), (other_loss, other_gradient) = found
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6, msg=method)
        assert (other_gradient - gradient).norm() < 1e-4 * gradient.norm(), method


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_top_k_leaves_the_tail_its_mass(recipe, tmp_path, dtype):
    """Rounded log-probabilities may sum to more than one; the tail must not vanish for it."""
    masses = {}
    for name in ("float32", dtype):
        small = [
            "cache.kind=top_k",
            "cache.top_k=290",
            f"cache.dtype={name}",
            f"cache.path={tmp_path / name}",
        ]
        assert write_cache(load_recipe(recipe, small)).bytes_per_position == (
            290 * 8 + 4 if name == "float32" else 290 * 6 + 8
        )
        teacher = CachedTeacher(tmp_path / name)
        empty = torch.empty(0, dtype=torch.long)
        keys = torch.from_numpy(teacher.cache._keys)
        scores = teacher.scores({}, TokenBatch(empty, empty, keys, torch.zeros((), dtype=torch.long)))
        masses[name] = 1.0 - scores.logprobs.double().exp().sum(-1)
    exact = masses["float32"].clamp_min(2.0**-20)
    assert (masses[dtype] / exact).log().abs().max() < 1.0
    assert (exact < 1e-4).any()


def test_a_softcapped_teacher_and_a_longer_head(tmp_path):
    path = make_recipe(tmp_path, num_rows=12)
    for role in ("student", "teacher"):
        shutil.rmtree(tmp_path / role)
        tiny_model("gemma3_text", tmp_path / role, vocab=300 if role == "student" else 316, role=role)
    changes = ["train.vocabulary=shared_prefix", "train.max_steps=3"]
    write_cache(load_recipe(path, changes))
    for name, teacher in (("live", "model"), ("cached", "cached")):
        train(load_recipe(path, [f"output_dir={tmp_path / name}", f"teacher.type={teacher}", *changes]))
    assert CachedTeacher(tmp_path / "cache").cache.head.softcap == 4.0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)


def test_the_students_own_start_can_be_cached(recipe, tmp_path):
    changes = ["teacher=self", f"cache.path={tmp_path / 'cache'}"]
    write_cache(load_recipe(recipe, changes))
    trainer = trainer_of(recipe, tmp_path / "run", f"teacher={{type: cached, path: {tmp_path / 'cache'}}}")
    trainer.terms = name_terms(method_terms("forward_kl", {}))
    assert float(
        trainer.compute_loss(trainer.model.train(), batches_of(trainer)[0]).detach()
    ) == pytest.approx(0.0, abs=1e-5)


def test_a_cache_of_a_cache_is_of_the_teacher_that_wrote_the_first(recipe, cache, tmp_path):
    """A recipe that names the model trains from it, one that names another is refused."""
    there = ["teacher.type=cached", f"teacher.path={cache}"]
    kind = ["cache.kind=top_k", "cache.top_k=3", "method=forward_kl"]
    path = write_cache(load_recipe(recipe, [*there, *kind, f"cache.path={tmp_path / 'second'}"])).path
    third = [*kind, "cache.dtype=float16", f"cache.path={tmp_path / 'third'}"]
    path = write_cache(load_recipe(recipe, [there[0], f"teacher.path={path}", *third])).path
    about, first = (read_about(where)["fingerprint"] for where in (path, cache))
    assert (about["teacher"], about["name"]) == (first["teacher"], first["name"])
    words = [there[0], f"teacher.path={path}", "method=forward_kl"]
    plan(load_recipe(recipe, words))
    with pytest.raises(ValueError, match="written with another teacher"):
        plan(load_recipe(recipe, [*words, *other_teacher(recipe, tmp_path)]))
    # The cache that is read belongs to what is written: shards of two are not mixed.
    with pytest.raises(ValueError, match="holds a cache with another cache"):
        write_cache(load_recipe(recipe, [*there, *third]))


def other_rows(recipe, tmp_path):
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"prompt": "say what:", "completion": " nothing"}) + "\n"
    )
    return [f"data.path={tmp_path / 'other.jsonl'}", "data.validation=null"]


def other_tokenizer(recipe, tmp_path):
    student = Path(load_recipe(recipe).student.model)
    shutil.copytree(student, tmp_path / "student")
    file = tmp_path / "student" / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocab = tree["model"]["vocab"]
    tree["model"]["merges"] = tree["model"]["merges"][:-1]
    assert len(vocab) == 300
    file.write_text(json.dumps(tree))
    return [f"student={tmp_path / 'student'}"]


def other_template(recipe, tmp_path):
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return [f"train.chat_template_path={tmp_path / 'other.jinja'}"]


def other_teacher(recipe, tmp_path):
    tiny_model("llama", tmp_path / "other", role="teacher", seed=5)
    return [f"teacher.model={tmp_path / 'other'}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_rows, "label positions are not in the cache"),
        (other_tokenizer, "written with another tokenizer"),
        (other_template, "written with another chat template"),
        (other_teacher, "written with another teacher"),
        (lambda *_: ["train.max_length=32"], r"another max_length \(64 in the cache, 32 here\)"),
    ],
)
def test_what_a_cache_was_not_written_for_is_named(recipe, cache, tmp_path, change, message):
    changes = change(recipe, tmp_path)
    cached = load_recipe(recipe, [*changes, "teacher.type=cached", f"output_dir={tmp_path / 'run'}"])
    # Other rows are found when they are tokenized, everything else before a weight is loaded.
    check = train if change is other_rows else plan
    with pytest.raises(ValueError, match=message):
        check(cached)
    before = files_of(cache)
    with pytest.raises(ValueError, match="holds a cache with another"):
        write_cache(load_recipe(recipe, changes))
    assert files_of(cache) == before


def test_a_disk_that_cannot_hold_it_is_refused_with_numbers(recipe, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(ValueError, match=r"needs [\d.]+ kB more .* has 20.0 kB free"):
        write_cache(load_recipe(recipe, [f"cache.path={tmp_path / 'cache'}"]))
    assert not list((tmp_path / "cache").glob("shard-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["cache=null"], "cache.path is missing"),
        (["cache.kind=top_k"], "cache.top_k is the number of tokens"),
        (["cache.top_k=4"], "cache.top_k is the number of tokens"),
        (["cache.kind=top_k", "cache.top_k=4", "cache.dtype=int8"], "int8 is for hidden states"),
        (["cache.kind=top_k", "cache.top_k=400"], "more than the 300 tokens"),
        (["data.streaming=true", "data.validation=null", "train.max_steps=2"], "a cache could hold"),
        (["teacher.type=cached", "cache=null"], "teacher.path is missing"),
        (["teacher.path=x"], "teacher.path is for type cached"),
        (
            ["teacher.type=cached", "prefixes={student: 1}", "method=reverse_kl"],
            "knows the dataset's rows only",
        ),
        (["teacher.type=cached", "teacher.path=nowhere"], "There is no cache at nowhere"),
    ],
)
def test_mistakes_are_named(recipe, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_cache(load_recipe(recipe, [f"cache.path={tmp_path / 'cache'}", *changes]))


@pytest.mark.parametrize("alone", [True, False])
def test_rows_that_the_student_writes_are_in_no_cache(cache, tmp_path, alone):
    """From Python as from a recipe, before the student is looked for."""
    teacher = CachedTeacher(cache)
    if not alone:
        teacher = MixtureTeacher({"a": teacher, "b": SelfTeacher()}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="of type cached knows the dataset's rows only"):
        DistillTrainer(
            str(tmp_path / "nowhere"),
            teacher,
            method="reverse_kl",
            prefixes=Prefixes(student=0.5),
            args=DistillConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list([{"prompt": "say one:", "completion": " one"}]),
        )


def test_a_stream_is_trained_from_a_cache(recipe, cache, tmp_path):
    streamed = [
        "data.streaming=true",
        "data.validation=null",
        "teacher.type=cached",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert train(load_recipe(recipe, streamed))["steps"] == 4
    assert isinstance(CachedTeacher(cache).scores({}, _no_positions()), Scores)


def _no_positions():
    empty = torch.empty(0, dtype=torch.long)
    return TokenBatch(empty, empty, empty, torch.zeros((), dtype=torch.long))
