"""`hpd eval --metrics`: models measured against a teacher, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hpd.evaluate.command import check_dtype, load_on_device
from hpd.evaluate.distribution import TEXTS, WRITING, check_metrics, distribution_metrics
from hpd.evaluate.run import write_entry
from hpd.evaluate.text_rows import TextRow, read_text_rows
from hpd.generation.settings import GenerationSettings
from hpd.locks import holding
from hpd.losses.heads import POLICIES
from hpd.progress import Progress

__all__ = ["MetricsCommand", "measure_models"]

Pair = tuple[nn.Module | None, PreTrainedTokenizerBase | None]


@dataclass(frozen=True, kw_only=True)
class MetricsCommand:
    """Models whose distributions are measured."""

    models: tuple[str, ...]
    """Folders or Hub ids of students."""
    teacher: str | None = None
    """May be left out where no metric needs it."""
    data: Path
    """File with prompts and completions."""
    metrics: tuple[str, ...]
    """Names of `METRICS`."""
    texts: tuple[str, ...] = TEXTS
    vocabulary: str = "error"
    """Policy for heads of unequal size."""
    limit: int | None = None
    """First n rows."""
    settings: GenerationSettings = WRITING
    """Of the students' texts."""
    dtype: str = "auto"
    """Of the weights."""
    output: Path | None = None
    """Folder of evals.json; None writes nothing."""

    def __post_init__(self) -> None:
        check_metrics(self.metrics, self.texts, self.teacher is not None)
        if self.vocabulary not in POLICIES:
            raise ValueError(f"vocabulary must be one of {', '.join(POLICIES)}, got {self.vocabulary!r}.")
        if self.settings.num_samples > 1 or self.settings.stop:
            raise ValueError(
                "--metrics reads one text per row, to its end: leave out --samples and stop strings."
            )
        check_dtype(self.dtype)

    def identity(self, model: str) -> dict[str, Any]:
        """A measurement in evals.json is replaced by a later one of equal values."""
        return {
            "model": model,
            "teacher": self.teacher,
            "data": str(self.data),
            "limit": self.limit,
            "metrics": list(self.metrics),
            "texts": list(self.texts),
            "vocabulary": self.vocabulary,
            "settings": dataclasses.asdict(self.settings),
        }


def measure_models(
    command: MetricsCommand, progress: Progress | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model and its report (`distribution_metrics`), which is put into evals.json.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, the models do not fit together, or another
            process writes to the folder of results.
    """
    rows = read_text_rows(command.data, limit=command.limit)
    teacher: Pair = (None, None)
    with contextlib.nullcontext() if command.output is None else holding(command.output):
        if command.teacher is not None:
            teacher = load_on_device(command.teacher, command.dtype, "teacher")
        for model in command.models:
            report = _measure(command, model, teacher, rows, progress)
            if command.output is not None:
                write_entry(command.output, command.identity(model), {"distribution": report})
            yield model, report


# A function of its own, so that one student's weights are gone before the next one's come.
def _measure(
    command: MetricsCommand,
    model: str,
    teacher: Pair,
    rows: Sequence[TextRow],
    progress: Progress | None,
) -> dict[str, Any]:
    student, tokenizer = load_on_device(model, command.dtype, "student")
    return distribution_metrics(
        student,
        teacher[0],
        tokenizer,
        rows,
        command.metrics,
        command.settings,
        texts=command.texts,
        teacher_tokenizer=teacher[1],
        vocabulary=command.vocabulary,
        progress=progress,
    )
