"""`hpd report` in a terminal. No part of it needs the training libraries, which take seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from hpd.experiments.live import Watcher, make_server
from hpd.experiments.manifest import MANIFEST
from hpd.experiments.output import check_target, write_report
from hpd.experiments.pages import render_page
from hpd.experiments.report import build_report
from hpd.terminal.console import console

__all__ = ["run_report"]


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
        console.print(f"damaged: {escape(line)}", highlight=False, soft_wrap=True)
    for line in report.verdicts:
        console.print(f"* {escape(line)}", highlight=False, soft_wrap=True)
    console.print(
        f"{report.status}\nreport: {page}, {target / 'report.md'}, plots/*.png, data/*.csv",
        highlight=False,
        soft_wrap=True,
    )


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
