"""The report as one HTML page that needs nothing else: no server, no network, no library."""

from __future__ import annotations

import http.server
import math
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from hpd.experiments import tables
from hpd.experiments.plots import Panel, to_png, to_svg
from hpd.experiments.report import Report, Sample, Section, file_name
from hpd.experiments.tables import Cell, Table, panel_table
from hpd.files import write_atomically

__all__ = ["Watcher", "check_target", "make_server", "markdown_table", "render_page", "write_report"]


_LONG_LIST, _SHOWN_OF_EACH = 9, 3


_CHIPS = {" beats ": "win", " loses to ": "loss"}


def render_page(report: Report, live: bool = False) -> str:
    """The whole page. Everything that models or users wrote is escaped, and a content policy forbids all
    foreign code.

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
    more = (
        f"<details><summary>{len(rest)} more</summary><ul>{''.join(items[i] for i in rest)}</ul></details>"
        if rest
        else ""
    )
    return f'<section id="verdicts" class="verdicts"><p>{counts}</p><ul>{"".join(items[i] for i in shown)}</ul>{more}</section>\n'


def _section(section: Section) -> str:
    tables = "".join(_table(table, section.title) for table in section.tables)
    panels = (
        f'<div class="panels">{"".join(_panel(panel) for panel in section.panels)}</div>'
        if section.panels
        else ""
    )
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
        text = (
            f"<span>{escape(cell.text)}</span>" if cell.tone in ("win", "loss", "none") else escape(cell.text)
        )
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
    reference = (
        f' <span class="reference">reference: {escape(sample.reference)}</span>' if sample.reference else ""
    )
    return (
        f'<article class="sample"><p class="prompt"><code>{escape(sample.prompt)}</code>{reference}</p>'
        f'<div class="answers">{answers}</div></article>'
    )


def _tone(correct: bool | None) -> str:
    return "" if correct is None else "right" if correct else "wrong"


_PAGES = ("index.html", "report.md")


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
            f"{folder} holds {', '.join(found[:4])}{', ...' if found[4:] else ''} and no report "
            f"({' and '.join(_PAGES)}), so nothing is written there: give another folder in --output, or "
            "empty this one."
        )


def write_report(report: Report, folder: Path) -> Path:
    """Write index.html, report.md, plots/*.png and data/*.csv; returns the page's path.

    Raises:
        ValueError: the folder holds something else than a report.
    """

    check_target(folder)
    for sub in ("plots", "data"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    # First, since they are what the folder is known by if a kill comes in between.
    page, text = (folder / name for name in _PAGES)
    write_atomically(text, render_markdown(report))
    write_atomically(page, render_page(report))
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
        rows = [
            (s.prompt, *(_marked(*s.answers.get(w, ("", None))) for w in writers)) for s in report.samples
        ]
        parts.append(markdown_table(Table("samples", "", "", ("problem", *writers), rows)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _marked(text: str, correct: bool | None) -> str:
    return text if correct is None else f"{'✓' if correct else '✗'} {text}"


def markdown_table(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns)]
    for row in table.rows:
        lines.append(tuple(_bold(cell) if isinstance(cell, Cell) else _inline(str(cell)) for cell in row))
    return "\n".join(
        f"| {' | '.join(_inline(c) if i == 0 else c for c in line)} |" for i, line in enumerate(lines)
    )


def _bold(cell: Cell) -> str:
    return (
        f"**{_inline(cell.text)}**"
        if cell.tone in ("best", "win", "loss") and cell.text
        else _inline(cell.text)
    )


def _inline(text: str) -> str:
    """Text that stays in its table cell and starts no markup of its own."""
    text = (
        text.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("|", "\\|")
        .replace("\n", " ⏎ ")
    )
    return text.replace("*", "\\*").replace("`", "\\`").replace("_", "\\_").replace("[", "\\[")


_WATCHED = ("metrics.jsonl", "summary.json", "experiment.json", "evals.json", "tuned.json", "manifest.json")


class Watcher:
    """The newest page of some folders; built again when a file in them has changed.

    Args:
        folders: experiments or run folders.
        build: makes the page.
    """

    def __init__(self, folders: list[Path], build: Callable[[], str]):
        self._folders, self._build = folders, build
        self._seen: dict[str, float] = {}
        self._page = ""
        self.version = 0

    def refresh(self) -> str:
        """The page as it is now."""
        found = {
            str(p): p.stat().st_mtime
            for folder in self._folders
            for name in _WATCHED
            for p in folder.rglob(name)
            if p.exists()
        }
        if found != self._seen or not self._page:
            self._page, self._seen = self._build(), found
            self.version += 1
        return self._page


def make_server(watcher: Watcher, port: int) -> http.server.HTTPServer:
    """A server on 127.0.0.1 that answers / and /version; port 0 takes a free one (`server_port`)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            # A page of another site must not read this one through a name that it points at this machine.
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in ("127.0.0.1", "localhost"):
                self.send_error(403)
            elif self.path == "/":
                self._answer(watcher.refresh(), "text/html; charset=utf-8")
            elif self.path == "/version":
                watcher.refresh()
                self._answer(str(watcher.version), "text/plain")
            else:
                self.send_error(404)

        def _answer(self, text: str, kind: str) -> None:
            content = text.encode("utf-8")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal shows the address."""

    # One request at a time, so that a page is never built twice at once.
    return http.server.HTTPServer(("127.0.0.1", port), Handler)
