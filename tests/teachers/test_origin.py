"""Caches at an address: what a folder says, through ranges that are fetched, kept and checked."""

from __future__ import annotations

import pickle
import time

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers.cached_pairs import make_recipe

from hpd.config import load_recipe
from hpd.teachers import origin
from hpd.teachers.cache import Cache, CorruptCacheError, read_about
from hpd.teachers.origin import Origin
from hpd.training.caching import rows_trainer, write_cache
from hpd.training.matching import recipe_rows
from hpd.training.plan import plan

DELAY = 0.02


class SlowFileSystem(MemoryFileSystem):
    """Answers every request late, requests of one call together."""

    protocol = "slow"
    store = MemoryFileSystem.store
    requests = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("slow:/"))

    def cat_ranges(self, paths, starts, ends, **kwargs):
        time.sleep(DELAY)
        SlowFileSystem.requests += 1
        return super().cat_ranges(paths, starts, ends, **kwargs)


fsspec.register_implementation("slow", SlowFileSystem, clobber=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache in a folder, its recipe and the keys of its positions."""
    recipe = make_recipe(tmp_path_factory.mktemp("origin"))
    summary = write_cache(load_recipe(recipe))
    rows = recipe_rows(rows_trainer(plan(load_recipe(recipe))))
    return summary.path, recipe, torch.cat([row.keys for row in rows]).numpy()


@pytest.fixture
def address(folder, tmp_path, monkeypatch):
    """The same in a file system of memory."""
    monkeypatch.setattr(origin, "_COPIES", tmp_path / "copies")
    SlowFileSystem.requests = 0
    root = f"/{tmp_path.name}"
    system = fsspec.filesystem("slow")
    for file in folder[0].rglob("*"):
        if file.is_file():
            system.pipe_file(f"{root}/{file.relative_to(folder[0])}", file.read_bytes())
    yield f"slow:/{root}"
    system.rm(root, recursive=True)


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_says_what_the_folder_says(folder, address):
    path, _, keys = folder
    here, there = Cache(path), Cache(address)
    assert there.about == here.about == read_about(address)
    some = keys[np.random.default_rng(0).permutation(len(keys))[:60]]
    equal(there.read(some), here.read(some))
    assert torch.equal(there.head.weight, here.head.weight)
    requests = SlowFileSystem.requests
    equal(there.read(some), here.read(some))  # out of the window
    assert SlowFileSystem.requests == requests
    equal(pickle.loads(pickle.dumps(there)).read(some), here.read(some))  # as a loader's worker has it
    assert SlowFileSystem.requests > requests


def test_the_window_bounds_what_is_kept(folder, address):
    path, _, keys = folder
    there = Cache(address)
    assert there._origin is not None
    there._origin = Origin(address, window_bytes=20_000)
    for start in range(0, len(keys), 20):
        equal(there.read(keys[start : start + 20]), Cache(path).read(keys[start : start + 20]))
        assert there._origin._held <= 20_000
        assert there._origin._held == sum(map(len, there._origin._window.values()))


def test_a_changed_bit_elsewhere_is_found(folder, address):
    system = fsspec.filesystem("slow")
    name = address.removeprefix("slow:/") + "/shard-00000.safetensors"
    content = bytearray(system.cat_file(name))
    content[-5] ^= 1
    system.pipe_file(name, bytes(content))
    with pytest.raises(CorruptCacheError, match="damaged at positions"):
        Cache(address).read(folder[2])
    system.pipe_file(name, bytes(content[:-20]))
    with pytest.raises(CorruptCacheError, match=r"cannot be read: slow\S+ gave [\d,]+ of the [\d,]+ bytes"):
        Cache(address).read(folder[2])


def test_wrong_addresses_are_one_paragraph(folder, address):
    with pytest.raises(ValueError, match="There is no cache at slow:/"):
        read_about(address + "/none")
    with pytest.raises(ValueError, match="cannot be opened"):
        read_about("nonsense://bucket/cache")
    with pytest.raises(ValueError, match="is not a folder: write to one"):
        write_cache(load_recipe(folder[1], ["cache.path=s3://bucket/cache"]))


def test_a_recipe_names_an_address(folder, address):
    planned = plan(load_recipe(folder[1], ["teacher.type=cached", f"teacher.path={address}"]))
    assert "teacher" in planned.teacher_configs
