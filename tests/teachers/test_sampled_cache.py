"""A cache of kind sampled: the same draws however they are written, what it serves, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.cached_pairs import files_of, make_recipe
from helpers.cached_trainers import batches_of, trainer_of

from hpd.config import load_recipe
from hpd.losses.products import logits
from hpd.progress import Progress
from hpd.teachers import CachedTeacher
from hpd.teachers.cache import Cache
from hpd.training.caching import rows_trainer, write_cache
from hpd.training.matching import recipe_rows
from hpd.training.plan import plan

N = 4
SAMPLED = ("cache.kind=sampled", f"cache.draws={N}", "cache.dtype=auto", "cache.shard_bytes=3000")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("sampled"))


def write(recipe, folder, *words):
    return write_cache(load_recipe(recipe, [*SAMPLED, f"cache.path={folder}", "method=forward_kl", *words]))


@pytest.fixture(scope="module")
def cache(recipe, tmp_path_factory):
    return write(recipe, tmp_path_factory.mktemp("caches") / "one")


@pytest.fixture(scope="module")
def keys(recipe):
    rows = recipe_rows(rows_trainer(plan(load_recipe(recipe))))
    return torch.cat([row.keys for row in rows]).unique().numpy()


def test_bytes_and_weights_of_a_position(cache, keys):
    assert cache.bytes_per_position == N * 6 + 4
    stored = Cache(cache.path).read(keys)
    assert {name: str(t.dtype) for name, t in stored.items()} == {
        "tokens": "torch.int32",
        "logprobs": "torch.float16",
        "label_logprobs": "torch.float32",
    }
    weights = stored["logprobs"].double().exp()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(keys)).double(), rtol=0, atol=3e-3)


class Saying(Progress):
    def __init__(self):
        self.said: list[str] = []

    def say(self, text):
        self.said.append(text)


@pytest.mark.parametrize(
    "kind", ["cache.kind=hidden", "cache.kind=top_k cache.top_k=2", "cache.kind=sampled"]
)
def test_the_size_that_is_announced_is_what_is_written(recipe, tmp_path, kind):
    words = kind.split() + ([f"cache.draws={N}"] if "sampled" in kind else [])
    folder, progress = tmp_path / "cache", Saying()
    loaded = load_recipe(recipe, [f"cache.path={folder}", "method=forward_kl", "cache.dtype=auto", *words])
    write_cache(loaded, progress=progress)
    (announced,) = re.findall(r"; ([\d.,]+) kB to write", " ".join(progress.said))
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert float(announced) * 1000 == pytest.approx(written, rel=0.12)  # headers: some hundred bytes a file
    write_cache(loaded, progress=progress)
    assert progress.said[-1].endswith("; 0 bytes to write")


def test_an_interrupted_cache_is_the_same_to_the_byte(recipe, cache, tmp_path):
    write(recipe, tmp_path / "cut")
    shards = sorted((tmp_path / "cut").glob("shard-*"))
    assert len(shards) >= 4
    (tmp_path / "cut" / "cache.json").unlink()
    for file in shards[2:4]:
        file.unlink()
    write(recipe, tmp_path / "cut")
    here, there = files_of(tmp_path / "cut"), files_of(cache.path)
    assert {n for n in here if here[n] != there[n]} <= {"plan.json"}


@pytest.mark.slow
def test_draws_depend_on_seed_and_position_and_not_on_the_batch(recipe, cache, keys, tmp_path):
    alone = write(
        recipe, tmp_path / "alone", "train.per_device_eval_batch_size=1", "cache.shard_bytes=999999"
    )
    other = write(recipe, tmp_path / "other", "cache.seed=1")
    one, two, three = (Cache(c.path).read(keys)["tokens"] for c in (cache, alone, other))
    # Rounding of a forward in another batch may move a draw over an edge, once in many thousands.
    assert (one == two).double().mean() > 0.999
    assert (one == three).double().mean() < 0.9


@pytest.mark.slow
def test_estimates_over_many_seeds_have_the_teachers_mean(recipe, keys, tmp_path):
    """Through the files: the mean weight of 60 caches is the teacher's, with the variance of the formula."""
    live = trainer_of(recipe, tmp_path / "live")
    inputs = batches_of(live)[0]
    from hpd.batch import TokenBatch

    batch = TokenBatch.pop(inputs)
    p = logits(live.teacher.scores(inputs, batch)).double().softmax(-1)
    found = []
    for seed in range(60):
        written = write(recipe, tmp_path / f"{seed}", f"cache.seed={seed}", "cache.dtype=float32")
        scores = CachedTeacher(written.path).scores({}, batch)
        found.append(torch.zeros_like(p).scatter_(1, scores.tokens, scores.logprobs.double().exp()))
    estimates = torch.stack(found)
    error = estimates.mean(0) - p
    shared = estimates.where(estimates > 0, torch.inf).amin((0, 2))[:, None]  # 1 / c: the smallest weight
    certain = p > shared * (1 + 1e-6)
    torch.testing.assert_close(error[certain], torch.zeros_like(error[certain]), rtol=0, atol=1e-5)
    # The others have the variance p (1 / c - p). Tokens that 60 caches hold once or never say little alone.
    often = ~certain & (len(found) * p > 0.5 * shared) & (p < 0.99 * shared)
    assert int(often.sum()) > 200
    squares = (error.square() / (p * (shared - p) / len(found)))[often]
    assert 0.7 < float(squares.mean()) < 1.4  # 1 but for chance: 0.1 or so for 200 of them
    # Sums over the rare ones, where a bias of each would add up.
    assert abs(float((error * ~certain).sum(-1).mean())) < 1e-4


def test_what_it_cannot_serve_is_refused_before_models_load(recipe, cache):
    words = ["teacher.type=cached", f"teacher.path={cache.path}"]
    with pytest.raises(
        ValueError, match=r"drawn from the teacher.*term hpd reads the teacher on the support"
    ):
        plan(load_recipe(recipe, [*words, "method=hpd"]))
    teacher = CachedTeacher(cache.path)
    for method in ("reverse_kl", "generalized_jsd", "hpd_full", "akl", "seqkd_kl"):
        try:
            terms = load_recipe(recipe, [f"method={method}"]).choose_terms()
        except ValueError:
            continue
        with pytest.raises(ValueError, match="drawn from the teacher|not both at once"):
            teacher.check_terms(terms)
    for method in ("forward_kl", "sft", "label_jsd", "label_reverse_kl"):
        teacher.check_terms(load_recipe(recipe, [f"method={method}"]).choose_terms())


@pytest.mark.parametrize(
    "words",
    [
        ["cache.kind=top_k", f"cache.top_k={N}"],  # draws are not the likeliest tokens
        ["cache.kind=sampled", "cache.draws=2"],
        ["cache.kind=hidden"],
    ],
)
def test_no_cache_is_written_from_draws(recipe, cache, tmp_path, words):
    there = ["teacher.type=cached", f"teacher.path={cache.path}", "method=forward_kl", "cache=null"]
    with pytest.raises(ValueError, match="is of kind sampled: kind .* needs hidden states or whole"):
        write_cache(load_recipe(recipe, [*there, f"cache.path={tmp_path / 'other'}", *words]))
    assert not (tmp_path / "other").exists()


def test_a_top_k_cache_gives_its_own_tokens_and_no_others(recipe, tmp_path):
    words = ["cache.kind=top_k", "cache.top_k=3", "method=forward_kl", "cache.draws=null"]
    there = write_cache(load_recipe(recipe, [*words, f"cache.path={tmp_path / 'first'}"])).path
    words = [*words, "teacher.type=cached", f"teacher.path={there}", f"cache.path={tmp_path / 'other'}"]
    for change, said in (
        (["cache.top_k=2"], "cache.top_k is 2, and each position there has 3"),
        (["cache.kind=sampled", "cache.top_k=null", "cache.draws=2"], "kind sampled needs"),
    ):
        with pytest.raises(ValueError, match=said):
            write_cache(load_recipe(recipe, [*words, *change]))
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("metric", ["forward_kl", "acceptance"])
def test_what_draws_cannot_measure_chooses_no_best_model(recipe, cache, tmp_path, metric):
    words = ("teacher.type=cached", f"teacher.path={cache.path}", "method=forward_kl")
    trainer = trainer_of(recipe, tmp_path / "run", *words)
    assert {"loss", "student_entropy"} <= trainer.evaluation_names()
    trainer.args.metric_for_best_model = metric
    with pytest.raises(ValueError, match=f"metric_for_best_model is '{metric}', which no evaluation has"):
        trainer.train()


def test_the_overlap_of_likeliest_tokens_is_refused(recipe, cache, tmp_path):
    words = ("teacher.type=cached", f"teacher.path={cache.path}", "method=forward_kl")
    with pytest.raises(ValueError, match=r"guards.support_overlap compares with the teacher's likeliest"):
        trainer_of(recipe, tmp_path / "run", *words, "guards.support_overlap.warn=0.5")


def test_training_reads_it(recipe, cache, tmp_path):
    words = ("teacher.type=cached", f"teacher.path={cache.path}", "method=forward_kl")
    trainer = trainer_of(recipe, tmp_path / "run", *words)
    loss = trainer.compute_loss(trainer.model.train(), batches_of(trainer)[0])
    loss.backward()
    assert 0 < float(loss.detach()) < 20
    assert {"reverse_kl", "teacher_entropy"}.isdisjoint(trainer.evaluate())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cache.kind=sampled"], "cache.draws is the number"),
        (["cache.draws=3"], "cache.draws is the number"),
        (["cache.seed=3"], "cache.seed is for the draws"),
        (["cache.kind=sampled", "cache.draws=3", "cache.dtype=int8"], "int8 is for hidden states"),
    ],
)
def test_settings_without_effect_are_refused(recipe, words, said):
    with pytest.raises(ValueError, match=said):
        load_recipe(recipe, words)
