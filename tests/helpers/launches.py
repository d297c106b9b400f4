"""Launches of several processes, and how far what they found is from what one did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
# float32 sums in another order; Adam's first steps divide small gradients by their own size, which enlarges
# that.
WEIGHTS, METRICS = 2e-5, 5e-6
_NO_FIGURES = ("runtime", "per_second", "total_flos", "seconds", "num_tokens")


def launch(*arguments: Any, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m` with this checkout, on as many processes as the arguments say."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "TERM": "dumb",
    }
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def run_checks_on(processes: int, script: str, folder: Path, out: Path, *names: str) -> None:
    """Checks of a script of tests/helpers, which write what they found into `out`."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    done = launch(*torchrun, ROOT / "tests/helpers" / script, folder, out, *names, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]


def read(out: Path, name: str, processes: int) -> tuple[dict[str, Any], torch.Tensor]:
    """What a check reported, and the weights that it ended with."""
    stem = out / f"{name}-{processes}"
    return json.loads(Path(f"{stem}.json").read_text()), torch.load(f"{stem}.pt")


def largest_difference(logs: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Of all metrics of all logs; the logs must have the same names."""
    assert [set(log) for log in logs] == [set(log) for log in expected]
    pairs = [
        (log[name], other[name])
        for log, other in zip(logs, expected, strict=True)
        for name in log
        if not any(word in name for word in _NO_FIGURES)
    ]
    return max(abs(ours - theirs) for ours, theirs in pairs)


def logs_of(run: Path) -> list[dict[str, Any]]:
    """What a run folder logged."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> torch.Tensor:
    """All weights of the student in a run folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(run)
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


class Differences:
    """How far several processes were from one in each check, printed as a table behind a module's tests."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, float, float]] = []

    def add(self, name: str, processes: int, metric: float, weight: float) -> None:
        """The largest difference of a metric, and of a weight."""
        self._rows.append((name, processes, metric, weight))

    def check(
        self,
        name: str,
        processes: int,
        logs: tuple[list[dict[str, Any]], list[dict[str, Any]]],
        weights: tuple[torch.Tensor, torch.Tensor],
        bounds: tuple[float, float] = (METRICS, WEIGHTS),
    ) -> None:
        """Those between what the processes found and what one did, which must be below the bounds."""
        metric = largest_difference(*logs)
        weight = float((weights[0] - weights[1]).abs().max())
        self.add(name, processes, metric, weight)
        assert metric < bounds[0]
        assert weight < bounds[1]

    def check_launch(self, two: Path, one: Path) -> None:
        """Those between two run folders: a launch by accelerate on two processes, and one process."""
        runs = (two, one)
        logs, weights = (tuple(map(of, runs)) for of in (logs_of, weights_of))
        self.check("accelerate launch -m hpd train", 2, logs, weights)  # type: ignore[arg-type]
        assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}

    def print(self, request: pytest.FixtureRequest) -> None:
        """The table, if a check ran."""
        if not self._rows:
            return
        write = request.config.pluginmanager.getplugin("terminalreporter").write_line
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            write("\n| check | processes | largest difference of a metric | of a weight |\n|---|---|---|---|")
            for name, processes, metric, weight in self._rows:
                write(f"| {name} | {processes} against 1 | {metric:.1e} | {weight:.1e} |")
