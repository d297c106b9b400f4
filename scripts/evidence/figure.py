"""The curves of scripts/gpu_evidence.py: held-out rows over the rows seen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence.report import chosen_rates
from evidence.settings import METHODS, Settings
from hpd.experiments.figures import Panel, to_files
from hpd.experiments.lines import Line, multiples_panel
from hpd.files import write_atomically

METRICS = {
    "forward_kl": "forward KL from the teacher, nats per label token",
    "student_entropy": "student's entropy, nats per label token",
}


def draw(lines: list[dict[str, Any]], settings: Settings, folder: Path) -> list[Path]:
    """Write one PNG per metric; their paths."""
    teacher = next((line for line in lines if line["role"] == "teacher"), None)
    paths = []
    for metric, title in METRICS.items():
        panel = _panel(metric, title, lines, settings, teacher)
        path = folder / f"one-gpu-{metric.replace('_', '-')}.png"
        image = to_files(panel)["png"]
        write_atomically(path, lambda draft, image=image: draft.write_bytes(image))
        paths.append(path)
    return paths


def _panel(
    metric: str,
    title: str,
    lines: list[dict[str, Any]],
    settings: Settings,
    teacher: Mapping[str, float] | None,
) -> Panel:
    rates = chosen_rates(lines, settings)
    plots: dict[str, dict[str, Line]] = {}
    for regime in settings.regimes:
        named = {}
        for method in METHODS:
            rate = rates.get(f"{method} {regime.name}", {}).get("rate")
            runs = [
                line["curve"]
                for line in lines
                if (line["role"], line.get("method"), line.get("regime")) == ("main", method, regime.name)
                and line["rate"] == rate
            ]
            named[method] = [_point(regime.rows, points, metric) for points in zip(*runs, strict=True)]
        plots[f"{regime.rows:,} rows, {regime.epochs} x"] = named
    level = None
    if teacher is not None and metric == "student_entropy":
        level = (teacher[metric],) * 3
    return multiples_panel(
        metric,
        title,
        plots,
        log=metric != "student_entropy",
        x_label="thousand rows seen",
        level=level,
        share_y=True,
        note=f"Bands: range over {settings.initializations} initializations.",
    )


def _point(rows: int, points: tuple[dict[str, float], ...], metric: str) -> tuple[float, float, float, float]:
    values = [point[metric] for point in points]
    seen = rows * points[0]["epoch"] / 1000
    return seen, statistics.mean(values), min(values), max(values)
