"""Caches under a hostile world: processes killed at any moment, disks that lose bits, other numbers of
processes."""

from __future__ import annotations

import os
import random
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers.cached_pairs import THREADS, files_of, make_recipe, write_here, write_in_world
from helpers.forked import context
from transformers import TrainerCallback

from hpd.config import load_recipe
from hpd.progress import Progress
from hpd.teachers import CachedTeacher
from hpd.teachers.cache import Cache, CorruptCacheError
from hpd.training import caching as cache_writer
from hpd.training.caching import write_cache
from hpd.training.run import train
from hpd.training.stopping import RunStopped


@pytest.fixture(autouse=True)
def threads_of_the_processes():
    """Bytes are compared across processes, and the last bit of a product may depend on the number of
    threads."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def processes():
    return context()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(recipe, processes):
    """A cache written in one life, and how long that took."""
    folder = recipe.parent / "cache"
    _live(processes, recipe)  # imports and the datasets' own cache are paid for
    shutil.rmtree(folder)
    started = time.perf_counter()
    _live(processes, recipe)
    return folder, time.perf_counter() - started


def _live(processes, recipe, *overrides, kill_after=None):
    process = processes.Process(target=write_here, args=(recipe, *overrides))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
        return False
    assert process.exitcode == 0
    return True


def _killed_and_resumed(processes, recipe, undisturbed, folder, kills, seed):
    """Kill `hpd cache` at random moments, then let it finish; shards that stood must not be written again."""
    reference, seconds = undisturbed
    moments, partial = random.Random(seed), 0
    for _ in range(kills):
        before = {
            path: path.stat().st_mtime_ns
            for path in folder.glob("shard-*.safetensors")
            if path.with_suffix(".json").exists()
        }
        finished = _live(
            processes, recipe, f"cache.path={folder}", kill_after=moments.uniform(0.0, 1.1 * seconds)
        )
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
        partial += (
            folder.is_dir()
            and len(list(folder.glob("shard-*.json"))) > 0
            and not (folder / "cache.json").exists()
        )
        if finished:
            assert files_of(folder) == files_of(reference)
            shutil.rmtree(folder)
    _live(processes, recipe, f"cache.path={folder}")
    assert files_of(folder) == files_of(reference)
    return partial


def test_killed_at_random_moments_then_resumed(recipe, processes, undisturbed, tmp_path):
    _killed_and_resumed(processes, recipe, undisturbed, tmp_path / "cache", kills=4, seed=0)


@pytest.mark.slow
def test_killed_many_times_then_resumed(recipe, processes, undisturbed, tmp_path):
    partial = 0
    for round_ in range(5):
        partial += _killed_and_resumed(
            processes, recipe, undisturbed, tmp_path / str(round_), kills=8, seed=round_
        )
    assert partial >= 3, "no kill fell between two shards: make the cache larger"


class Killed(BaseException):
    pass


def test_killed_between_any_two_files_then_resumed(recipe, undisturbed, tmp_path, monkeypatch):
    """The same without chance: stop before every single rename."""
    reference, _ = undisturbed
    folder, replace, left = tmp_path / "cache", os.replace, [0]

    def until(source, target):
        if folder in Path(target).parents:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", until)
    num_shards = len(list(reference.glob("shard-*.safetensors")))
    # plan, head, teacher.json, two files a shard, index, cache.json
    for allowed in range(0, 2 * num_shards + 5, 3):
        left[0] = allowed
        with pytest.raises(Killed):
            write_cache(load_recipe(recipe, [f"cache.path={folder}"]))
        with pytest.raises(ValueError, match="unfinished" if allowed else "no cache"):
            CachedTeacher(folder)
        left[0] = 1000
        write_cache(load_recipe(recipe, [f"cache.path={folder}"]))
        assert files_of(folder) == files_of(reference)
        shutil.rmtree(folder)


def test_a_resumed_writer_asks_in_the_batches_of_an_undisturbed_one(recipe, tmp_path, monkeypatch):
    """What makes the bytes equal where the machine and its number of threads are."""
    answers, save_shard, asked, saved = cache_writer._answers, cache_writer.save_shard, [], []

    def recording(teacher, trainer, layout, rows, chosen):
        asked.append(tuple(layout.rows[chosen].tolist()))
        return answers(teacher, trainer, layout, rows, chosen)

    def saving(*arguments):
        if len(saved) == stop_at:
            raise Killed
        saved.append(arguments)
        save_shard(*arguments)

    monkeypatch.setattr(cache_writer, "_answers", recording)
    monkeypatch.setattr(cache_writer, "save_shard", saving)
    loaded, stop_at = (
        load_recipe(recipe, [f"cache.path={tmp_path}", "train.per_device_eval_batch_size=3"]),
        -1,
    )
    write_cache(loaded)
    # The first is asked for the head.
    first, *undisturbed = asked
    assert len(undisturbed) > len(saved) > 4
    assert max(map(len, undisturbed)) == 3
    for stop_at in (1, 3):
        asked.clear()
        saved.clear()
        with pytest.raises(Killed):
            write_cache(loaded, overwrite=True)
        before, stopped_at, stop_at = asked[1:], len(saved), -1
        asked.clear()
        saved.clear()
        write_cache(loaded)
        assert asked[0] == first
        # The shard that was not saved is asked for again, from its start.
        again = len(before) + len(asked[1:]) - len(undisturbed)
        assert stopped_at == len(list(tmp_path.glob("shard-*.safetensors"))) - len(saved)
        assert again > 0
        assert before[:-again] + asked[1:] == undisturbed


def test_another_number_of_threads_changes_no_more_than_rounding(undisturbed, recipe, tmp_path):
    reference, _ = undisturbed
    torch.set_num_threads(THREADS + 1)
    shutil.copytree(reference, tmp_path / "cache")
    for name in ("shard-00001.safetensors", "cache.json"):
        (tmp_path / "cache" / name).unlink()
    write_cache(load_recipe(recipe, [f"cache.path={tmp_path / 'cache'}"]))
    here, there = _read_everything(tmp_path / "cache"), _read_everything(reference)
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-5)


def test_two_processes_write_the_same_cache_and_finish_one_anothers(recipe, processes, undisturbed, tmp_path):
    reference, _ = undisturbed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "cache"
    shutil.copytree(reference, folder)
    for name in (
        "shard-00001.json",
        "shard-00002.safetensors",
        "cache.json",
        "index.safetensors",
        "head.safetensors",
    ):
        (folder / name).unlink()
    team = [
        processes.Process(target=write_in_world, args=(rank, 2, port, recipe, f"cache.path={folder}"))
        for rank in range(2)
    ]
    for process in team:
        process.start()
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [0, 0]
    assert files_of(folder) == files_of(reference)


def _read_everything(folder):
    teacher = CachedTeacher(folder)
    return teacher.cache.read(teacher.cache._keys)


def test_a_flipped_bit_is_always_detected(undisturbed, tmp_path):
    reference, _ = undisturbed
    dice = random.Random(1)
    read = [
        name
        for name in files_of(reference)
        if not name.startswith(("plan", "teacher.json")) and not _is_description(name)
    ]
    for name in [*read, *dice.choices(read, k=40)]:
        folder = tmp_path / "cache"
        shutil.copytree(reference, folder)
        content = bytearray((folder / name).read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|cannot be read|misses|format"):
            _read_everything(folder)
        shutil.rmtree(folder)


def _is_description(name):
    return name.startswith("shard-") and name.endswith(".json")


def test_only_what_a_flipped_bit_touches_is_refused(undisturbed, tmp_path):
    reference, _ = undisturbed
    shutil.copytree(reference, tmp_path / "cache")
    file = tmp_path / "cache" / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    cache = Cache(tmp_path / "cache")
    starts = cache._starts
    of_first = cache._keys[(cache._places >= starts[0]) & (cache._places < starts[1])]
    assert len(cache.read(of_first)["log_z"]) == len(of_first)
    with pytest.raises(CorruptCacheError, match="shard-00001.*damaged"):
        cache.read(cache._keys)
    with pytest.raises(CorruptCacheError, match="shard-00001.*damaged"):
        cache.verify()


@pytest.mark.parametrize(
    "name", ["shard-00001.safetensors", "index.safetensors", "head.safetensors", "teacher/config.json"]
)
def test_cut_and_missing_files_are_found_before_training(undisturbed, tmp_path, name):
    reference, _ = undisturbed
    shutil.copytree(reference, tmp_path / "cache")
    file = tmp_path / "cache" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match=r"cut or changed"):
        CachedTeacher(tmp_path / "cache")
    file.unlink()
    with pytest.raises(CorruptCacheError, match=f"misses {name}"):
        CachedTeacher(tmp_path / "cache")


class Cutting(Progress, TrainerCallback):
    """Cuts the files of a cache that training reads from."""

    def __init__(self, files):
        self.files = files

    def callbacks(self):
        return [self]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for file in self.files:
                os.truncate(file, 100)


@pytest.mark.parametrize(
    ("pattern", "workers"),
    [("shard-*.safetensors", 0), ("shard-*.safetensors", 1), ("index.*", 0), ("head.*", 0)],
)
def test_files_that_are_cut_in_the_middle_of_a_run_end_it_with_a_checkpoint(
    recipe, undisturbed, tmp_path, pattern, workers
):
    """Not the process, as a mapped file does (SIGBUS)."""
    shutil.copytree(undisturbed[0], tmp_path / "cache")
    more = [f"teacher={{type: cached, path: {tmp_path / 'cache'}}}", f"output_dir={tmp_path / 'run'}"]
    loaded = load_recipe(recipe, [*more, f"train.dataloader_num_workers={workers}", "train.max_steps=12"])
    files = list((tmp_path / "cache").glob(pattern))
    assert files
    if pattern == "head.*":  # it is in memory
        assert train(loaded, progress=Cutting(files))["steps"] == 12
        return
    with pytest.raises(RunStopped, match=r"it was cut\. Run hpd cache .* the checkpoint of step") as stopped:
        train(loaded, progress=Cutting(files))
    assert "Traceback" not in str(stopped.value)
    for file in files:
        shutil.copy(undisturbed[0] / file.name, file)
    assert train(loaded)["steps"] == 12


def test_a_damaged_cache_is_repaired_by_writing_it_again(recipe, undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / "cache"
    for name in (
        "shard-00000.safetensors",
        "shard-00002.json",
        "cache.json",
        "head.safetensors",
        "teacher/config.json",
    ):
        shutil.copytree(reference, folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
        write_cache(load_recipe(recipe, [f"cache.path={folder}"]))
        assert files_of(folder) == files_of(reference), name
        shutil.rmtree(folder)
    shutil.copytree(reference, folder)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="delete it with --overwrite"):
        write_cache(load_recipe(recipe, [f"cache.path={folder}"]))
    write_cache(load_recipe(recipe, [f"cache.path={folder}"]), overwrite=True)
    assert files_of(folder) == files_of(reference)


def test_a_folder_of_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no cache of hpd"):
        write_cache(load_recipe(recipe, [f"cache.path={tmp_path}"]), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
