"""The report on an experiment: verdicts, tables, figures and sample answers, before they are laid out."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpd.experiments import tables
from hpd.experiments.figures import Panel
from hpd.experiments.grid import group_key
from hpd.experiments.plots import (
    curve_panels,
    difference_panels,
    heat_maps,
    rate_panels,
    scaling_panels,
)
from hpd.experiments.results import Results, Run, higher_is_better, read_results
from hpd.experiments.statistics import VariantComparison, compare_variants, correct
from hpd.experiments.table import Table

__all__ = ["Report", "Sample", "Section", "build_report", "file_name", "report_on"]

NUM_SAMPLES = 8


class Section(NamedTuple):
    """A heading with tables and figures under it."""

    key: str
    title: str
    tables: list[Table]
    panels: list[Panel]


class Sample(NamedTuple):
    """One test problem and everybody's answer."""

    prompt: str
    reference: str
    answers: dict[str, tuple[str, bool | None]]
    """Variant -> (text, whether it was right)."""


class Report(NamedTuple):
    """The content of the page and of the Markdown."""

    title: str
    question: str
    status: str
    verdicts: list[str]
    comparisons: list[VariantComparison]
    sections: list[Section]
    samples: list[Sample]


def build_report(paths: Sequence[Path], baseline: str | None = None, allow: Sequence[str] = ()) -> Report:
    """Read runs and evaluate them.

    Args:
        paths: an experiment's folder, or run folders.
        baseline: the variant that tests compare with; None takes the experiment's.
        allow: environment fields that may differ.

    Raises:
        FileNotFoundError, ValueError: see `read_results`; or the baseline is not a variant.
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
        verdicts=[_sentence(c, len(comparisons)) for c in comparisons],
        comparisons=comparisons,
        sections=_sections(results, comparisons, metrics),
        samples=_samples(results),
    )


def _compare(results: Results, baseline: str | Mapping[str, str]) -> list[VariantComparison]:
    if isinstance(baseline, str) and baseline not in results.groups:
        if baseline in _planned_groups(results):
            return []  # its runs are still to come
        raise ValueError(
            f"The baseline {baseline!r} is not a variant. Variants: {'; '.join(results.groups)}."
        )
    metrics = results.experiment.metrics if results.experiment else ["accuracy", "forward_kl"]
    measured = {metric for run in results.runs for metric in run.figures}
    tested = [metric for metric in metrics if metric in measured]
    if neutral := [metric for metric in tested if higher_is_better(metric) is None]:
        raise ValueError(
            f"{', '.join(neutral)} is neither better high nor low, so no variant wins by it: take it out of "
            "metrics."
        )
    # Of a grid under way, a group's baseline may still be to come.
    pairs = [(group, results.against(group, baseline)) for group in results.groups]
    pairs = [(group, other) for group, other in pairs if group != other and other in results.groups]
    comparisons = [
        compare_variants(
            results.values(group, metric),
            results.values(other, metric),
            names=(group, other, metric),
            records=(results.records(group, metric), results.records(other, metric)),
        )
        for metric in tested
        for group, other in pairs
    ]
    return correct(comparisons, {metric: bool(higher_is_better(metric)) for metric in tested})


def _planned_groups(results: Results) -> set[str]:
    return {group_key(axes, results.axes) for axes in results.manifest.get("cells", {}).values()}


def _sentence(c: VariantComparison, num_tests: int) -> str:
    metric = c.metric.replace("_", " ")
    figures = f"{c.difference:+.3g}" + ("" if c.low != c.low else f", 95 % {c.low:.3g} to {c.high:.3g}")
    p = (
        ""
        if c.p_holm != c.p_holm
        else f", p {c.p_holm:.2g} corrected for {num_tests} test{'s' * (num_tests != 1)}"
    )
    seeds = f", {c.num_seeds} seed{'s' * (c.num_seeds != 1)}"
    if c.verdict == "no consistent win":
        return f"{c.variant} against {c.baseline} on {metric}: no consistent win ({figures}{p}{seeds})."
    verb = "beats" if c.verdict == "win" else "loses to"
    return f"{c.variant} {verb} {c.baseline} on {metric} ({figures}{p}{seeds})."


def _status(results: Results) -> str:
    finished = sum(run.finished for run in results.runs)
    total = len(results.manifest.get("cells", results.runs))
    seeds = sorted({run.seed for run in results.runs if run.finished})
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    found = f"{len(results.groups)} variants, {len(seeds)} seeds"
    return f"{finished} of {total} runs finished, {found}; written {now}"


def _sections(
    results: Results, comparisons: list[VariantComparison], metrics: Sequence[str]
) -> list[Section]:
    switches = tables.ablation_table(results, metrics)
    tuning = tables.tuning_table(results)
    cost = tables.cost_table(results)
    numeric = heat_maps(results, metrics)
    sections = [
        Section("results", "Results", [tables.result_table(results)] if results.groups else [], []),
        Section(
            "tests",
            "Who wins",
            [tables.comparison_table(comparisons)] if comparisons else [],
            difference_panels(comparisons),
        ),
        Section("ablation", "Switches", [switches] if switches else [], []),
        Section("sensitivity", "Sensitivity", [], numeric),
        Section("scaling", "Scaling", [], scaling_panels(results, metrics) if not numeric else []),
        Section(
            "tuning",
            "Robustness to the tuned setting",
            [tuning] if tuning else [],
            rate_panels(results.choices),
        ),
        Section("curves", "Over training", [], curve_panels(results)),
        Section("stability", "Stability", [tables.stability_table(results)] if results.groups else [], []),
        Section("cost", "Cost", [cost] if cost else [], []),
        Section("recipes", "Recipes", [tables.recipe_table(results)] if results.runs else [], []),
        Section(
            "environment", "Environment", [tables.environment_table(results)] if results.runs else [], []
        ),
    ]
    return [section for section in sections if section.tables or section.panels]


def _samples(results: Results) -> list[Sample]:
    """The first problems of the first graded metric, answered by the first seed of each variant (and the
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
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return str(prompt)


def file_name(key: str) -> str:
    """The name of a table or figure in files and on the page; its key may hold anybody's words."""
    return re.sub(r"[^\w.-]+", "-", key).strip(".-") or "unnamed"
