"""`hpd eval --metrics`: load students and their teacher, measure, print, write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpd.display import console, progress_bar
from hpd.evaluate.settings import GenerationSettings

__all__ = ["measure_with_display", "metrics_table"]


def measure_with_display(
    models: Sequence[str],
    teacher: str | None,
    data: Path | None,
    metrics: str,
    *,
    texts: str = "dataset,student",
    vocabulary: str = "error",
    limit: int | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    output: Path | None = None,
) -> None:
    """Measure each model against the teacher, show a table, and put the figures into `evals.json`.

    Args:
        models, teacher: folders or Hub ids; the teacher may be left out where no metric needs it.
        data: file with prompts and completions.
        metrics, texts: names of `METRICS` and `TEXTS`, with commas between them.
        vocabulary: policy for heads of unequal size.
        limit: first n rows.
        generation: fields of `GenerationSettings` for the students' texts; None values are left at the defaults here:
            temperature 1, 256 tokens.
        dtype: of the weights.
        output: folder of evals.json; None writes nothing.

    Raises:
        FileNotFoundError, ValueError: before a model is loaded, where it can be known.
    """
    from hpd.evaluate.distribution import check_metrics, read_text_rows
    from hpd.pairing import POLICIES

    chosen, read = (_names(text) for text in (metrics, texts))
    check_metrics(chosen, read, teacher is not None)
    if data is None:
        raise ValueError("--metrics needs texts: --data FILE with prompts and completions.")
    if vocabulary not in POLICIES:
        raise ValueError(f"vocabulary must be one of {', '.join(POLICIES)}, got {vocabulary!r}.")
    given = {key: value for key, value in (generation or {}).items() if value is not None}
    settings = GenerationSettings(**{"temperature": 1.0, "max_new_tokens": 256, **given})
    if settings.num_samples > 1 or settings.stop:
        raise ValueError("--metrics reads one text per row, to its end: leave out --samples and stop strings.")
    rows = read_text_rows(data, limit=limit)
    from hpd.train import quiet_libraries

    quiet_libraries()
    loaded = _load(teacher, "teacher", dtype) if teacher is not None else (None, None)
    for model in models:
        report = _measure(_load(model, "student", dtype), loaded, rows, chosen, settings, read, vocabulary)
        console.print(metrics_table(Path(model).name, report))
        identity = {
            "model": model, "teacher": teacher, "data": str(data), "limit": limit, "metrics": chosen, "texts": read,
            "vocabulary": vocabulary, "settings": dataclasses.asdict(settings),
        }  # fmt: skip
        _keep_report(output, identity, report)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _load(path: str, role: str, dtype: str) -> tuple[Any, Any]:
    import torch

    from hpd.config import ModelConfig
    from hpd.models import load_model, load_tokenizer

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    source = ModelConfig(model=path, dtype=dtype)
    tokenizer = load_tokenizer(source, role)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(source, role).to(device), tokenizer


def _measure(
    student: tuple[Any, Any],
    teacher: tuple[Any, Any],
    rows: Any,
    metrics: Sequence[str],
    settings: GenerationSettings,
    texts: Sequence[str],
    vocabulary: str,
) -> dict[str, Any]:
    from hpd.evaluate.distribution import distribution_metrics

    bars: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.setdefault(stage, progress_bar(stage))(done, total)

    return distribution_metrics(
        student[0], teacher[0], student[1], rows, metrics, settings,
        texts=texts, teacher_tokenizer=teacher[1], vocabulary=vocabulary, progress=progress,
    )  # fmt: skip


def _keep_report(folder: Path | None, identity: dict[str, Any], report: dict[str, Any]) -> None:
    from hpd.evaluate.run import write_entry

    if folder is not None:
        eval_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        write_entry(folder, {"id": eval_id, **identity, "distribution": report})
        console.print(f"figures in {folder / 'evals.json'}", highlight=False)


def metrics_table(name: str, report: Mapping[str, Any]) -> Table:
    """One row per figure, one column per text."""
    texts = [text for text in ("dataset", "student", "gap") if text in report]
    headings = {"dataset": "data set", "student": "its own text", "gap": "own - data set"}
    table = Table(title=f"{escape(name)}: {report['num_rows']} rows, 95 % intervals over rows", title_justify="left")
    table.add_column("")
    for text in texts:
        table.add_column(headings[text], justify="right")
    for figure in dict.fromkeys(figure for text in texts for figure in report[text]):
        table.add_row(figure.replace("_", " "), *(_cell(report[text].get(figure)) for text in texts))
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
