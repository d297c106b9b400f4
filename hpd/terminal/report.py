"""`hpd report` in a terminal. No part of it needs the training libraries, which take seconds to import."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hpd.experiments.figures import FORMATS
from hpd.experiments.live import Watcher, make_server
from hpd.experiments.manifest import MANIFEST
from hpd.experiments.output import check_target, write_report
from hpd.experiments.pages import render_page
from hpd.experiments.report import Report, build_report
from hpd.experiments.table import TableCell
from hpd.terminal.console import console, paragraph, show_next

__all__ = ["run_report", "show_verdicts"]

_STYLES = {"win": "green", "loss": "red", "few": "yellow"}


def run_report(
    folders: Sequence[Path], output: Path | None, baseline: str | None, allow: Sequence[str], port: int | None
) -> None:
    """Write the report, or serve it on `port` while runs go on."""
    if port is not None:
        _serve(list(folders), baseline, allow, port)
        return
    single = len(folders) == 1 and (folders[0] / MANIFEST).is_file()
    target = output or (folders[0] / "report" if single else Path("runs/report"))
    check_target(target)
    report = build_report(folders, baseline, allow)
    page = write_report(report, target)
    for line in report.damages:
        paragraph(f"damaged: {line}")
    show_verdicts(report)
    paragraph(
        f"{report.status}\nreport: {page}, {target / 'report.md'}, "
        f"plots/*.{{{','.join(FORMATS)}}}, data/*.csv"
    )
    given = ["--baseline", baseline] if baseline is not None else []
    given += ["--allow", ",".join(allow)] if allow else []
    show_next(f"{shlex.join(['hpd', 'report', *map(str, folders), *given])} --watch")


def show_verdicts(report: Report) -> None:
    """The verdicts of all tests in one table, and what the seeds cannot decide."""
    if report.verdicts is None:
        return
    title = f"{report.summary}\nIn the cells: difference (95 % interval), p after correction."
    table = Table(title=escape(title), title_justify="left", title_style="")
    for i, column in enumerate(report.verdicts.columns):
        table.add_column(escape(column), overflow="fold", no_wrap=False, min_width=12 if i else 8)
    for row in report.verdicts.rows:
        table.add_row(*map(_cell, row))
    console.print(table)
    for text in report.warnings:
        paragraph(Text.assemble(("warning:", "yellow"), f" {text}"))


def _cell(cell: Any) -> str:
    if not isinstance(cell, TableCell):
        return escape(str(cell))
    style = _STYLES.get(cell.tone)
    text = f"[{style}]{escape(cell.text)}[/]" if style else escape(cell.text)
    return f"{text}\n{escape(cell.detail)}" if cell.detail else text


def _serve(folders: list[Path], baseline: str | None, allow: Sequence[str], port: int) -> None:
    watcher = Watcher(folders, lambda: render_page(build_report(folders, baseline, allow), live=True))
    watcher.refresh()
    with make_server(watcher, port) as server:
        console.print(
            f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", highlight=False, soft_wrap=True
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
