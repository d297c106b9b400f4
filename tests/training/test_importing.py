"""Teacher data of others and ours: round trips to the bit, training from it, and what did not match."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.cached_pairs import make_recipe
from helpers.cached_trainers import batches_of, trainer_of
from helpers.forked import hpd

from hpd import DistillConfig, DistillTrainer
from hpd.config import load_recipe
from hpd.files import write_atomically
from hpd.losses.teacher_side import teacher_logits
from hpd.methods.table import choose_terms
from hpd.teachers import CachedTeacher
from hpd.teachers.cache import Cache, read_about
from hpd.teachers.cached import scores_of_stored
from hpd.teachers.foreign import AxolotlFile, DistillKitFile, VllmFile
from hpd.teachers.foreign.distillkit import CONFIG
from hpd.training.caching import rows_trainer, write_cache
from hpd.training.exporting import export_cache
from hpd.training.importing import import_cache
from hpd.training.matching import recipe_rows
from hpd.training.plan import plan

K = 6
OPEN = {
    "distillkit": lambda folder: DistillKitFile(str(folder)),
    "axolotl": lambda folder: AxolotlFile(str(folder)),
    "vllm": lambda folder: VllmFile(str(folder / "rows.jsonl")),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("imported"))


@pytest.fixture(scope="module")
def ours(recipe):
    """A cache of the likeliest tokens, and the keys of all label positions."""
    wanted = load_recipe(recipe, ["cache.kind=top_k", f"cache.top_k={K}", "method=forward_kl"])
    path = write_cache(wanted).path
    keys = torch.cat([row.keys for row in recipe_rows(rows_trainer(plan(wanted)))])
    return path, keys.unique().numpy()


@pytest.fixture(
    scope="module",
    params=["distillkit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("axolotl", "vllm"))],
)
def there(request, recipe, ours, tmp_path_factory):
    """The name of a format, and our cache exported in it."""
    folder = tmp_path_factory.mktemp("exported") / request.param
    cached = load_recipe(recipe, ["teacher.type=cached", f"teacher.path={ours[0]}", "method=forward_kl"])
    export_cache(cached, request.param, folder)
    return request.param, folder


def bring(recipe, there, folder, *overrides, **options):
    form, source = there
    wanted = ["cache.kind=top_k", f"cache.top_k={K}", "cache.dtype=auto", f"cache.path={folder}", *overrides]
    return import_cache(load_recipe(recipe, wanted), OPEN[form](source), **options)


def test_a_round_trip_gives_every_bit_back(recipe, ours, there, tmp_path):
    summary = bring(recipe, there, tmp_path / "back")
    assert summary.unmatched is None
    assert summary.matched == summary.rows == 40
    before, after = (Cache(path).read(ours[1]) for path in (ours[0], tmp_path / "back"))
    names = ["tokens", "logprobs", *(["label_logprobs"] if there[0] == "vllm" else [])]
    for name in names:
        assert torch.equal(before[name], after[name]), name
    known = torch.isclose(before["label_logprobs"], after["label_logprobs"])
    assert int((~known).sum()) <= summary.labels_outside
    if there[0] == "vllm":
        # Importing again finds it whole; another file in its place is refused.
        assert bring(recipe, there, tmp_path / "back") == summary
        with pytest.raises(ValueError, match="another teacher"):
            bring(recipe, there, tmp_path / "back", guesses_labels=True)


@pytest.mark.slow
def test_training_learns_from_an_import_what_it_learns_from_our_cache(recipe, ours, there, tmp_path):
    folder = tmp_path / "back"
    bring(recipe, there, folder)
    found = []
    for i, path in enumerate((ours[0], folder)):
        words = ["teacher.type=cached", f"teacher.path={path}", "method=forward_kl"]
        trainer = trainer_of(recipe, tmp_path / f"run-{i}", *words)
        loss = trainer.compute_loss(trainer.model.train(), batches_of(trainer)[0])
        found.append(float(loss.detach()))
    # Labels beyond the k are an even share of the tail there, and known here.
    assert found[1] == pytest.approx(found[0], rel=0.2 if there[0] != "vllm" else 1e-5)


@pytest.fixture
def compressed(recipe, ours, tmp_path):
    """Our cache as DistillKit's rows."""
    cached = load_recipe(recipe, ["teacher.type=cached", f"teacher.path={ours[0]}", "method=forward_kl"])
    export_cache(cached, "distillkit", tmp_path / "theirs")
    return "distillkit", tmp_path / "theirs"


def test_an_export_that_is_interrupted_leaves_nothing_and_is_repeated(recipe, ours, tmp_path, monkeypatch):
    """Between the rows and the configuration that says what their bytes mean."""
    folder = tmp_path / "new" / "theirs"
    cached = load_recipe(recipe, ["teacher.type=cached", f"teacher.path={ours[0]}", "method=forward_kl"])

    def interrupted(path, content):
        if path.name == CONFIG:
            raise KeyboardInterrupt
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("hpd.teachers.foreign.writing.write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_cache(cached, "distillkit", folder)
    assert [*folder.parent.iterdir()] == []
    assert export_cache(cached, "distillkit", folder).rows > 0
    assert len(DistillKitFile(str(folder))) > 0


def test_methods_that_read_unknown_labels_are_refused_before_models_load(recipe, compressed, tmp_path):
    summary = bring(recipe, compressed, tmp_path / "back")
    assert 0 < summary.labels_outside < summary.positions
    words = ["teacher.type=cached", f"teacher.path={tmp_path / 'back'}"]
    with pytest.raises(ValueError, match=r"none of the 6 tokens that the file has.*reads the label"):
        plan(load_recipe(recipe, [*words, "method=hpd"]))
    plan(load_recipe(recipe, [*words, "method=forward_kl"]))
    # A cache that is written from it knows those labels no better.
    narrow = [
        "cache.kind=top_k",
        f"cache.top_k={K}",
        "cache.dtype=float16",
        f"cache.path={tmp_path / 'narrow'}",
    ]
    write_cache(load_recipe(recipe, [*words, *narrow, "method=forward_kl"]))
    with pytest.raises(ValueError, match=r"none of the 6 tokens that the file has.*reads the label"):
        plan(load_recipe(recipe, ["teacher.type=cached", f"teacher.path={tmp_path / 'narrow'}"]))
    # The Python door, where a teacher is an object.
    teacher = CachedTeacher(tmp_path / "back")
    for method in ("hpd", "label_forward_kl"):
        with pytest.raises(ValueError, match="reads the label"):
            teacher.check_terms(load_recipe(recipe, [f"method={method}"]).choose_terms())
    for method in ("forward_kl", "sft", "reverse_kl"):
        teacher.check_terms(load_recipe(recipe, [f"method={method}"]).choose_terms())
    # Rules over positions that compare both at the label, and rollouts that were stored, whose draw it is.
    for method in ("sod", "opd", "iw_opd"):
        with pytest.raises(ValueError, match="reads the label"):
            teacher.check_terms(choose_terms(method, {}, ()))
    with pytest.raises(ValueError, match="reads the label"):
        DistillTrainer(
            model=str(recipe.parent / "student"),
            teacher=teacher,
            method="hpd",
            args=DistillConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True),
            train_dataset=Dataset.from_list([{"prompt": "say one 0:", "completion": " one"}]),
        )


@pytest.mark.slow
def test_labels_may_be_guessed_on_request(recipe, compressed, tmp_path):
    bring(recipe, compressed, tmp_path / "guessed", guesses_labels=True)
    plan(load_recipe(recipe, ["teacher.type=cached", f"teacher.path={tmp_path / 'guessed'}", "method=hpd"]))


def test_rows_that_do_not_match_are_counted_and_those_that_do_are_written(recipe, compressed, tmp_path):
    rows = [json.loads(line) for line in (recipe.parent / "rows.jsonl").read_text().splitlines()]
    for row in rows[:5]:
        row["completion"] += " and more"
    other, kept = tmp_path / "other.jsonl", tmp_path / "kept.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.path={other}", "data.validation=null"]
    summary = bring(recipe, compressed, tmp_path / "back", *words, rows_path=kept)
    # Rows 1 to 4 occur again at the end, unchanged.
    assert (summary.rows, summary.matched) == (40, 35)
    assert summary.unmatched is not None
    assert " and" in summary.unmatched
    cached = ["teacher.type=cached", f"teacher.path={tmp_path / 'back'}", "method=forward_kl"]
    found = []
    for path in (other, kept):
        wanted = load_recipe(recipe, [*cached, f"data.path={path}", "data.validation=null"])
        found.append(torch.cat([row.keys for row in recipe_rows(rows_trainer(plan(wanted)))]).numpy())
    cache = Cache(tmp_path / "back")
    assert cache.missing(found[0]).any()
    assert len(found[1])
    assert not cache.missing(found[1]).any()


@pytest.mark.slow
def test_every_set_of_validation_rows_is_exported_and_imported(recipe, tmp_path):
    lines = (recipe.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("train", lines[:8]), ("near", lines[8:11]), ("far", lines[11:15])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sets = {name: str(tmp_path / f"{name}.jsonl") for name in ("near", "far")}
    data = {"path": str(tmp_path / "train.jsonl"), "validation": sets}
    words = [f"data={json.dumps(data)}", "cache.kind=top_k", f"cache.top_k={K}", "method=forward_kl"]
    ours = write_cache(load_recipe(recipe, [*words, f"cache.path={tmp_path / 'ours'}"])).path
    cached = load_recipe(recipe, [*words, "teacher.type=cached", f"teacher.path={ours}"])
    assert export_cache(cached, "vllm", tmp_path / "theirs").rows == 15
    wanted = load_recipe(recipe, [*words, "cache.dtype=auto", f"cache.path={tmp_path / 'back'}"])
    summary = import_cache(wanted, VllmFile(str(tmp_path / "theirs")))
    assert (summary.rows, summary.matched, summary.labels_outside, summary.places_short) == (15, 15, 0, 0)
    assert np.array_equal(Cache(ours)._keys, Cache(tmp_path / "back")._keys)


def test_lists_of_unequal_lengths_take_an_even_share_of_what_is_left(recipe, tmp_path):
    """Positions with 3 and with 1 of the k tokens: what is told stays, tokens differ, all sums to one."""
    (row, *_) = [row for row in recipe_rows(rows_trainer(plan(load_recipe(recipe)))) if len(row.places) > 1]
    lists = {"target_logprobs": [], "target_token_ids": [], "target_mask": []}
    labels = [-100] * len(row.ids)
    for token in range(len(row.ids)):
        if token - 1 in row.places:
            labels[token] = int(row.ids[token])
        count = 3 if token == row.places[0] + 1 else 1
        lists["target_logprobs"].append([-1.0, -2.0, -3.0][:count])
        lists["target_token_ids"].append([1, 40, 0][:count])
        lists["target_mask"].append([int(labels[token] != -100)] * count)
    Dataset.from_list([{"input_ids": row.ids.tolist(), "labels": labels, **lists}]).to_parquet(
        tmp_path / "r.parquet"
    )
    words = ["cache.dtype=auto", f"cache.path={tmp_path / 'c'}", "method=forward_kl"]
    summary = import_cache(load_recipe(recipe, words), AxolotlFile(str(tmp_path / "r.parquet")))
    assert summary.places_short == summary.positions - 1 > 0
    teacher = CachedTeacher(tmp_path / "c")
    stored = teacher.cache.read(row.keys.numpy())
    assert stored["tokens"][0].tolist() == [1, 40, 0]
    assert stored["tokens"][1].tolist() == [1, 0, 2]
    assert stored["logprobs"][:, 0].tolist() == [-1.0] * len(row.keys)
    rest = math.log((1 - math.exp(-1.0)) / (teacher.vocab - 1))
    assert stored["logprobs"][1, 1:].tolist() == pytest.approx([rest] * 2, rel=1e-6)
    scores = scores_of_stored(stored, "top_k", teacher.vocab, None)
    whole = teacher_logits(scores, row.labels, teacher.vocab, torch.zeros(1))
    assert whole.exp().sum(-1).tolist() == pytest.approx([1.0] * len(row.keys), rel=1e-5)


def test_another_template_finds_nothing_and_says_where_rows_part(recipe, compressed, tmp_path):
    with pytest.raises(ValueError, match=r"None of the 40 rows .* for \d+ tokens"):
        bring(recipe, compressed, tmp_path / "back", "data.format=chat")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["cache.top_k=7"], "cache.top_k is 7"),
        (["cache.dtype=float16"], "keeps the file's numbers"),
        (["teacher.prompt=x {prompt}"], "without a prompt of its own"),
    ],
)
@pytest.mark.slow
def test_settings_without_effect_are_refused(recipe, compressed, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        bring(recipe, compressed, tmp_path / "back", *changes)


@pytest.mark.slow
def test_fewer_tokens_are_kept_on_request(recipe, ours, compressed, tmp_path):
    bring(recipe, compressed, tmp_path / "back", "cache.top_k=2")
    before, after = (Cache(path).read(ours[1]) for path in (ours[0], tmp_path / "back"))
    assert torch.equal(before["tokens"][:, :2], after["tokens"])


@pytest.mark.slow
def test_the_commands_of_a_stranger(recipe, ours, tmp_path):
    out = tmp_path / "theirs"
    cached = ("teacher.type=cached", f"teacher.path={ours[0]}", "method=forward_kl")
    written = hpd("export", str(recipe), *cached, "--format", "distillkit", "--output", str(out))
    assert written.returncode == 0, written.stderr
    assert "none of the k tokens" in written.stdout
    words = ("cache.dtype=auto", f"cache.path={tmp_path / 'back'}", "method=forward_kl")
    done = hpd("import", str(recipe), str(out), "--format", "distillkit", *words)
    assert done.returncode == 0, done.stderr
    assert "40 of 40 rows found" in done.stdout
    assert "mass outside the k tokens" in done.stdout
    about = read_about(tmp_path / "back")
    assert about["fingerprint"]["teacher"]["imported"]["from"] == str(out)
    wrong = hpd("import", str(recipe), str(out), "--format", "distillkit", "--about", "next", *words)
    assert wrong.returncode == 2
    assert "--about is for --format axolotl" in wrong.stderr
