"""The report as one HTML page that needs nothing else: no server, no network, no library."""

from __future__ import annotations

import math
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from hpd.experiments.plots import Panel, to_svg
from hpd.experiments.report import Report, Sample, Section, file_name
from hpd.experiments.tables import Cell, Table, panel_table

__all__ = ["render_page"]

_LONG_LIST, _SHOWN_OF_EACH = 9, 3
_CHIPS = {" beats ": "win", " loses to ": "loss"}


def render_page(report: Report, live: bool = False) -> str:
    """The whole page. Everything that models or users wrote is escaped, and a content policy forbids all foreign code.

    Args:
        live: ask the server for a newer version every few seconds, and load it.
    """
    assets = files("hpd.experiments") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    connect = "'self'" if live else "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src {connect}"
    links = [(s.key, s.title) for s in report.sections] + ([("samples", "Answers")] if report.samples else [])
    nav = "".join(f'<a href="#{escape(key)}">{escape(title)}</a>' for key, title in links)
    body = "".join(_section(section) for section in report.sections)
    if report.samples:
        body += _samples(report.samples)
    question = f'<p class="question">{escape(report.question)}</p>' if report.question else ""
    return (
        f'<!doctype html>\n<html lang="en"{" data-live" if live else ""}>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '\n<meta name="color-scheme" content="light dark">\n'
        f'<title>{escape(report.title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f'<header><h1>{escape(report.title)}</h1>{question}<p class="status">{escape(report.status)}</p></header>\n'
        f"<nav>{nav}</nav>\n<main>\n{_verdicts(report.verdicts)}{body}</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _verdicts(lines: list[str]) -> str:
    if not lines:
        return ""
    tones = [next((tone for mark, tone in _CHIPS.items() if mark in line), "none") for line in lines]
    counts = "".join(
        f'<span class="chip {tone}">{tones.count(tone)} {words}</span>'
        for tone, words in (("win", "better"), ("loss", "worse"), ("none", "no consistent win"))
    )
    items = [f'<li class="{tone}">{escape(line)}</li>' for tone, line in zip(tones, lines, strict=True)]
    # A long list shows the first of each kind: what was lost or not found stands as openly as what was won.
    order = sorted(range(len(items)), key=lambda i: ("win", "loss", "none").index(tones[i]))
    nth = {i: tones[:i].count(tones[i]) for i in order}
    shown = [i for i in order if len(items) <= _LONG_LIST or nth[i] < _SHOWN_OF_EACH]
    rest = [i for i in order if i not in shown]
    more = f"<details><summary>{len(rest)} more</summary><ul>{''.join(items[i] for i in rest)}</ul></details>" if rest else ""
    return (
        f'<section id="verdicts" class="verdicts"><p>{counts}</p><ul>{"".join(items[i] for i in shown)}</ul>{more}</section>\n'
    )


def _section(section: Section) -> str:
    tables = "".join(_table(table, section.title) for table in section.tables)
    panels = f'<div class="panels">{"".join(_panel(panel) for panel in section.panels)}</div>' if section.panels else ""
    return f'<section id="{escape(section.key)}"><h2>{escape(section.title)}</h2>{tables}{panels}</section>\n'


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
        f'{caption}<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="sortable"><thead>'
        f"<tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _numeric(table: Table, column: int) -> str:
    cells = [row[column] for row in table.rows]
    return ' class="number"' if cells and all(_is_number(cell) for cell in cells if cell != "") else ""


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) or (isinstance(cell, Cell) and isinstance(cell.sort, (int, float)))


def _cell(cell: Any) -> str:
    if isinstance(cell, Cell):
        number = isinstance(cell.sort, (int, float))
        classes = " ".join(filter(None, ("number" if number else "", cell.tone)))
        missing = isinstance(cell.sort, float) and math.isnan(cell.sort)
        key = "" if missing else escape(str(cell.sort))
        text = f"<span>{escape(cell.text)}</span>" if cell.tone in ("win", "loss", "none") else escape(cell.text)
        return f'<td class="{classes}" data-sort="{key}">{text}</td>'
    number = ' class="number"' if _is_number(cell) else ""
    return f"<td{number}>{escape(str(cell))}</td>"


def _panel(panel: Panel) -> str:
    panel = panel._replace(key=file_name(panel.key))
    return (
        f'<figure id="plot-{escape(panel.key)}"><figcaption>{escape(panel.title)}</figcaption>{to_svg(panel)}'
        f'<details><summary>data</summary>{_table(panel_table(panel))}<p class="note">'
        f"{_download(panel_table(panel))}</p></details></figure>"
    )


def _download(table: Table) -> str:
    content = f"data:text/csv;charset=utf-8,{quote(table.as_csv())}"
    return f'<a class="download" download="{escape(file_name(table.key))}.csv" href="{content}">CSV</a>'


def _samples(samples: list[Sample]) -> str:
    cards = "".join(_sample(sample) for sample in samples)
    note = "The first problems of the test file, not chosen; each variant's first seed."
    return f'<section id="samples"><h2>Answers</h2><p class="note">{note}</p>{cards}</section>\n'


def _sample(sample: Sample) -> str:
    answers = "".join(
        f'<div class="answer {_tone(correct)}"><h4>{escape(writer)}</h4><pre>{escape(text)}</pre></div>'
        for writer, (text, correct) in sample.answers.items()
    )
    reference = f' <span class="reference">reference: {escape(sample.reference)}</span>' if sample.reference else ""
    return (
        f'<article class="sample"><p class="prompt"><code>{escape(sample.prompt)}</code>{reference}</p>'
        f'<div class="answers">{answers}</div></article>'
    )


def _tone(correct: bool | None) -> str:
    return "" if correct is None else "right" if correct else "wrong"
