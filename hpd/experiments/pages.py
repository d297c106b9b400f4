"""The report as one HTML page that needs nothing else: no server, no network, no library."""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from importlib.resources import files
from string import Template
from typing import Any
from urllib.parse import quote

from hpd.experiments.figures import Panel, to_svg
from hpd.experiments.report import Report, Sample, Section, file_name
from hpd.experiments.table import Table, TableCell, panel_table
from hpd.experiments.verdicts import TONES

__all__ = ["render_page"]

_CHIPS = frozenset(TONES.values())
"""Tones whose cells are drawn as chips."""


def render_page(report: Report, live: bool = False) -> str:
    """The whole page: text of models and users is escaped, and a content policy forbids all foreign code.

    Args:
        live: ask the server for a newer version every few seconds, and load it.
    """
    assets = files("hpd.experiments") / "assets"
    template, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    links = [(s.key, s.title) for s in report.sections] + ([("samples", "Answers")] if report.samples else [])
    samples = _samples(report.samples) if report.samples else ""
    return Template(template).substitute(
        live=" data-live" if live else "",
        connect="'self'" if live else "'none'",
        title=escape(report.title),
        style=style,
        script=script,
        question=f'<p class="question">{escape(report.question)}</p>' if report.question else "",
        status=escape(report.status),
        nav="".join(f'<a href="#{escape(key)}">{escape(title)}</a>' for key, title in links),
        body=_verdicts(report) + "".join(map(_section, report.sections)) + samples,
    )


def _verdicts(report: Report) -> str:
    if report.verdicts is None:
        return ""
    counts = Counter(c.verdict for c in report.comparisons)
    chips = "".join(
        f'<span class="chip {tone}">{escape(verdict)}: {counts[verdict]}</span>'
        for verdict, tone in TONES.items()
        if counts[verdict]
    )
    warnings = "".join(
        f'<p class="warning"><strong>Warning.</strong> {escape(text)}</p>' for text in report.warnings
    )
    table = _table(report.verdicts, "Verdicts")
    return f'<section id="verdicts"><h2>Verdicts</h2><p>{chips}</p>{warnings}{table}</section>\n'


def _section(section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    tables = "".join(_table(table, section.title) for table in section.tables)
    panels = "".join(map(_panel, section.panels))
    if panels:
        panels = f'<div class="panels">{panels}</div>'
    body = f"<h2>{escape(section.title)}</h2>{note}{tables}{panels}"
    return f'<section id="{escape(section.key)}">{body}</section>\n'


def _table(table: Table, heading: str = "") -> str:
    head = "".join(
        f'<th scope="col"{_numeric(table, i)}><button type="button">{escape(name) or "&nbsp;"}</button></th>'
        for i, name in enumerate(table.columns)
    )
    rows = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)} {_download(table)}</p>' if table.note else ""
    caption = f"<h3>{escape(table.title)}</h3>" if table.title and table.title != heading else ""
    label = escape(table.title or heading or "data")
    return (
        f'{caption}<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _numeric(table: Table, column: int) -> str:
    cells = [row[column] for row in table.rows]
    return ' class="number"' if cells and all(_is_number(cell) for cell in cells if cell != "") else ""


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) or (
        isinstance(cell, TableCell) and isinstance(cell.sort, (int, float))
    )


def _cell(cell: Any) -> str:
    if isinstance(cell, TableCell):
        number = isinstance(cell.sort, (int, float))
        classes = " ".join(filter(None, ("number" if number else "", cell.tone)))
        missing = isinstance(cell.sort, float) and math.isnan(cell.sort)
        key = "" if missing else escape(str(cell.sort))
        text = f"<span>{escape(cell.text)}</span>" if cell.tone in _CHIPS else escape(cell.text)
        detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
        return f'<td class="{classes}" data-sort="{key}">{text}{detail}</td>'
    number = ' class="number"' if _is_number(cell) else ""
    return f"<td{number}>{escape(str(cell))}</td>"


def _panel(panel: Panel) -> str:
    panel = panel._replace(key=file_name(panel.key))
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    return (
        f'<figure id="plot-{escape(panel.key)}"><figcaption>{escape(panel.title)}{note}</figcaption>'
        f"{to_svg(panel)}"
        f'<details><summary>data</summary>{_table(panel_table(panel))}<p class="note">'
        f"{_download(panel_table(panel))}</p></details></figure>"
    )


def _download(table: Table) -> str:
    content = f"data:text/csv;charset=utf-8,{quote(table.as_csv())}"
    return f'<a class="download" download="{escape(file_name(table.key))}.csv" href="{content}">CSV</a>'


def _samples(samples: list[Sample]) -> str:
    cards = "".join(_sample(sample) for sample in samples)
    note = "The first problems of the test file, not chosen; each method's first seed."
    return f'<section id="samples"><h2>Answers</h2><p class="note">{note}</p>{cards}</section>\n'


def _sample(sample: Sample) -> str:
    answers = "".join(
        f'<div class="answer {_tone(correct)}"><h4>{escape(writer)}</h4><pre>{escape(text)}</pre></div>'
        for writer, (text, correct) in sample.answers.items()
    )
    reference = (
        f' <span class="reference">reference: {escape(sample.reference)}</span>' if sample.reference else ""
    )
    return (
        f'<article class="sample"><p class="prompt"><code>{escape(sample.prompt)}</code>{reference}</p>'
        f'<div class="answers">{answers}</div></article>'
    )


def _tone(correct: bool | None) -> str:
    if correct is None:
        return ""
    return "right" if correct else "wrong"
