"""The formulas of scripts/scaling.py on cases that can be worked out by hand."""

import importlib.util
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/scaling.py"
_spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
scaling = importlib.util.module_from_spec(_spec)
sys.modules["scaling"] = scaling
_spec.loader.exec_module(scaling)

ROUND = scaling.Setup(
    student_params=1e9,
    teacher_params=2e9,
    student_hidden=1000,
    teacher_hidden=2000,
    vocab=100_000,
    tokens_per_gpu=1000,
    label_share=1.0,
    peak_tflops=100.0,
    mfu=0.5,
    nvlink_gbps=100.0,
    network_gbps=10.0,
    latency_us=0.0,
    overlap=0.0,
    layers=10,
)


@pytest.mark.parametrize("engine", scaling.ENGINES)
def test_one_gpu_has_no_communication_and_takes_the_arithmetic(engine):
    step = scaling.predict(replace(ROUND, engine=engine), 1)
    assert step.communication == step.latency == step.teacher_io == 0.0
    # 6 x 1e9 of the student, 2 x 2e9 of the teacher, 1,000 tokens at 50 TFLOP/s
    assert step.total == step.compute == pytest.approx(1000 * 10e9 / 50e12)


@pytest.mark.parametrize(
    ("engine", "gigabytes"),
    # half of: 2 x 4 bytes; 4 + 2; 2 x (3 x 1e9 + 2e9)
    [("ddp", 0.5 * 8), ("zero2", 0.5 * 6), ("fsdp2", 0.5 * 10), ("zero3", 0.5 * 10)],
)
def test_bytes_of_two_gpus(engine, gigabytes):
    setup = replace(ROUND, engine=engine)
    assert scaling.parameter_bytes(setup, 2) == pytest.approx(gigabytes * 1e9)
    assert scaling.predict(setup, 2).communication == pytest.approx(gigabytes / 100)


def test_beyond_a_node_the_network_carries_the_ring():
    within, beyond = (scaling.predict(replace(ROUND, engine="ddp"), gpus) for gpus in (8, 16))
    assert within.communication == pytest.approx(7 / 8 * 8 / 100)
    assert beyond.communication == pytest.approx(15 / 16 * 8 / 10)


def test_accumulation_spares_ddp_communication_but_not_fsdp2():
    for engine, factor in (("ddp", 1), ("fsdp2", 4)):
        once, often = (
            scaling.parameter_bytes(replace(ROUND, engine=engine, accumulation=n), 8) for n in (1, 4)
        )
        assert often == pytest.approx(factor * once)


def test_of_a_fixed_batch_time_falls_with_gpus_until_communication_bounds_it():
    setup = replace(ROUND, engine="ddp", global_tokens=1e5, network_gbps=100.0)
    times = [scaling.predict(setup, gpus).total for gpus in scaling.GPUS]
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
    assert times[-1] > 8 / 100  # the all-reduce of 8 bytes a parameter at 100 GB/s
    assert scaling.predict(setup, 8).bound == "arithmetic"
    assert scaling.predict(setup, 1024).bound == "communication"


def test_overlap_hides_communication_behind_arithmetic():
    setup = replace(ROUND, engine="ddp", tokens_per_gpu=10_000, overlap=1.0)
    assert scaling.predict(setup, 8).total == pytest.approx(scaling.predict(setup, 1).total)


def test_cached_teacher_reads_its_bytes_and_computes_only_its_head():
    setup = replace(ROUND, teacher="cached_hidden", storage_gbps=1.0)
    assert scaling.teacher_bytes_per_token(setup) == 2 * 2000 + 4
    assert scaling.flops_per_token(setup) == 6e9 + 2 * 100_000 * 2000
    few, many = (scaling.predict(setup, gpus) for gpus in (8, 1024))
    assert many.teacher_io == pytest.approx(128 * few.teacher_io)  # storage is shared
    assert many.bound == "teacher's data"
    assert many.total == many.teacher_io == pytest.approx(1024 * 1000 * 4004 / 1e9)
    top_k = replace(setup, teacher="cached_top_k", top_k=10)
    assert scaling.teacher_bytes_per_token(top_k) == 64


def test_sharding_divides_memory():
    assert scaling.bytes_per_gpu(replace(ROUND, engine="ddp"), 8) == 16e9 + 4e9
    assert scaling.bytes_per_gpu(replace(ROUND, engine="fsdp2"), 8) == 20e9 / 8


def test_the_script_explains_and_computes():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60
        )

    text = run("--help").stdout
    assert "--network-gbps" in text
    assert "GB/s per GPU between nodes" in text
    done = run("--engine", "ddp", "--student-params", "1e9")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2 + len(scaling.GPUS)
    assert "engine must be one of" in run("--engine", "horovod").stderr


def test_the_document_shows_what_the_script_computes():
    assert scaling.summary() in (SCRIPT.parents[1] / "docs/evidence/scaling.md").read_text()
