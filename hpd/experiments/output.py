"""The report as files: one page, Markdown, each figure as PNG, SVG and PDF, and a CSV per table."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hpd.experiments.figures import FORMATS, Panel, to_files
from hpd.experiments.pages import render_page
from hpd.experiments.report import Report, file_name
from hpd.experiments.table import Table, TableCell, panel_table
from hpd.experiments.verdicts import TONES
from hpd.files import write_atomically

__all__ = ["check_target", "markdown_table", "render_markdown", "write_report"]

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
    """Write index.html, report.md, plots/* and data/*.csv; return the page's path.

    Raises:
        ValueError: the folder holds something else than a report.
    """
    check_target(folder)
    _write_pages(folder.resolve(), (render_page(report), render_markdown(report)))
    for sub in ("plots", "data"):
        (folder / sub).mkdir(exist_ok=True)
    shown = [table for section in report.sections for table in section.tables]
    panels = [panel for section in report.sections for panel in section.panels]
    verdicts = [report.verdicts] if report.verdicts is not None else []
    for table in (*verdicts, *shown, *report.data, *map(panel_table, panels)):
        (folder / "data" / f"{file_name(table.key)}.csv").write_text(table.as_csv(), encoding="utf-8")
    for panel in panels:
        for kind, content in to_files(panel).items():
            (folder / "plots" / f"{file_name(panel.key)}.{kind}").write_bytes(content)
    return folder / _PAGES[0]


def _write_pages(folder: Path, pages: tuple[str, str]) -> None:
    """First and together, since they are what the folder is known by if a kill comes in between."""
    draft = folder
    if not folder.exists() or not any(folder.iterdir()):
        draft = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    for name, content in zip(_PAGES, pages, strict=True):
        write_atomically(draft / name, content)
    if draft != folder:
        os.replace(draft, folder)


def render_markdown(report: Report) -> str:
    """The report as text; figures lie beside it in plots/."""
    parts = [f"# {_inline(report.title)}", _inline(report.question), report.status + "."]
    if report.verdicts is not None:
        parts += ["## Verdicts", _inline(report.summary)]
        parts += [f"**Warning.** {_inline(text)}" for text in report.warnings]
        parts += [markdown_table(report.verdicts), _inline(report.verdicts.note)]
    for section in report.sections:
        parts += [f"## {section.title}", _inline(section.note)]
        for table in section.tables:
            parts += [markdown_table(table), _inline(table.note)]
        parts += map(_markdown_panel, section.panels)
    if report.samples:
        parts.append("## Sample answers")
        writers = list(dict.fromkeys(writer for sample in report.samples for writer in sample.answers))
        rows = [
            (s.prompt, *(_marked(*s.answers.get(w, ("", None))) for w in writers)) for s in report.samples
        ]
        parts.append(markdown_table(Table("samples", "", "", ("problem", *writers), rows)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_panel(panel: Panel) -> str:
    name = f"plots/{file_name(panel.key)}"
    links = ", ".join(f"[{kind.upper()}]({name}.{kind})" for kind in FORMATS[1:])
    return f"![{_inline(panel.title)}]({name}.{FORMATS[0]})\n\n{_inline(panel.note)} ({links})".strip()


def _marked(text: str, correct: bool | None) -> str:
    if correct is None:
        return text
    return f"✓ {text}" if correct else f"✗ {text}"


def markdown_table(table: Table) -> str:
    """A table as Markdown."""
    lines = [table.columns, tuple("---" for _ in table.columns)]
    for row in table.rows:
        lines.append(
            tuple(_bold(cell) if isinstance(cell, TableCell) else _inline(str(cell)) for cell in row)
        )
    return "\n".join(
        f"| {' | '.join(_inline(c) if i == 0 else c for c in line)} |" for i, line in enumerate(lines)
    )


def _bold(cell: TableCell) -> str:
    text = _inline(cell.text)
    if cell.tone in ("best", "win", "loss") and cell.text:
        text = f"**{text}**"
    if not cell.detail:
        return text
    # A verdict is followed by what it rests on, a number by its interval.
    return (
        f"{text}: {_inline(cell.detail)}"
        if cell.tone in TONES.values()
        else f"{text} ({_inline(cell.detail)})"
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
