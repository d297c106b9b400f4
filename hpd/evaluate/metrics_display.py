"""`hpd eval --metrics`: load a student and its teacher, measure, print, write."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hpd.display import console, progress_bar

__all__ = ["MetricsRequest", "measure_with_display", "metrics_table"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsRequest:
    """What the command line asks for."""

    student: str
    teacher: str | None
    data: Path
    metrics: Sequence[str]
    texts: Sequence[str]
    vocabulary: str
    limit: int | None
    settings: Mapping[str, Any]
    """Fields of `GenerationSettings` for the student's own texts."""
    output: Path | None
    dtype: str


def measure_with_display(request: MetricsRequest) -> dict[str, Any]:
    """Measure, show the table, and write `metrics.json` into the output folder; everything is checked before models load."""
    from hpd.evaluate.distribution import check_metrics, read_text_rows
    from hpd.evaluate.settings import GenerationSettings
    from hpd.pairing import POLICIES

    check_metrics(request.metrics, request.texts, request.teacher is not None)
    if request.vocabulary not in POLICIES:
        raise ValueError(f"vocabulary must be one of {', '.join(POLICIES)}, got {request.vocabulary!r}.")
    settings = GenerationSettings(**{"temperature": 1.0, "max_new_tokens": 256, **request.settings})
    rows = read_text_rows(request.data, limit=request.limit)
    if request.output is not None and request.output.exists() and not request.output.is_dir():
        raise ValueError(f"{request.output} is a file; --output names a folder.")
    report = _measure(request, settings, rows)
    console.print(metrics_table(report))
    if request.output is not None:
        entry = {
            "student": request.student, "teacher": request.teacher, "data": str(request.data), "metrics": list(request.metrics),
            "settings": dataclasses.asdict(settings), **report,
        }  # fmt: skip
        console.print(f"figures in {_write(request.output, entry)}", highlight=False)
    return report


def _measure(request: MetricsRequest, settings: Any, rows: Any) -> dict[str, Any]:
    import torch

    from hpd.config import ModelConfig
    from hpd.evaluate.distribution import distribution_metrics
    from hpd.models import load_model, load_tokenizer
    from hpd.train import quiet_libraries

    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = {"student": request.student, **({} if request.teacher is None else {"teacher": request.teacher})}
    sources = {role: ModelConfig(model=path, dtype=request.dtype) for role, path in paths.items()}  # type: ignore[arg-type]
    tokenizers = {role: load_tokenizer(source, role) for role, source in sources.items()}
    models: dict[str, Any] = {role: load_model(source, role).to(device) for role, source in sources.items()}  # type: ignore[arg-type]
    bars: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.setdefault(stage, progress_bar(stage))(done, total)

    return distribution_metrics(
        models["student"], models.get("teacher"), tokenizers["student"], rows, request.metrics, settings,
        texts=request.texts, teacher_tokenizer=tokenizers.get("teacher"), vocabulary=request.vocabulary, progress=progress,
    )  # fmt: skip


def metrics_table(report: Mapping[str, Any]) -> Table:
    """One row per figure, one column per text."""
    texts = [text for text in ("dataset", "student", "gap") if text in report]
    headings = {"dataset": "data set", "student": "student's own", "gap": "gap"}
    lost = sum(report[text].get("labels_dropped", 0) for text in texts)
    title = f"{report['num_rows']} rows" + (f", {lost} label tokens dropped" if lost else "")
    table = Table(title=f"{title}; 95 % intervals over rows", title_justify="left")
    table.add_column("")
    for text in texts:
        table.add_column(headings[text], justify="right")
    names = dict.fromkeys(name for text in texts for name in report[text])
    for name in names:
        table.add_row(name.replace("_", " "), *(_cell(report[text].get(name)) for text in texts))
    return table


def _cell(figure: Any) -> str:
    if figure is None:
        return ""
    if not isinstance(figure, dict):
        return f"{figure:,}"
    if figure["value"] is None:
        return "none"
    if figure["interval"] is None:
        return f"{figure['value']:.4g}"
    low, high = figure["interval"]
    return f"{figure['value']:.4g} ({low:.4g} to {high:.4g})"


def _write(folder: Path, entry: dict[str, Any]) -> Path:
    """Replace the entry of the same question in metrics.json; others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); repair it, or move it away.") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not a list of measurements; move it away to start a new one.")
    same = ("student", "teacher", "data", "metrics", "settings", "num_rows")
    kept = [other for other in entries if any(other.get(key) != entry[key] for key in same)]
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    draft.write_text(json.dumps([*kept, entry], indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path
