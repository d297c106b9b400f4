"""Does reading a cache at an address keep up with training?

    python benchmarks/cache_origin.py

A cache of kind hidden (float16, width 576; random numbers, no model) lies in a file system of memory that
answers each request after a latency and at a bandwidth, requests of one call together, as object stores do.
Batches in random order are asked for one ahead, as a loader does, and each step sleeps as long as a student
would compute. What counts is the time that steps wait for an answer: in the first epoch, and in the second,
which reads from the window.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import torch
from fsspec.implementations.memory import MemoryFileSystem

from hpd.batch import TokenBatch
from hpd.teachers.cache import HEAD, read_json, save_index, save_shard
from hpd.teachers.cached import CachedTeacher

POSITIONS, WIDTH, ROWS_A_SHARD, BATCH = 128, 576, 40, 16


class ObjectStore(MemoryFileSystem):
    """Late, and of a finite rate."""

    protocol = "store"
    latency, bytes_per_second = 0.0, 1e12

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("store:/"))

    def cat_ranges(self, paths, starts, ends, **kwargs):
        time.sleep(
            self.latency + sum(b - a for a, b in zip(starts, ends, strict=True)) / self.bytes_per_second
        )
        return super().cat_ranges(paths, starts, ends, **kwargs)


def write(folder: Path, num_rows: int) -> None:
    """A cache whose keys are 0, 1, 2, ..."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    size = ROWS_A_SHARD * POSITIONS
    for number in range(num_rows // ROWS_A_SHARD):
        save_shard(folder, number, {"hidden": torch.randn(size, WIDTH).half(), "log_z": torch.randn(size)})
    save_file({"weight": torch.zeros(8, WIDTH)}, folder / HEAD)
    shards = [read_json(path) for path in sorted(folder.glob("shard-*.json"))]
    about = {"format": 1, "kind": "hidden", "vocab": 8, "head": {"scale": 1.0, "softcap": None}}
    about |= {"fingerprint": {"name": "none", "data": "none", "teacher": {}}}
    save_index(folder, np.arange(num_rows * POSITIONS), shards, about)


def epoch(teacher: CachedTeacher, num_rows: int, step_seconds: float, seed: int) -> list[float]:
    """Seconds that each step but the first waited."""
    order = np.random.default_rng(seed).permutation(num_rows).reshape(-1, BATCH)
    zero = torch.zeros(0)

    def ask(rows: np.ndarray):
        keys = torch.from_numpy((rows[:, None] * POSITIONS + np.arange(POSITIONS)).ravel())
        return teacher.ask({}, TokenBatch(zero, zero, keys, zero))

    waited, handle = [], ask(order[0])
    for following in [*order[1:], None]:
        began = time.perf_counter()
        teacher.wait(handle)
        waited.append(time.perf_counter() - began)
        handle = None if following is None else ask(following)
        time.sleep(step_seconds)
    return waited[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-seconds", type=float, default=0.3)
    parser.add_argument("--rows", type=int, default=320, help="a multiple of 80")
    args = parser.parse_args()
    fsspec.register_implementation("store", ObjectStore, clobber=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "cache"
        folder.mkdir()
        write(folder, args.rows)
        for file in folder.iterdir():
            ObjectStore().pipe_file(f"/cache/{file.name}", file.read_bytes())
        megabytes = BATCH * POSITIONS * (2 * WIDTH + 4) / 1e6
        print(f"{megabytes:.1f} MB a step of {args.step_seconds} s")
        print("| place | wait a step, first epoch (s) | second epoch |\n|---|---|---|")
        cases = {"folder": (0.0, 1e12), "20 ms, 1 GB/s": (0.02, 1e9), "100 ms, 100 MB/s": (0.1, 1e8)}
        cases["200 ms, 10 MB/s"] = (0.2, 1e7)
        for name, (latency, rate) in cases.items():
            ObjectStore.latency, ObjectStore.bytes_per_second = latency, rate
            teacher = CachedTeacher(folder if name == "folder" else "store://cache")
            waits = [
                statistics.median(epoch(teacher, args.rows, args.step_seconds, seed)) for seed in range(2)
            ]
            print(f"| {name} | {waits[0]:.3f} | {waits[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
