"""The report on an experiment: verdicts, tables, figures and sample answers, before they are laid out."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpd.experiments import tables
from hpd.experiments.curves import NO_VALIDATION, curve_panels, validation_is_missing
from hpd.experiments.figures import Panel
from hpd.experiments.grid import group_key
from hpd.experiments.heat_maps import heat_maps
from hpd.experiments.metrics import Scale, higher_is_better
from hpd.experiments.plots import (
    difference_panels,
    rate_panels,
    results_looks,
    scaling_panels,
    thirds_panels,
)
from hpd.experiments.results import Results, Run, read_results
from hpd.experiments.statistics import VariantComparison, compare_variants, correct
from hpd.experiments.table import Table
from hpd.experiments.verdicts import comparison_table, summarize, verdict_table, warnings_about

__all__ = ["Report", "Sample", "Section", "build_report", "file_name", "report_on"]

NUM_SAMPLES = 8


class Section(NamedTuple):
    """A heading with tables and figures under it."""

    key: str
    title: str
    tables: list[Table]
    panels: list[Panel]
    note: str = ""


class Sample(NamedTuple):
    """One test problem and everybody's answer."""

    prompt: str
    reference: str
    answers: dict[str, tuple[str, bool | None]]
    """Method -> (text, whether it was right)."""


class Report(NamedTuple):
    """The content of the page and of the Markdown."""

    title: str
    question: str
    status: str
    summary: str
    """The number of each verdict; empty without tests."""
    warnings: list[str]
    """What the seeds cannot decide."""
    verdicts: Table | None
    comparisons: list[VariantComparison]
    sections: list[Section]
    samples: list[Sample]
    data: list[Table]
    """Tables that are written as CSV and not shown."""
    damages: tuple[str, ...] = ()
    """Parts of files that could not be read, a sentence each."""


def build_report(
    paths: Sequence[Path], baseline: str | Mapping[str, str] | None = None, allow: Sequence[str] = ()
) -> Report:
    """Read runs and evaluate them.

    Args:
        paths: an experiment's folder, or run folders.
        baseline: the method that tests compare with; None takes the experiment's.
        allow: environment fields that may differ.

    Raises:
        FileNotFoundError, ValueError: see `read_results`; or the baseline is not one of its methods.
    """
    return report_on(read_results(paths, allow), baseline)


def report_on(results: Results, baseline: str | Mapping[str, str] | None = None) -> Report:
    """Evaluate what was read; see `build_report`."""
    experiment = results.experiment
    baseline = baseline or (experiment.baseline if experiment else None)
    comparisons = _compare(results, baseline) if baseline and results.groups else []
    metrics = [
        m
        for m in (experiment.metrics if experiment else ["accuracy", "forward_kl"])
        if any(m in r.figures for r in results.runs)
    ]
    return Report(
        title=results.title,
        question=experiment.question if experiment else "",
        status=_status(results),
        summary=summarize(comparisons),
        warnings=warnings_about(comparisons, results.manifest.get("added", [])),
        verdicts=verdict_table(comparisons, _scales(results, comparisons)),
        comparisons=comparisons,
        sections=_sections(results, comparisons, metrics, baseline),
        samples=_samples(results),
        data=[tables.run_table(results)] if results.groups else [],
        damages=results.damages,
    )


def _scales(results: Results, comparisons: Sequence[VariantComparison]) -> dict[str, Scale]:
    return {c.metric: results.scale(c.metric) for c in comparisons}


def _compare(results: Results, baseline: str | Mapping[str, str]) -> list[VariantComparison]:
    if isinstance(baseline, str) and baseline not in results.groups:
        if baseline in _planned_groups(results):
            return []  # its runs are still to come
        raise ValueError(
            f"The baseline {baseline!r} is not a method of this report, which has "
            f"{'; '.join(results.groups)}."
        )
    metrics = results.experiment.metrics if results.experiment else ["accuracy", "forward_kl"]
    measured = {metric for run in results.runs for metric in run.figures}
    tested = [metric for metric in metrics if metric in measured]
    if neutral := [metric for metric in tested if higher_is_better(metric) is None]:
        raise ValueError(
            f"{', '.join(neutral)} is neither better high nor low, so no method wins by it: take it out of "
            "metrics."
        )
    # Of a grid under way, a group's baseline may still be to come.
    pairs = [(group, results.against(group, baseline)) for group in results.groups]
    pairs = [(group, other) for group, other in pairs if group != other and other in results.groups]
    comparisons = [_compare_one(results, group, other, metric) for metric in tested for group, other in pairs]
    return correct(comparisons, {metric: bool(higher_is_better(metric)) for metric in tested})


def _compare_one(results: Results, group: str, baseline: str, metric: str) -> VariantComparison:
    """A comparison whose interval keeps to what the metric can differ by."""
    scale = results.scale(metric).change
    found = compare_variants(
        results.values(group, metric),
        results.values(baseline, metric),
        names=(group, baseline, metric),
        records=(results.records(group, metric), results.records(baseline, metric)),
    )
    # In this order NaN, where there is no interval, stays NaN.
    return found._replace(low=max(found.low, scale.low), high=min(found.high, scale.high))


def _planned_groups(results: Results) -> set[str]:
    return {group_key(axes, results.axes) for axes in results.manifest.get("cells", {}).values()}


def _status(results: Results) -> str:
    finished = sum(run.finished for run in results.runs)
    total = len(results.manifest.get("cells", results.runs))
    units = {run.unit for run in results.runs if run.finished}
    noun = "repetition" if any(run.paired for run in results.runs) else "seed"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    found = f"{_count(len(results.groups), 'method')}, {_count(len(units), noun)}"
    damaged = f"; {_count(len(results.damages), 'damaged part')} of files left out" if results.damages else ""
    return f"{finished} of {total} runs finished, {found}; written {now}{damaged}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _sections(
    results: Results,
    comparisons: list[VariantComparison],
    metrics: Sequence[str],
    baseline: str | Mapping[str, str] | None,
) -> list[Section]:
    looks = results_looks(results, baseline)
    scales = _scales(results, comparisons)
    numeric = heat_maps(results, metrics)
    curves = Section("curves", "Over training", [], curve_panels(results, looks))
    if validation_is_missing(results):
        curves = curves._replace(note=NO_VALIDATION)
    sections = [
        _section("results", "Results", results.groups and tables.result_table(results)),
        _section(
            "tests",
            "Tests",
            comparisons and comparison_table(comparisons, scales),
            difference_panels(comparisons, scales),
        ),
        _section("ablation", "Switches", tables.ablation_table(results, metrics)),
        _section("thirds", "By the teacher's entropy", None, thirds_panels(results, looks)),
        _section("sensitivity", "Sensitivity", None, numeric),
        _section("scaling", "Scaling", None, scaling_panels(results, metrics, looks) if not numeric else []),
        Section(
            "tuning",
            "Robustness to the tuned settings",
            tables.tuning_tables(results),
            rate_panels(results.choices, looks),
        ),
        curves,
        _section("stability", "Stability", results.groups and tables.stability_table(results)),
        _section("cost", "Cost", tables.cost_table(results)),
        _section("recipes", "Recipes", results.runs and tables.recipe_table(results)),
        _section("environment", "Environment", results.runs and tables.environment_table(results)),
    ]
    return [section for section in sections if section.tables or section.panels or section.note]


def _section(key: str, title: str, table: Any, panels: Sequence[Panel] = ()) -> Section:
    """A section with its table, if there is one."""
    return Section(key, title, [table] if table else [], list(panels))


def _samples(results: Results) -> list[Sample]:
    """The first problems of the first graded metric, answered by the first seed of each method (and the
    teacher)."""
    graded = [
        metric
        for metric in tables.compared_metrics(results)
        if any(metric in run.answers for run in results.runs)
    ]
    if not graded:
        return []
    firsts: dict[str, Run] = {}
    for run in results.runs:
        if graded[0] in run.answers:
            firsts.setdefault(run.group, run)
    by_writer = {group: run.answers[graded[0]] for group, run in firsts.items()}
    teacher = next((run.answers["teacher"] for run in results.runs if "teacher" in run.answers), None)
    if teacher:
        by_writer = {"teacher": teacher, **by_writer}
    first = next(iter(firsts.values())).answers[graded[0]]
    samples = []
    for identity, record in list(first.items())[:NUM_SAMPLES]:
        answers = {
            w: (str(r[identity].get("text", "")), r[identity].get("correct"))
            for w, r in by_writer.items()
            if identity in r
        }
        samples.append(Sample(_prompt_text(record.get("prompt", "")), str(record.get("answer", "")), answers))
    return samples


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
    return str(prompt)


def file_name(key: str) -> str:
    """The name of a table or figure in files and on the page; its key may hold anybody's words."""
    return re.sub(r"[^\w.-]+", "-", key).strip(".-") or "unnamed"
