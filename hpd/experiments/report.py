"""`hpd report`: what runs found, as one HTML page and as Markdown, PNG and CSV."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpd.experiments import tables
from hpd.experiments.grid import group_key
from hpd.experiments.plots import Panel, curve_panels, difference_panels, heat_maps, rate_panels, scaling_panels, to_png
from hpd.experiments.results import Results, Run, higher_is_better, read_results
from hpd.experiments.statistics import Comparison, compare_paired, correct
from hpd.experiments.tables import Cell, Table

__all__ = [
    "Report", "Sample", "Section", "build_report", "check_target", "file_name", "markdown_table", "report_on", "write_report",
]  # fmt: skip

NUM_SAMPLES = 8
_PAGES = ("index.html", "report.md")


class Section(NamedTuple):
    """A heading with tables and figures under it."""

    key: str
    title: str
    tables: list[Table]
    panels: list[Panel]


class Sample(NamedTuple):
    """One test problem and what everybody wrote."""

    prompt: str
    reference: str
    answers: dict[str, tuple[str, bool | None]]
    """Variant -> (text, whether it was right)."""


class Report(NamedTuple):
    """Everything that the page and the Markdown show."""

    title: str
    question: str
    status: str
    verdicts: list[str]
    comparisons: list[Comparison]
    sections: list[Section]
    samples: list[Sample]


def build_report(paths: Sequence[Path], baseline: str | None = None, allow: Sequence[str] = ()) -> Report:
    """Read and evaluate.

    Args:
        paths: an experiment's folder, or run folders.
        baseline: the variant that tests compare with; None takes the experiment's.
        allow: environment fields that may differ.

    Raises:
        FileNotFoundError, ValueError: see `read_results`; or the baseline is no variant.
    """
    return report_on(read_results(paths, allow), baseline)


def report_on(results: Results, baseline: str | None = None) -> Report:
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


def _compare(results: Results, baseline: str) -> list[Comparison]:
    if baseline not in results.groups:
        if baseline in _planned_groups(results):
            return []  # its runs are still to come
        raise ValueError(f"The baseline {baseline!r} is no variant. Variants: {'; '.join(results.groups)}.")
    metrics = results.experiment.metrics if results.experiment else ["accuracy", "forward_kl"]
    measured = {metric for run in results.runs for metric in run.figures}
    tested = [metric for metric in metrics if metric in measured]
    if neutral := [metric for metric in tested if higher_is_better(metric) is None]:
        raise ValueError(f"{', '.join(neutral)} is neither better high nor low, so nobody wins by it: take it out of metrics.")
    comparisons = [
        compare_paired(
            results.values(group, metric), results.values(baseline, metric), names=(group, baseline, metric),
            records=(results.records(group, metric), results.records(baseline, metric)),
        )
        for metric in tested for group in results.groups if group != baseline
    ]  # fmt: skip
    return correct(comparisons, {metric: bool(higher_is_better(metric)) for metric in tested})


def _planned_groups(results: Results) -> set[str]:
    return {group_key(axes, results.axes) for axes in results.manifest.get("cells", {}).values()}


def _sentence(c: Comparison, num_tests: int) -> str:
    metric = c.metric.replace("_", " ")
    figures = f"{c.difference:+.3g}" + ("" if c.low != c.low else f", 95 % {c.low:.3g} to {c.high:.3g}")
    p = "" if c.p_holm != c.p_holm else f", p {c.p_holm:.2g} corrected for {num_tests} test{'s' * (num_tests != 1)}"
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
    return f"{finished} of {total} runs finished, {len(results.groups)} variants, {len(seeds)} seeds; written {now}"


def _sections(results: Results, comparisons: list[Comparison], metrics: Sequence[str]) -> list[Section]:
    switches, tuning, cost = tables.ablation_table(results, metrics), tables.tuning_table(results), tables.cost_table(results)
    numeric = heat_maps(results, metrics)
    sections = [
        Section("results", "Results", [tables.result_table(results)] if results.groups else [], []),
        Section(
            "tests", "Who wins", [tables.comparison_table(comparisons)] if comparisons else [], difference_panels(comparisons)
        ),
        Section("ablation", "Switches", [switches] if switches else [], []),
        Section("sensitivity", "Sensitivity", [], numeric),
        Section("scaling", "Scaling", [], scaling_panels(results, metrics) if not numeric else []),
        Section("tuning", "Robustness to the tuned setting", [tuning] if tuning else [], rate_panels(results.choices)),
        Section("curves", "Over training", [], curve_panels(results)),
        Section("stability", "Stability", [tables.stability_table(results)] if results.groups else [], []),
        Section("cost", "Cost", [cost] if cost else [], []),
        Section("recipes", "Recipes", [tables.recipe_table(results)] if results.runs else [], []),
        Section("environment", "Environment", [tables.environment_table(results)] if results.runs else [], []),
    ]
    return [section for section in sections if section.tables or section.panels]


def _samples(results: Results) -> list[Sample]:
    """The first problems of the first graded metric, answered by the first seed of each variant (and the teacher)."""
    graded = [metric for metric in tables.compared_metrics(results) if any(metric in run.answers for run in results.runs)]
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
            w: (str(r[identity].get("text", "")), r[identity].get("correct")) for w, r in by_writer.items() if identity in r
        }
        samples.append(Sample(_prompt_text(record.get("prompt", "")), str(record.get("answer", "")), answers))
    return samples


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return str(prompt)


def check_target(folder: Path) -> None:
    """A report is written into a new or an empty folder, or over a report.

    Raises:
        ValueError: the folder is a file, or holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"The report's folder {folder} is a file: give a folder in --output.")
    found = sorted(path.name for path in folder.iterdir())
    if found and not set(_PAGES) <= set(found):
        raise ValueError(
            f"{folder} holds {', '.join(found[:4])}{', ...' if found[4:] else ''} and no report ({' and '.join(_PAGES)}), so "
            "nothing is written there: give another folder in --output, or empty this one."
        )


def file_name(key: str) -> str:
    """What a table or figure is called in files and on the page, where its key may hold anybody's words."""
    return re.sub(r"[^\w.-]+", "-", key).strip(".-") or "unnamed"


def write_report(report: Report, folder: Path) -> Path:
    """Write index.html, report.md, plots/*.png and data/*.csv; returns the page's path.

    Raises:
        ValueError: the folder holds something else than a report.
    """
    from hpd.experiments.html import render_page

    check_target(folder)
    for sub in ("plots", "data"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    # First, since they are what the folder is known by if a kill comes in between.
    page, text = (folder / name for name in _PAGES)
    text.write_text(render_markdown(report), encoding="utf-8")
    page.write_text(render_page(report), encoding="utf-8")
    for section in report.sections:
        for table in section.tables:
            (folder / "data" / f"{file_name(table.key)}.csv").write_text(table.as_csv(), encoding="utf-8")
        for panel in section.panels:
            name = file_name(panel.key)
            (folder / "plots" / f"{name}.png").write_bytes(to_png(panel))
            (folder / "data" / f"{name}.csv").write_text(tables.panel_table(panel).as_csv(), encoding="utf-8")
    return page


def render_markdown(report: Report) -> str:
    """The report as text; figures lie beside it in plots/."""
    parts = [f"# {_inline(report.title)}", _inline(report.question), report.status + "."]
    parts += ["\n".join(f"* {_inline(line)}" for line in report.verdicts)] if report.verdicts else []
    for section in report.sections:
        parts.append(f"## {section.title}")
        for table in section.tables:
            parts += [markdown_table(table), _inline(table.note)]
        parts += [f"![{_inline(panel.title)}](plots/{file_name(panel.key)}.png)" for panel in section.panels]
    if report.samples:
        parts.append("## Sample answers")
        writers = list(dict.fromkeys(writer for sample in report.samples for writer in sample.answers))
        rows = [(s.prompt, *(_marked(*s.answers.get(w, ("", None))) for w in writers)) for s in report.samples]
        parts.append(markdown_table(Table("samples", "", "", ("problem", *writers), rows)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _marked(text: str, correct: bool | None) -> str:
    return text if correct is None else f"{'✓' if correct else '✗'} {text}"


def markdown_table(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns)]
    for row in table.rows:
        lines.append(tuple(_bold(cell) if isinstance(cell, Cell) else _inline(str(cell)) for cell in row))
    return "\n".join(f"| {' | '.join(_inline(c) if i == 0 else c for c in line)} |" for i, line in enumerate(lines))


def _bold(cell: Cell) -> str:
    return f"**{_inline(cell.text)}**" if cell.tone in ("best", "win", "loss") and cell.text else _inline(cell.text)


def _inline(text: str) -> str:
    """Text that stays in its table cell and starts no markup of its own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|").replace("\n", " ⏎ ")
    return text.replace("*", "\\*").replace("`", "\\`").replace("_", "\\_").replace("[", "\\[")
